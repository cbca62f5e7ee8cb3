"""Versions of TRL that are newer than those tested: a warning, a comparison, and TRL's own loss."""

import functools
import importlib
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch

trl = pytest.importorskip("trl", reason="trl is not installed: make test installs it")

import trl_newer_ranks  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_runs import differences, make_trainer, save_model, train  # noqa: E402

from grpo_fused.integrations import trl_versions  # noqa: E402
from grpo_fused.integrations.trl import VERSION, FusedGRPOTrainer  # noqa: E402
from grpo_fused.integrations.trl_compare import SWITCH, drift, two_sequences  # noqa: E402

BOUND = 1e-5
OFF_POLICY = {"num_iterations": 2, "steps_per_generation": 4}
compute_loss = GRPOTrainer._compute_loss
score = GRPOTrainer._get_per_token_logps_and_entropies


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with dropout, whose numbers depend on the random state."""
    return save_model(tmp_path_factory.mktemp("model"), attention_dropout=0.2)


def reload(monkeypatch, version):
    """Import the integration anew, under another version of TRL; return it and the warnings."""
    monkeypatch.setattr(trl, "__version__", version)
    for name in list(sys.modules):
        if name.startswith("grpo_fused.integrations.trl"):
            monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module("grpo_fused.integrations.trl")
    return module, [str(warning.message) for warning in caught if "TRL" in str(warning.message)]


@pytest.fixture
def losses_of_trl(monkeypatch):
    """The trainers that call TRL's `_compute_loss`, in a list."""
    calls = []

    def counted(self, model, inputs):
        calls.append(type(self).__name__)
        return compute_loss(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", counted)
    return calls


def run(trainer, folder, output, **options):
    options = {"beta": 0.1, "max_steps": 3} | OFF_POLICY | options
    return train(trainer, folder, output, **options)


@pytest.mark.parametrize("version", ["0.29.1", "0.30.0.dev0"])
def test_older_versions_raise(monkeypatch, version):
    with pytest.raises(ImportError, match=rf"needs trl >= 1.0, got trl {version}"):
        reload(monkeypatch, version)


@pytest.mark.parametrize("version", ["1.5.0", "1.11.1", "1.16.3"])
def test_tested_versions_are_silent(monkeypatch, version):
    assert reload(monkeypatch, version)[1] == []


@pytest.mark.parametrize("version", ["1.17.0", "1.19.1", "2.0.0.dev0"])
def test_newer_versions_warn_once(monkeypatch, version):
    module, messages = reload(monkeypatch, version)
    assert len(messages) == 1 and f"trl {version} is newer than 1.16" in messages[0]
    assert SWITCH in messages[0] and module.FusedGRPOTrainer is not FusedGRPOTrainer


def test_the_comparison_leaves_no_trace(folder, tmp_path, monkeypatch, losses_of_trl, capsys):
    """To the bit the run without: random state, metrics and the trainer are as they were."""
    plain = run(FusedGRPOTrainer, folder, tmp_path)
    assert not losses_of_trl and SWITCH not in capsys.readouterr().err
    monkeypatch.setenv(SWITCH, "1")
    compared = run(FusedGRPOTrainer, folder, tmp_path)
    assert losses_of_trl == ["FusedGRPOTrainer"] and not compared.warnings
    assert capsys.readouterr().err.count(f"{SWITCH}=1: the loss agrees with that of trl") == 1
    assert differences(compared, plain) == dict.fromkeys(differences(compared, plain), 0.0)


@pytest.mark.skipif(VERSION.release < (1, 10), reason="the newest TRL has another loss than this")
def test_newer_versions_are_compared(folder, tmp_path, monkeypatch, losses_of_trl):
    fused = reload(monkeypatch, "1.17.0")[0].FusedGRPOTrainer
    assert not run(fused, folder, tmp_path).warnings and len(losses_of_trl) == 1
    monkeypatch.setenv(SWITCH, "0")
    run(fused, folder, tmp_path)
    assert len(losses_of_trl) == 1, "the comparison was turned off"


def test_micro_batches_of_one_sequence_are_compared(folder, tmp_path, monkeypatch, losses_of_trl):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1}
    monkeypatch.setenv(SWITCH, "1")
    options |= {"steps_per_generation": 4, "num_iterations": 1}
    assert not run(FusedGRPOTrainer, folder, tmp_path, **options).warnings
    assert len(losses_of_trl) == 1


