"""Fixtures of the trainer's tests."""

import signal

import pytest


@pytest.fixture
def default_sigint():
    """Restores the default handler: a shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def no_plot(monkeypatch):
    """Skips reward.png, which takes longer than the runs that it shows."""
    monkeypatch.setattr("grpo_fused.trainer.run.log.plot_history", lambda *arguments: None)
