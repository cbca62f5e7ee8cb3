"""Fixtures of the trainer's tests."""

import signal

import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def plain_accelerator():
    """A run in half precision leaves a state behind that other tests of the process cannot have."""
    yield
    if AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def default_sigint():
    """Restores the default handler: a shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def no_plot(monkeypatch):
    """Skips reward.png, which takes longer than the runs that it shows."""
    monkeypatch.setattr("grpo_fused.trainer.run.log.plot_history", lambda *arguments: b"")


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory):
    """A model that is not the policy, which servers start with."""
    from grpo_fused.demo import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(9)
    make_model(make_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def stubs(served_folder, monkeypatch):
    """A function that starts stubs of vLLM servers."""
    from vllm_stub import Stub

    from grpo_fused.trainer.rollouts import vllm_server

    monkeypatch.setattr(vllm_server, "BACKOFF", 0.01)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # every request is a thread, in which torch would start its own
    started = []

    def start(number=1):
        started.extend(Stub(served_folder) for _ in range(number))
        return started[-number:]

    yield start
    for stub in started:
        stub.stop()
    torch.set_num_threads(threads)
