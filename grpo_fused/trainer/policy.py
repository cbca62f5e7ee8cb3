"""The policy: model preparation, log-probabilities of completions, and the loss."""

import copy
import inspect
from typing import Any

import torch
from torch import nn

from grpo_fused import (
    LOSSES,
    LossOutput,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
)
from grpo_fused.integrations.transformers import base_model, fuse_lm_head
from grpo_fused.trainer.experience import Batch
from grpo_fused.trainer.ranks import Ranks
from grpo_fused.trainer.reference import Reference
from grpo_fused.trainer.run.config import GRPOTrainerConfig


def prepare_model(model: nn.Module, config: GRPOTrainerConfig) -> None:
    """Fuses the LM head and sets dropout and gradient checkpointing, before the model is wrapped.

    Raises:
        ValueError: loss_input is "hidden" and the head cannot be fused.
    """
    base = base_model(model)
    if config.loss_input == "hidden":
        try:
            fuse_lm_head(base)
        except ValueError as error:
            raise ValueError(f'{error}; loss_input "logits" works with any head') from error
    if config.disable_dropout:
        disable_dropout(model)
    if config.gradient_checkpointing:
        checkpoint_activations(base)


def make_reference(model: nn.Module, config: GRPOTrainerConfig, ranks: Ranks) -> Reference | None:
    """Returns the reference of a policy that is not yet prepared; None without a KL penalty."""
    if not config.beta:
        return None
    reference = Reference(model, config.reference_mix, ranks.distributed)
    if reference.model is not None:
        prepare_model(reference.model, config)
        reference.model.to(ranks.accelerator.device)
    return reference


def checkpoint_activations(model: Any) -> None:
    """Lets a transformers model recompute activations in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.24
    enable = enable or model.gradient_checkpointing_enable
    # Reentrant checkpointing needs an input with a gradient, which frozen embeddings lack.
    enable({"use_reentrant": False})


def disable_dropout(model: nn.Module) -> None:
    """Sets every probability of dropout to 0: of modules, of functions, and in configs.

    Models call `F.dropout` with a number that they keep under a name such as attention_dropout,
    attn_pdrop or layerdrop, or read it from the config that all modules share. Submodules get a
    config of their own, so that the model saves the one that it was loaded with.
    """
    configs: dict[int, Any] = {}
    top = base_model(model)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_dropout(vars(module), lambda name, module=module: setattr(module, name, 0.0))
        config = vars(module).get("config")
        if module is not top and hasattr(config, "to_dict"):
            if id(config) not in configs:
                configs[id(config)] = copy.deepcopy(config)
                _zero_config(configs[id(config)])
            module.config = configs[id(config)]


def _zero_config(config):
    _zero_dropout(vars(config), lambda name: setattr(config, name, 0.0))
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            _zero_config(value)


def _zero_dropout(values, set_to_zero):
    for name, value in list(values.items()):
        if "drop" in name.lower() and isinstance(value, float) and 0 < value <= 1:
            set_to_zero(name)


def takes_positions(model: nn.Module) -> bool:
    """Whether the forward of a model has position_ids."""
    return "position_ids" in inspect.signature(base_model(model).forward).parameters


def model_inputs(batch: Batch, with_positions: bool) -> dict[str, torch.Tensor]:
    """Returns the keywords of a model's forward over the prompts and completions of a batch."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if with_positions:  # counted from the first unpadded token, as in `generate`
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs


