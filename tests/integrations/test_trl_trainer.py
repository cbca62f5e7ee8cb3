"""FusedGRPOTrainer against GRPOTrainer of TRL: the same seed, metrics and weights."""

import os
import subprocess
import sys

import pytest
import torch

trl = pytest.importorskip("trl", reason="trl is not installed: make test installs it")

import trl_ranks  # noqa: E402
import trl_runs  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_runs import differences, save_model, train  # noqa: E402

from grpo_fused.integrations import trl_versions  # noqa: E402
from grpo_fused.integrations.trl import VERSION, FusedGRPOTrainer  # noqa: E402

BOUND = 1e-5
RECENT = VERSION.release >= (1, 8)
OFF_POLICY = {"num_iterations": 2, "steps_per_generation": 4}
ACCUMULATED = {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
KL = {"beta": 0.2, "use_bias_correction_kl": False}
CORRECTED_KL = {"beta": 0.2, "use_bias_correction_kl": True}
SEQUENCE = {"importance_sampling_level": "sequence"}
LEVELS = {"token": KL, "sequence": SEQUENCE | CORRECTED_KL}

CASES = {
    f"{loss}-{level}-kl": {"loss_type": loss} | options | OFF_POLICY
    for loss in LOSSES[:-1]
    for level, options in LEVELS.items()
}
CASES |= {
    "dapo": {"loss_type": "dapo"} | OFF_POLICY,
    "vespo": {"loss_type": "vespo"} | OFF_POLICY,
    "vespo-sequence": {"loss_type": "vespo"} | SEQUENCE | OFF_POLICY,
}
CASES |= {
    f"vespo-{name}": {"loss_type": "vespo"} | options
    for name, options in {
        "on-policy": {},
        "accumulated": ACCUMULATED,
        "kl": KL | OFF_POLICY,
        "kl-corrected": CORRECTED_KL | OFF_POLICY,
        "kl-corrected-sequence": CORRECTED_KL | SEQUENCE | OFF_POLICY,
        "shaped": {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 2.0} | OFF_POLICY,
        "flat": {"vespo_k_pos": 0.0, "vespo_lambda_neg": 0.0} | OFF_POLICY,
        "negative": {"vespo_k_pos": -0.1} | OFF_POLICY,
    }.items()
}
CASES |= {
    "on_policy": {},
    "kl-corrected": CORRECTED_KL | OFF_POLICY,
    "accumulated": ACCUMULATED,
    "accumulated-grpo": {"loss_type": "grpo", "beta": 0.1} | ACCUMULATED,
    "accumulated-bnpo": {"loss_type": "bnpo"} | ACCUMULATED,
    "accumulated-luspo": {"loss_type": "luspo"} | ACCUMULATED,
    "delta": {"delta": 1.5, "epsilon_high": 0.3} | OFF_POLICY,
    "delta-low": {"delta": 1.1, "epsilon_high": 0.3} | OFF_POLICY,
    "delta-at-the-bound": {"delta": 1.25, "epsilon_high": 0.25} | OFF_POLICY,
    "temperature": {"temperature": 0.7, "mask_truncated_completions": True} | OFF_POLICY,
    "quantile": {"top_entropy_quantile": 0.5, "loss_type": "grpo"} | OFF_POLICY,
    "off_policy_mask": {"off_policy_mask_threshold": 0.01} | OFF_POLICY,
    "batches-of-three": {"beta": 0.1, "per_device_train_batch_size": 12} | OFF_POLICY,
    # Bounds so wide that rounding to bfloat16 moves no ratio across them.
    "bf16": {"bf16": True, "beta": 0.1, "epsilon": 9.0, "epsilon_high": 9.0} | OFF_POLICY,
    "fp32-head": {"cast_lm_head_to_fp32": True} | OFF_POLICY,
    "fp32-head-of-bf16": {
        **{"cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}, "beta": 0.1},
        **OFF_POLICY,
    },
    "checkpointing": {"gradient_checkpointing": True} | OFF_POLICY,
}
# Cases whose every pair of options occurs in another case.
SLOW = {
    f"{loss}{level}": {"loss_type": loss} | options | OFF_POLICY
    for loss in LOSSES[:-1]
    for level, options in {"": {}, "-sequence": SEQUENCE}.items()
}
SLOW = {name: options for name, options in SLOW.items() if name not in CASES}
SEQUENCE_LEVEL = [f"{loss}-sequence-kl" for loss in ("bnpo", "dr_grpo", "sapo", "luspo")]
OTHERS = ("vespo-kl", "vespo-on-policy", "fp32-head")
SLOW |= {name: CASES.pop(name) for name in (*SEQUENCE_LEVEL, *OTHERS)}
if RECENT:
    entropy = {
        f"entropy-{loss}": {"entropy_coef": 0.02, "loss_type": loss} | ACCUMULATED
        for loss in LOSSES
    }
    CASES |= {name: entropy.pop(name) for name in ("entropy-grpo", "entropy-dapo", "entropy-vespo")}
    adaptive = {"use_adaptive_entropy": True, "entropy_coef_delta": 0.02} | ACCUMULATED
    CASES["entropy-adaptive"] = {"entropy_target": 9.0} | adaptive  # raised after every step
    entropy["entropy-lowered"] = {"entropy_target": 0.1, "entropy_coef": 0.05} | adaptive
    SLOW |= entropy
CASES |= SLOW
EACH_CASE = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
# Cases in which TRL's own loss runs, on fused log-probabilities.
TRL_LOSS = {"vespo-kl-corrected-sequence", "vespo-negative"}
if not trl_versions.LUSPO_SUMS_TOKENS:  # which is one of tokens but for ratios of sequences alone
    TRL_LOSS |= {name for name in CASES if "luspo" in name} - {"luspo-sequence"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def both(folder, tmp_path, kind=lambda trainer: trainer, **options):
    stock = train(kind(GRPOTrainer), folder, tmp_path, **options)
    return stock, train(kind(FusedGRPOTrainer), folder, tmp_path, **options)


@pytest.fixture
def losses_of_trl(monkeypatch):
    """Record the class of each trainer that calls TRL's `_compute_loss`, in a list."""
    calls, compute_loss = [], GRPOTrainer._compute_loss

    def counted(self, *arguments):
        calls.append(type(self))
        return compute_loss(self, *arguments)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", counted)
    return calls


def assert_same(stock, fused, bound=BOUND):
    off = {name: error for name, error in differences(fused, stock).items() if error > bound}
    assert not off


@pytest.mark.parametrize("name", EACH_CASE)
def test_same_log_and_weights(folder, tmp_path, name, losses_of_trl):
    stock, fused = both(folder, tmp_path, **CASES[name])
    # Both round partial products to bfloat16, but of different chunks.
    assert_same(stock, fused, 2e-2 if name == "bf16" else BOUND)
    assert max(row["grad_norm"] for row in stock.log if "grad_norm" in row) > 0
    assert (FusedGRPOTrainer in losses_of_trl) == (name in TRL_LOSS)
    assert not fused.warnings, "its log-probabilities are fused in all cases"


@pytest.mark.parametrize("name", ["dapo", "delta-at-the-bound"])
def test_the_cases_clip_on_both_sides(folder, tmp_path, name):
    options = CASES[name] | {"delta": None}
    log = train(FusedGRPOTrainer, folder, tmp_path, **options).log
    for side in ("low_mean", "high_mean", "high_max"):
        assert max(row[f"clip_ratio/{side}"] for row in log) > 0


def with_inputs(change, **attributes):
    """Make a function that derives a trainer class whose `_compute_loss` gets changed inputs."""

    def kind(trainer):
        class Changed(trainer):
            def _compute_loss(self, model, inputs):
                inputs = dict(inputs)
                change(inputs)
                self.use_vllm = "importance_sampling_ratio" in inputs
                self.vllm_importance_sampling_correction = True
                vars(self).update(attributes)
                loss = super()._compute_loss(model, inputs)
                self.use_vllm = False
                return loss

        return Changed

    return kind


def per_token_ratio(inputs):
    ids, mask = inputs["completion_ids"], inputs["completion_mask"]
    # TRL puts 1 under the mask, where its VESPO reads it.
    inputs["importance_sampling_ratio"] = torch.where(mask > 0, 0.5 + (ids % 5) / 4, 1.0)


def per_sequence_ratio(inputs):
    ids = inputs["completion_ids"]
    inputs["importance_sampling_ratio"] = 0.5 + (ids.sum(1, keepdim=True) % 5) / 4


def tool_mask(inputs):
    inputs["tool_mask"] = (inputs["completion_ids"] % 3 > 0).long()


def advantages_per_token(inputs):
    spread = 1 - (inputs["completion_ids"] % 4)
    inputs["advantages"] = inputs["advantages"][:, None] * spread


@pytest.mark.parametrize(
    "loss_type, level", [("dapo", "token"), ("dapo", "sequence"), ("vespo", "token")]
)
@pytest.mark.parametrize(
    "change", [per_token_ratio, per_sequence_ratio, tool_mask, advantages_per_token]
)
def test_optional_inputs(folder, tmp_path, change, loss_type, level):
    options = {"loss_type": loss_type, "importance_sampling_level": level} | OFF_POLICY
    assert_same(*both(folder, tmp_path, with_inputs(change), beta=0.1, **options))


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_rollout_ratio_without_correction(folder, tmp_path, loss_type):
    """VESPO uses the ratio even if the correction is off."""
    kind = with_inputs(per_token_ratio, vllm_importance_sampling_correction=False)
    stock, fused = both(folder, tmp_path, kind, loss_type=loss_type, **OFF_POLICY)
    assert_same(stock, fused)
    without = train(FusedGRPOTrainer, folder, tmp_path, loss_type=loss_type, **OFF_POLICY)
    assert (differences(without, fused)["weights"] > 1e-3) == (loss_type == "vespo")


@pytest.mark.parametrize("trainer", [GRPOTrainer, FusedGRPOTrainer])
def test_missing_rollout_ratio(folder, tmp_path, trainer):
    kind = with_inputs(lambda inputs: None, use_vllm=True)
    with pytest.raises(KeyError, match="importance_sampling_ratio"):
        train(kind(trainer), folder, tmp_path)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_fewer_tokens_than_steps(folder, tmp_path, loss_type):
    """1 token per generation of 4 steps, 2 of them accumulated: sums are divided by 1/2."""

    def one_token(inputs):
        first = torch.zeros_like(inputs["completion_mask"])
        first[:1, :1] = 1
        inputs["completion_mask"] = inputs["completion_mask"] * first
        inputs["num_items_in_batch"] = torch.ones_like(inputs["num_items_in_batch"])

    stock, fused = both(
        folder, tmp_path, with_inputs(one_token), loss_type=loss_type, beta=0.1, **ACCUMULATED
    )
    assert_same(stock, fused)
    assert max(row["grad_norm"] for row in stock.log if "grad_norm" in row) > 0


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "vespo"])
def test_evaluation(folder, tmp_path, loss_type):
    """Evaluation neither accumulates nor splits a generation into steps."""
    options = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 8}
    stock, fused = both(folder, tmp_path, loss_type=loss_type, beta=0.1, **options, **ACCUMULATED)
    assert any("eval_loss" in row for row in stock.log)
    assert_same(stock, fused)