def doubled(self, model, inputs):
    return 2 * compute_loss(self, model, inputs)


def another_gradient(self, model, inputs):
    loss = compute_loss(self, model, inputs)
    return 3 * loss - 2 * loss.detach()


def another_bound(self, model, inputs):
    self.epsilon_high, kept = 0.5, self.epsilon_high
    loss = compute_loss(self, model, inputs)
    self.epsilon_high = kept
    return loss


def another_average(self, model, inputs):
    self.loss_type, kept = "bnpo", self.loss_type
    loss = compute_loss(self, model, inputs)
    self.loss_type = kept
    return loss


def without_kl(self, model, inputs):
    reference = inputs["old_per_token_logps"] if "old_per_token_logps" in inputs else None
    inputs = inputs | ({} if reference is None else {"ref_per_token_logps": reference})
    return compute_loss(self, model, inputs)


@pytest.mark.parametrize(
    "formula", [doubled, another_gradient, another_bound, another_average, without_kl]
)
def test_another_loss_is_trls(folder, tmp_path, monkeypatch, formula):
    """With the difference in the one warning, from the first micro-batch on."""
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", formula)
    options = {"beta": 2.0, "loss_type": "grpo"}
    stock, fused = (
        run(trainer, folder, tmp_path, **options) for trainer in (GRPOTrainer, FusedGRPOTrainer)
    )
    assert max(differences(fused, stock).values()) <= 5 * BOUND  # gradients are up to tripled
    (message,) = fused.warnings
    percent = r"on two sequences our loss differs from its own by [\d.]+%, and the gradient by"
    assert re.search(percent, message), message
    if formula is doubled:
        assert "by 50.00%, and the gradient by 50.00%" in message


def test_other_scores_are_trls(folder, tmp_path, monkeypatch):
    @functools.wraps(score)
    def scaled(self, *arguments, **options):
        logps, *others = score(self, *arguments, **options)
        return (1.1 * logps, *others)

    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", scaled)
    trainer = make_trainer(FusedGRPOTrainer, folder, tmp_path)
    ids = torch.randint(2, 12, (4, 9), generator=torch.Generator().manual_seed(0))
    arguments = (trainer.model.eval(), ids, torch.ones_like(ids), 5)
    with pytest.warns(UserWarning, match="our log-probabilities differ from its own by 9.09%"):
        found = trainer._get_per_token_logps_and_entropies(*arguments)[0]
    assert torch.equal(found, scaled(trainer, *arguments)[0])


def test_scores_of_another_structure_are_trls(folder, tmp_path, monkeypatch):
    @functools.wraps(score)
    def named(self, *arguments, **options):
        return {"logps": score(self, *arguments, **options)[0]}

    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", named)
    trainer = make_trainer(FusedGRPOTrainer, folder, tmp_path)
    ids = torch.ones(4, 9, dtype=torch.int64)
    with pytest.warns(UserWarning, match="TRL returns dict, expected [23] values"):
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, ids, 5)
    assert list(found) == ["logps"]


def another_signature(self, model, inputs, num_items_in_batch=None, *, weights):
    raise AssertionError("not reached")


def test_another_signature_is_trls(folder, tmp_path, monkeypatch):
    fused = reload(monkeypatch, "1.17.0")[0].FusedGRPOTrainer
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", another_signature)
    trainer = make_trainer(fused, folder, tmp_path)
    assert "GRPOTrainer._compute_loss of trl 1.17.0 has the parameters" in trainer._why_unfused
    monkeypatch.setattr(
        GRPOTrainer,
        "_compute_loss",
        lambda self, model, inputs, **more: compute_loss(self, model, inputs),
    )
    assert make_trainer(fused, folder, tmp_path)._why_unfused is None
    monkeypatch.delattr(GRPOTrainer, "_compute_loss")
    trainer = make_trainer(fused, folder, tmp_path)
    assert "has no method _compute_loss" in trainer._why_unfused


