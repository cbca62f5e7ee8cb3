"""The steps whose Python is timed: two launches or three, and one in backward."""

import pytest

from benchmarks.overhead import CASES, make_step
from grpo_fused.kernels import launch

KERNELS = ["_fused_loss_kernel", "_reduce_kernel", "_rescale_kernel"]


@pytest.mark.skipif(not launch.INTERPRETED, reason="a device's tensors are not on the CPU")
@pytest.mark.parametrize("case", CASES)
def test_launches_of_a_step(case, monkeypatch):
    launches = []
    monkeypatch.setattr(launch, "launch", lambda f, *args, **options: launches.append(f.__name__))
    make_step(CASES[case])()
    weighs = case == "grpo"  # of the others, every weight is a number
    assert launches == ["_token_weights_kernel"] * weighs + KERNELS