class Collectives:
    """Count the collective calls of an accelerator inside of `_compute_loss`."""

    def __init__(self, trainer):
        self.calls, self.trainer = 0, trainer
        accelerator = trainer.accelerator
        for name in ("gather", "reduce", "gather_for_metrics"):
            setattr(accelerator, name, self.counted(getattr(accelerator, name)))
        trainer._compute_loss = self.within(trainer._compute_loss)

    def counted(self, function):
        def call(*args, **kwargs):
            self.calls += self.inside
            return function(*args, **kwargs)

        return call

    inside = False

    def within(self, function):
        def call(*args, **kwargs):
            self.inside = True
            loss = function(*args, **kwargs)
            self.inside = False
            return loss

        return call


@pytest.mark.parametrize(
    "trainer, calls",
    [(GRPOTrainer, 7 if trl_versions.METRICS_OVER_RANKS else 5), (FusedGRPOTrainer, 1)],
)
def test_one_collective_call_for_all_metrics(folder, tmp_path, trainer, calls):
    counts = []
    before = lambda trainer: counts.append(Collectives(trainer))  # noqa: E731
    train(trainer, folder, tmp_path, beta=0.1, before=before)
    assert counts[0].calls == calls * trl_runs.STEPS


def test_the_loss_never_sees_logits(folder, tmp_path, monkeypatch):
    """A fused loss needs no log-probabilities of TRL."""
    run = train(FusedGRPOTrainer, folder, tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("log-probabilities were computed")

    monkeypatch.setattr(FusedGRPOTrainer, "_get_per_token_logps_and_entropies", refuse)
    again = train(FusedGRPOTrainer, folder, tmp_path)
    assert_same(run, again, 0.0)


def lora(**options):
    peft = pytest.importorskip("peft", reason="peft is not installed: make test installs it")
    return peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, **options)


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_lora_on_the_backbone(folder, tmp_path, recwarn, loss_type):
    """The reference model is the policy without its adapters."""
    config = lora(target_modules=["q_proj", "down_proj"])
    options = {"peft_config": config, "beta": 0.1, "loss_type": loss_type} | OFF_POLICY
    assert_same(*both(folder, tmp_path, **options))
    assert not [w for w in recwarn if "TRL computes the loss" in str(w.message)]


