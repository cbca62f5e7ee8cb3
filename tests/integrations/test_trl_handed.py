"""Fallbacks of FusedGRPOTrainer to TRL: the same numbers, and one warning with the reason."""

import importlib
import sys
import warnings

import pytest
import torch

trl = pytest.importorskip("trl", reason="trl is not installed: make test installs it")

from tiny_models import TINY, quantised  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_runs import differences, make_trainer, save_model, train  # noqa: E402

from grpo_fused.demo import make_tokenizer  # noqa: E402
from grpo_fused.integrations.trl import VERSION, FusedGRPOTrainer  # noqa: E402

BOUND = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def peft_model(folder, name, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed: make test installs it")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return peft.get_peft_model(model, getattr(peft, name)(**options))


def adapted_head(folder):
    options = {"r": 2, "lora_alpha": 8, "init_lora_weights": False}
    return peft_model(folder, "LoraConfig", target_modules=["q_proj", "lm_head"], **options)


def saved_head(folder):
    """Train the full head, next to adapters on other layers."""
    options = {"r": 2, "lora_alpha": 8, "init_lora_weights": False}
    return peft_model(
        folder, "LoraConfig", target_modules=["q_proj"], modules_to_save=["lm_head"], **options
    )


def learned_prompt(folder):
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    return peft_model(folder, "PromptTuningConfig", **options)


def on_two_devices(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    return model


def scaled(folder):
    """Make a model that scales its logits without saying so in its config."""

    class Scaled(type(AutoModelForCausalLM.from_pretrained(folder))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 1.5 * output.logits
            return output

    return Scaled.from_pretrained(folder)


def mixture(folder):
    """Make a mixture of experts, whose router has an auxiliary loss."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    tokenizer = make_tokenizer()
    config = AutoConfig.for_model("qwen3_moe", **TINY | experts | {"vocab_size": len(tokenizer)})
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.bos_token_id = None
    return AutoModelForCausalLM.from_config(config)


NOT_LINEAR = "is not a plain linear layer (an adapter? quantised?)"
CASES = {
    saved_head: f"ModulesToSaveWrapper {NOT_LINEAR}",
    learned_prompt: "prompt-learning adapters shift the positions of the hidden states",
    on_two_devices: "the model is split over several devices",
    scaled: "Scaled transforms its logits in a way its config does not describe",
}
if VERSION.release < (1, 14):  # later versions of TRL raise
    CASES[adapted_head] = f"Linear {NOT_LINEAR}"


@pytest.mark.parametrize("make", CASES)
def test_fallback_to_trl(folder, tmp_path, make):
    options = {"num_iterations": 2, "steps_per_generation": 4}
    stock, fused = (
        train(trainer, make(folder), tmp_path, **options)
        for trainer in (GRPOTrainer, FusedGRPOTrainer)
    )
    assert max(differences(fused, stock).values()) <= BOUND
    assert max(row["grad_norm"] for row in stock.log if "grad_norm" in row) > 0
    assert fused.warnings == [CASES[make]]


@pytest.mark.skipif(VERSION.release < (1, 8), reason="TRL has no auxiliary loss")
@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_experts(folder, tmp_path, coefficient):
    options = {"num_iterations": 2, "router_aux_loss_coef": coefficient}
    stock, fused = (
        train(trainer, mixture(folder), tmp_path, **options)
        for trainer in (GRPOTrainer, FusedGRPOTrainer)
    )
    assert max(differences(fused, stock).values()) <= BOUND
    assert fused.warnings == ["an auxiliary loss of the model is requested"] * bool(coefficient)
    assert ("aux_loss" in fused.log[0]) == bool(coefficient)


def scores(trainer, **inputs):
    ids = torch.randint(2, 12, (4, 9), generator=torch.Generator().manual_seed(0))
    arguments = (trainer.model, ids, torch.ones_like(ids), 5)
    return trainer._get_per_token_logps_and_entropies(*arguments, **inputs)[0]


def test_fallback_warns_once(folder, tmp_path):
    trainer = make_trainer(FusedGRPOTrainer, folder, tmp_path)
    trainer._why_unfused = "a reason"
    with pytest.warns(UserWarning, match="TRL computes the loss, without grpo_fused: a reason"):
        expected = scores(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores(trainer)
    trainer._why_unfused = None
    torch.testing.assert_close(scores(trainer), expected, rtol=1e-5, atol=1e-6)


def test_images(folder, tmp_path, monkeypatch):
    """TRL computes both log-probabilities and loss, and gets all inputs."""
    seen = []

    def record(self, *arguments, pixel_values=None, **others):
        seen.append(pixel_values)
        raise InterruptedError

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", record)
    trainer = make_trainer(FusedGRPOTrainer, folder, tmp_path)
    images, ids = torch.zeros(4, 3), torch.ones(4, 5, dtype=torch.int64)
    with (
        pytest.warns(UserWarning, match="the inputs are not text only"),
        pytest.raises(InterruptedError),
    ):
        scores(trainer, pixel_values=images)
    inputs = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), ids)
    with pytest.raises(InterruptedError):
        trainer._compute_loss(trainer.model, inputs | {"pixel_values": images})
    assert len(seen) == 2 and all(values is images for values in seen)


def test_settings_and_heads_that_cannot_be_fused(folder, tmp_path):
    trainer = make_trainer(FusedGRPOTrainer, folder, tmp_path)
    assert trainer._why_unfused is None
    trainer.args._n_gpu = 2
    assert "DataParallel" in trainer._why_not_fused([trainer.model])
    trainer.args._n_gpu = 1
    quantised(trainer.model)
    assert "quantised" in trainer._why_not_fused([trainer.model])
    trainer = make_trainer(FusedGRPOTrainer, folder, tmp_path, torch_compile=True)
    assert "torch_compile" in trainer._why_unfused


@pytest.mark.parametrize("trainer", [GRPOTrainer, FusedGRPOTrainer])
def test_level_unknown_to_trl(folder, tmp_path, trainer):
    """`linear_grpo_loss` supports sequence_token, TRL does not."""
    with pytest.raises(ValueError, match="importance sampling level: sequence_token"):
        train(trainer, folder, tmp_path, importance_sampling_level="sequence_token")


@pytest.mark.parametrize("version", ["0.29.1", "1.5.0", "1.17.0"])
def test_other_versions_raise(monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    monkeypatch.delitem(sys.modules, "grpo_fused.integrations.trl")
    with pytest.raises(ImportError, match=rf"versions 1.0, 1.8, 1.12, 1.16, got trl {version}"):
        importlib.import_module("grpo_fused.integrations.trl")
