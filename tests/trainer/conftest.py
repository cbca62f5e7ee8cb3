"""Fixtures of the trainer's tests."""

import signal

import pytest
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