def test_wrapped_reference_model(folder, tmp_path, monkeypatch):
    """FSDP and DeepSpeed wrap the reference model; the forward of the wrapper has to run."""
    prepare_model, wrapped = Accelerator.prepare_model, []

    def prepare_and_wrap(self, model, *arguments, evaluation_mode=False, **options):
        model = prepare_model(self, model, *arguments, evaluation_mode=evaluation_mode, **options)
        if evaluation_mode:
            wrapped.append(torch.nn.DataParallel(model))
            wrapped[-1].register_forward_pre_hook(lambda *_: calls.append(1))
        return wrapped[-1] if evaluation_mode else model

    calls = []
    monkeypatch.setattr(Accelerator, "prepare_model", prepare_and_wrap)
    stock, fused = both(folder, tmp_path, beta=0.1, **OFF_POLICY)
    assert_same(stock, fused)
    assert not fused.warnings and calls and fused.trainer.ref_model is wrapped[1]


@pytest.mark.parametrize("losses", ["vespo", pytest.param("grpo dapo", marks=pytest.mark.slow)])
def test_two_ranks(folder, tmp_path, losses):
    """DDP averages gradients; metrics cover both ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command += [trl_ranks.__file__, str(folder), str(tmp_path), *losses.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    for loss in losses.split():
        stock, fused = (
            trl_runs.Run(**torch.load(tmp_path / f"{loss}-{trainer}.pt"))
            for trainer in ("GRPOTrainer", "FusedGRPOTrainer")
        )
        assert_same(stock, fused)
