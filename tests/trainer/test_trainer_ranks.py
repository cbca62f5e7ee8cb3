"""The trainer on two and on four processes; the checks are in `trainer_parallel_ranks`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_trainer import load_start, result, save_start, trainer_on

SCRIPT = Path(__file__).parents[1] / "helpers" / "ranks.py"


def start(folder, world_size):
    """Runs the checks on so many ranks."""
    meet = folder / f"meet{world_size}"
    meet.unlink(missing_ok=True)
    arguments = [str(world_size), str(folder), "trainer_parallel_ranks"]
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), *arguments])
        for rank in range(world_size)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A start, and the run of one process with its checkpoints."""
    folder = tmp_path_factory.mktemp("ranks")
    save_start(folder / "start")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("grpo_fused.trainer.trainer.make_optimizer", None)  # restored later
        options = {"save_steps": 1, "save_total_limit": None}
        trainer, records = trainer_on(
            folder / "one", load_start(folder / "start", "one"), **options
        )
        trainer.train()
        torch.save(result(trainer, records), folder / "expected.pt")
    return folder


def test_two_ranks(folder):
    start(folder, 2)


@pytest.mark.slow
def test_four_ranks(folder, monkeypatch):
    """After two ranks have saved checkpoints; then two resume what four have saved."""
    monkeypatch.setenv("GRPO_FUSED_SLOW", "1")
    start(folder, 2)
    start(folder, 4)
    start(folder, 2)
