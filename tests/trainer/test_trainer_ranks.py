"""The trainer on two and on four processes; the checks are in `trainer_parallel_ranks`."""

import pytest
import ranks
import torch
from parallel_trainer import load_start, result, save_start, sgd, trainer_on

MODULES = ("trainer_parallel_ranks", "served_ranks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A start, and the run of one process with its checkpoints."""
    folder = tmp_path_factory.mktemp("ranks")
    save_start(folder / "start")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("grpo_fused.trainer.trainer.make_optimizer", sgd)
        options = {"save_steps": 1, "save_total_limit": None}
        trainer, records = trainer_on(
            folder / "one", load_start(folder / "start", "one"), **options
        )
        trainer.train()
        torch.save(result(trainer, records), folder / "expected.pt")
    return folder


def test_two_ranks(folder):
    ranks.start(2, folder, MODULES)
    assert len(list(folder.glob("from-one-checkpoint-*-2/model"))) == 2


@pytest.mark.slow
def test_four_ranks(folder):
    """After two ranks have saved checkpoints; then two resume what four have saved."""
    ranks.start(2, folder, MODULES, slow=True)
    ranks.start(4, folder, MODULES, slow=True)
    ranks.start(2, folder, MODULES, slow=True)
    for kind, source, size in (("ddp", "one", 2), ("tp", "2x24", 2), ("2x2", "tp2", 4)):
        resumed = list(folder.glob(f"from-{source}-checkpoint-*-{size}/model"))
        assert len(resumed) == 2, (kind, source)
