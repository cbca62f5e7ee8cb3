"""The steps whose Python is timed are those of the loss: three launches each."""

import pytest

from benchmarks.overhead import CASES, make_step
from grpo_fused.kernels import launch

KERNELS = {
    "plain": ["_token_weights_kernel", "_fused_loss_kernel", "_reduce_kernel", "_rescale_kernel"],
}


@pytest.mark.skipif(not launch.INTERPRETED, reason="a device's tensors are not on the CPU")
@pytest.mark.parametrize("case", CASES)
def test_launches_of_a_step(case, monkeypatch):
    launches = []
    monkeypatch.setattr(launch, "launch", lambda f, *args, **options: launches.append(f.__name__))
    make_step(CASES[case])()
    assert launches == KERNELS["plain"]
