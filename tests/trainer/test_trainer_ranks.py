"""The trainer on two and on four processes; the checks are in `trainer_parallel_ranks`."""

import pytest
import ranks
import torch
from parallel_trainer import (
    DYNAMIC,
    PPO,
    load_start,
    result,
    reward_run,
    save_start,
    sgd,
    trainer_on,
)
from reward_models import save_reward_model

MODULES = ("trainer_parallel_ranks",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A start, and the run of one process with its checkpoints."""
    folder = tmp_path_factory.mktemp("ranks")
    save_start(folder / "start")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("grpo_fused.trainer.trainer.make_optimizer", sgd)
        options = {"save_steps": 1, "save_total_limit": None}
        for name, others in (("one", options), ("dynamic", options | DYNAMIC), ("ppo-one", PPO)):
            model = load_start(folder / "start", "one")
            trainer, records = trainer_on(folder / name, model, **others)
            trainer.train()
            torch.save(result(trainer, records), folder / f"expected-{name}.pt")
        save_reward_model(folder / "reward")
        monkeypatch.setattr("grpo_fused.trainer.reward_training.make_optimizer", sgd)
        trainer, records = reward_run(folder, "one", folder / "reward-one")
        trainer.train()
        weights = trainer.reward_training.model.model.state_dict()
        torch.save({"records": records, "weights": weights}, folder / "reward.pt")
    return folder


def test_two_ranks(folder):
    ranks.start(2, folder, ("served_ranks",))
    ranks.start(2, folder, MODULES)
    assert len(list(folder.glob("from-one-checkpoint-*-2/model"))) == 2


@pytest.mark.slow
def test_four_ranks(folder):
    """After two ranks have saved checkpoints; then two resume what four have saved."""
    ranks.start(2, folder, ("served_ranks",), slow=True)
    ranks.start(2, folder, MODULES, slow=True)
    ranks.start(4, folder, MODULES, slow=True)
    ranks.start(2, folder, ("resumed_ranks",), slow=True)
    for kind, source, size in (("ddp", "one", 2), ("tp", "2x24", 2), ("2x2", "tp2", 4)):
        resumed = list(folder.glob(f"from-{source}-checkpoint-*-{size}/model"))
        assert len(resumed) == 2, (kind, source)