def test_signatures():
    def why(loss, score=score):
        methods = {"_compute_loss": loss, "_get_per_token_logps_and_entropies": score}
        return trl_versions.why_signatures_differ(type("Trainer", (), methods))

    assert why(compute_loss) is None
    assert why(lambda self, model, inputs, steps=1, **others: 0) is None
    assert why(compute_loss, lambda self, model, *args, batch_size=None, **others: 0) is None
    for other in (
        lambda self, inputs, model: 0,
        lambda self, model: 0,
        lambda self, model, inputs, steps: 0,
        lambda self, model, inputs, *, steps: 0,
        lambda self, inputs, *args: 0,
    ):
        assert "Trainer._compute_loss of trl" in why(other)
    assert "_get_per_token_logps" in why(compute_loss, lambda self, ids, model, *args: 0)


def test_an_error_of_ours_leaves_the_loss_to_trl(folder, tmp_path, monkeypatch):
    def missing(self):
        raise AttributeError("no attribute 'epsilon_low'")

    monkeypatch.setenv(SWITCH, "1")
    stock = run(GRPOTrainer, folder, tmp_path)
    monkeypatch.setattr(FusedGRPOTrainer, "_objective", missing)
    fused = run(FusedGRPOTrainer, folder, tmp_path)
    assert max(differences(fused, stock).values()) <= BOUND
    (message,) = fused.warnings
    assert message.endswith("our loss failed with AttributeError: no attribute 'epsilon_low'")


def test_a_batch_without_advantages_says_nothing(folder, tmp_path, monkeypatch):
    """The comparison waits for a gradient."""
    seen = []

    class Flat(FusedGRPOTrainer):
        def _compute_loss(self, model, inputs):
            seen.append(self._why_unfused)
            if len(seen) <= 2:
                inputs = inputs | {"advantages": torch.zeros_like(inputs["advantages"])}
            return super()._compute_loss(model, inputs)

    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", doubled)
    found = run(Flat, folder, tmp_path, beta=0.0)
    assert len(found.warnings) == 1 and seen[:3] == [None] * 3 and None not in seen[3:]


def test_a_switch_that_is_none(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(SWITCH, "no")
    with pytest.raises(ValueError, match="GRPO_FUSED_COMPARE must be 0 or 1, got 'no'"):
        make_trainer(FusedGRPOTrainer, folder, tmp_path)


def test_the_sequences_of_the_comparison():
    """The largest advantage, and one of its sign whose length differs."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    advantages = torch.tensor([-1.0, 0.5, 1.5, 0.2, 9.0])
    inputs = {"completion_mask": mask, "advantages": advantages, "num_items_in_batch": mask.sum()}
    chosen = two_sequences(inputs, None)
    assert chosen["advantages"].tolist() == pytest.approx([1.5, 0.2])
    assert chosen["num_items_in_batch"] is inputs["num_items_in_batch"]
    alone = two_sequences({"completion_mask": mask[:2], "advantages": advantages[:2]}, None)
    assert alone["advantages"].tolist() == [-1.0, -1.0], "as many as on other ranks"
    moved = drift(mask[2:4], advantages[2:4], total=False)
    assert moved[0].max() < 0 and moved[1].max() > 0.5, "a clip stops the second one alone"
    sums = (drift(mask[:2], -advantages[:2], total=True) * mask[:2]).sum(1)
    assert sums.abs().max() < 0.6


NO_ZERO3 = "GRPO_FUSED_ZERO3" not in os.environ


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "ddp",
        "fsdp2",
        pytest.param("zero3", marks=pytest.mark.skipif(NO_ZERO3, reason="make zero3")),
    ],
)
def test_two_ranks_agree(folder, tmp_path, kind):
    """Both leave the loss to TRL where one rank's TRL has another, or ours fails; else neither."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command += [trl_newer_ranks.__file__, kind, str(folder), str(tmp_path)]
    command += ["stock", "same", "other", "failing"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", SWITCH: "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    messages = {
        "stock": [],
        "same": [],
        "other": ["our loss differs from its own by 50.00%, and the gradient by 50.00%"],
        "failing": ["our loss failed with RuntimeError: no objective"],
    }
    stock = torch.load(tmp_path / "stock-0.pt")
    for case, expected in messages.items():
        for rank in range(2):
            found = torch.load(tmp_path / f"{case}-{rank}.pt")
            assert len(found["warnings"]) == len(expected), found["warnings"]
            assert all(map(str.endswith, found["warnings"], expected)), found["warnings"]
            assert found["losses_of_trl"] == (0 if case == "same" else 4), "of each micro-batch"
            if case == "other":
                continue
            for row, like in zip(found["log"], stock["log"], strict=True):
                assert row == pytest.approx(like, abs=BOUND, rel=BOUND)