class Policy:
    """Log-probabilities and losses of completions, for the policy and its reference alike.

    Args:
        config: GRPOTrainerConfig.
        model: unwrapped model, read for its signature and its value head.
    """

    def __init__(self, config: GRPOTrainerConfig, model: nn.Module):
        self.config, self.with_positions = config, takes_positions(model)
        self.objective = config.objective_or_default
        self.value_head = getattr(base_model(model), "value_head", None)
        self.vocabulary = base_model(model).config.get_text_config().vocab_size
        # A mean over the tokens of a micro-batch would depend on the size of micro-batches.
        self.normalizer = LOSSES[config.loss_type].normalizer
        if self.normalizer == "token-mean-local":
            self.normalizer = "token-mean"

    @torch.no_grad()
    def logps(self, model: nn.Module, batch: Batch, *, over_support: bool = False) -> torch.Tensor:
        """Returns log-probabilities of completion tokens, (B, T) float32, 0 where masked.

        Args:
            model: the policy or its reference.
            batch: the micro-batch.
            over_support: over what the sampler kept, if that is known, or over the vocabulary.
        """
        arguments = (batch.completion_ids, batch.completion_mask)
        functions = linear_selective_log_softmax, selective_log_softmax
        support = batch.support(self.vocabulary) if over_support else None
        return self._through_head(model, batch, functions, arguments, support=support)[0]

    @torch.no_grad()
    def values(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns the values of the value head before each completion token, (B, T) float32."""
        inputs = self._inputs(batch)
        return model(**inputs, head=lambda hidden, weight, **head: self._values(hidden))

    def loss(
        self, model: nn.Module, batch: Batch, num_items: float, num_sequences: float
    ) -> tuple[LossOutput, torch.Tensor | None]:
        """Returns the contribution of a micro-batch to the loss of its optimizer step.

        Args:
            model: the policy as it is wrapped for training.
            batch: the micro-batch.
            num_items: active tokens of the optimizer step over all ranks.
            num_sequences: sequences of the optimizer step over all ranks.

        Returns:
            (output, values): the values of the value head (B, T), differentiable; None without one.
        """
        config = self.config
        options = {
            "old_logps": batch.old_logps,
            "ref_logps": batch.ref_logps,
            "sampling_logps": batch.sampling_logps,
            "importance_sampling_ratio": batch.importance_sampling_ratio,
            "support": batch.support(self.vocabulary),
            "loss_type": config.loss_type,
            "objective": self.objective,
            "importance_sampling_level": config.importance_sampling_level,
            "normalizer": self.normalizer,
            "beta": config.beta if config.algorithm == "grpo" else 0.0,  # PPO: in the rewards
            "kl_estimator": config.kl_estimator,
            "use_bias_correction_kl": config.use_bias_correction_kl,
            "entropy_coef": config.entropy_coef,
            "compute_entropy": True,
            "num_items_in_batch": num_items,
            "num_entropy_items_in_batch": num_items,
            "num_sequences_in_batch": num_sequences,
            "max_completion_length": config.max_completion_length,
        }
        arguments = (batch.completion_ids, batch.completion_mask, batch.advantages)
        if self.value_head is None:
            functions = linear_grpo_loss, grpo_loss
            return self._through_head(model, batch, functions, arguments, **options), None

        def loss_and_values(hidden, *given, **options):
            return linear_grpo_loss(hidden, *given, **options), self._values(hidden)

        return self._through_head(model, batch, (loss_and_values, None), arguments, **options)

    def _through_head(self, model, batch, functions, arguments, **options):
        """Calls `functions` = (of hidden states and head, of logits), as loss_input says."""
        of_hidden, of_logits = functions
        options["temperature"] = self.config.temperature
        inputs = self._inputs(batch)
        if self.config.loss_input == "logits":
            logits = model(**inputs, use_cache=False).logits
            return of_logits(logits, *arguments, **options)
        return model(
            **inputs,
            head=lambda hidden, weight, **head: of_hidden(
                hidden, weight, *arguments, **head, **options
            ),
        )

    def _inputs(self, batch):
        keep = batch.completion_ids.shape[1] + 1  # the last is ignored
        return model_inputs(batch, self.with_positions) | {"logits_to_keep": keep}

    def _values(self, hidden):
        return self.value_head(hidden[:, :-1].float())[..., 0]
