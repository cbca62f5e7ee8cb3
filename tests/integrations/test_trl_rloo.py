"""FusedRLOOTrainer against RLOOTrainer of TRL: the same seed, metrics and weights."""

import pytest
import torch

trl = pytest.importorskip("trl", reason="trl is not installed: make test installs it")

from trl import RLOOConfig, RLOOTrainer  # noqa: E402
from trl_runs import differences, make_trainer, mixture, save_model, train  # noqa: E402

from grpo_fused.integrations.trl import VERSION, FusedRLOOTrainer  # noqa: E402
from grpo_fused.integrations.trl_compare import SWITCH  # noqa: E402

BOUND = 1e-5
OFF_POLICY = {"num_iterations": 2, "steps_per_generation": 4}
CASES = {
    "on-policy": {"beta": 0.0},
    "off-policy": {"beta": 0.1, "epsilon": 0.05, "epsilon_high": 0.1} | OFF_POLICY,
    "accumulated": {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
    "truncated": {"mask_truncated_completions": True, "temperature": 0.7} | OFF_POLICY,
    "evaluated": {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def run(trainer, model, output, **options):
    return train(trainer, model, output, config_class=RLOOConfig, **options)


@pytest.mark.parametrize("name", CASES)
def test_same_log_and_weights(folder, tmp_path, monkeypatch, name):
    stock = run(RLOOTrainer, folder, tmp_path, **CASES[name])
    monkeypatch.delattr(RLOOTrainer, "_compute_loss")
    fused = run(FusedRLOOTrainer, folder, tmp_path, **CASES[name])
    off = {name: x for name, x in differences(fused, stock).items() if x > BOUND}
    assert not off and not fused.warnings
    assert max(row["grad_norm"] for row in stock.log if "grad_norm" in row) > 0
    if name == "off-policy":
        assert all(
            max(row[f"clip_ratio/{side}_mean"] for row in fused.log) for side in ("low", "high")
        )


@pytest.mark.skipif(VERSION.release < (1, 7), reason="TRL has no auxiliary loss")
def test_experts(tmp_path, monkeypatch):
    options = {"router_aux_loss_coef": 0.1, "beta": 0.0, "gradient_accumulation_steps": 2}
    stock = run(RLOOTrainer, mixture(), tmp_path, **options)
    monkeypatch.delattr(RLOOTrainer, "_compute_loss")
    fused = run(FusedRLOOTrainer, mixture(), tmp_path, **options)
    assert max(differences(fused, stock).values()) <= 5 * BOUND and not fused.warnings


def test_compared_with_another_loss(folder, tmp_path, monkeypatch):
    """As `FusedGRPOTrainer`: see test_trl_newer."""
    monkeypatch.setenv(SWITCH, "1")
    fused = run(FusedRLOOTrainer, folder, tmp_path, **OFF_POLICY)
    assert not fused.warnings
    compute_loss = RLOOTrainer._compute_loss

    def longer_ratio(self, model, inputs):
        return compute_loss(self, model, inputs | {"old_logps": inputs["old_logps"] + 0.5})

    monkeypatch.setattr(RLOOTrainer, "_compute_loss", longer_ratio)
    stock = run(RLOOTrainer, folder, tmp_path, **OFF_POLICY)
    fused = run(FusedRLOOTrainer, folder, tmp_path, **OFF_POLICY)
    assert max(differences(fused, stock).values()) <= BOUND
    assert "on two sequences our loss differs from its own" in fused.warnings[0]


def test_nothing_trainable(folder, tmp_path):
    with torch.no_grad():
        trainer = make_trainer(FusedRLOOTrainer, folder, tmp_path, config_class=RLOOConfig)
    model = trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient"):
        make_trainer(FusedRLOOTrainer, model, tmp_path, config_class=RLOOConfig)
