"""Fallbacks of FusedGRPOTrainer to TRL: the same numbers, and one warning with the reason."""

import warnings

import pytest
import torch

trl = pytest.importorskip("trl", reason="trl is not installed: make test installs it")

from tiny_models import quantised  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_runs import differences, make_trainer, mixture, save_model, train  # noqa: E402

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


def both(model, tmp_path, **options):
    """Train with TRL and with ours, each on a model of its own."""
    return [
        train(trainer, model(), tmp_path, **options) for trainer in (GRPOTrainer, FusedGRPOTrainer)
    ]


@pytest.mark.skipif(VERSION.release < (1, 7), reason="TRL has no auxiliary loss")
@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_experts(tmp_path, monkeypatch, coefficient):
    """The loss of the router is added to the fused loss, and to its metrics."""
    options = {"router_aux_loss_coef": coefficient, "gradient_accumulation_steps": 2}
    stock = train(GRPOTrainer, mixture(), tmp_path, steps_per_generation=4, **options)
    monkeypatch.delattr(GRPOTrainer, "_compute_loss")
    fused = train(FusedGRPOTrainer, mixture(), tmp_path, steps_per_generation=4, **options)
    assert max(differences(fused, stock).values()) <= BOUND and not fused.warnings
    assert ("aux_loss" in fused.log[0]) == bool(coefficient)


@pytest.mark.skipif(VERSION.release < (1, 7), reason="TRL has no auxiliary loss")
def test_experts_with_an_unknown_loss(tmp_path, monkeypatch):
    """A router whose loss is not the function of that name beside the model."""

    def other(model):
        class Other(type(model)):
            def forward(self, *args, **kwargs):
                output = super().forward(*args, **kwargs)
                output.aux_loss = None if output.aux_loss is None else 2 * output.aux_loss
                return output

        model.__class__ = Other
        return model

    stock, fused = both(lambda: other(mixture()), tmp_path, router_aux_loss_coef=0.1)
    assert max(differences(fused, stock).values()) <= BOUND
    (reason,) = fused.warnings
    assert reason.startswith("the load-balancing loss of Other is ")


def test_nothing_trainable(folder, tmp_path):
    """TRL makes steps that change nothing."""
    model = peft_model(folder, "LoraConfig", r=2, target_modules=["q_proj"])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient"):
        make_trainer(FusedGRPOTrainer, model, tmp_path)


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


@pytest.mark.skipif(VERSION.release < (1, 8), reason="TRL has no entropy bonus")
@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_entropies_have_a_gradient_for_the_bonus_alone(folder, tmp_path, coefficient):
    trainer = make_trainer(FusedGRPOTrainer, folder, tmp_path, entropy_coef=coefficient)
    ids = torch.ones(4, 9, dtype=torch.int64)
    arguments = (trainer.model, ids, ids, 5)
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        *arguments, compute_entropy=True
    )
    assert logps.requires_grad and entropies.requires_grad == bool(coefficient)


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
