"""The policy and its reference: what a model says about completions, and the loss on it."""

import contextlib
import copy
import inspect

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from grpo_fused import (
    LOSSES,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
)
from grpo_fused.causal_lm import fuse_lm_head


def prepare_model(model, config):
    """Readies a transformers model, before it is wrapped: its head, dropout, checkpointing.

    Raises:
        ValueError: loss_input "hidden" and a head that cannot be fused.
    """
    base = base_of(model)
    if config.loss_input == "hidden":
        try:
            fuse_lm_head(base)
        except ValueError as error:
            raise ValueError(f'{error}; loss_input "logits" works with any head') from error
    if config.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
    if config.gradient_checkpointing:
        # The reentrant kind finds no input with a gradient where the embeddings are frozen.
        enable = getattr(base, "activation_checkpointing_enable", None)  # transformers 5.24
        enable = enable or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def base_of(model):
    """The transformers model within a peft model, or itself."""
    return model.get_base_model() if is_adapted(model) else model


def is_adapted(model):
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


class Policy:
    """Log-probabilities and losses of completions under any model with this config.

    Args:
        config: GRPOTrainerConfig.
        model: unwrapped; only its signature is looked at.
    """

    def __init__(self, config, model):
        self.config = config
        self.objective = config.objective_or_default
        self.takes_positions = (
            "position_ids" in inspect.signature(base_of(model).forward).parameters
        )
        # The mean over the tokens at hand would depend on how a step is cut.
        self.normalizer = LOSSES[config.loss_type].normalizer
        if self.normalizer == "token-mean-local":
            self.normalizer = "token-mean"

    @torch.no_grad()
    def logps(self, model, batch):
        """(B, T) float32, 0 where masked: log-probabilities of a batch's completions."""
        arguments = (batch.completion_ids, batch.completion_mask)
        functions = linear_selective_log_softmax, selective_log_softmax
        return self._through_head(model, batch, functions, arguments)[0]

    def loss(self, model, batch, num_items, num_sequences):
        """The share of a micro-batch in the loss of its optimizer step, as a LossOutput.

        Args:
            batch: Batch.
            num_items: number, active tokens of the step over all ranks.
            num_sequences: number, sequences of the step over all ranks.
        """
        config = self.config
        # The bonus is a mean over the tokens at hand: weighted, it adds up to that of the step.
        entropy_coef = config.entropy_coef
        if entropy_coef:
            entropy_coef = entropy_coef * batch.completion_mask.sum() / max(num_items, 1)
        options = {
            "old_logps": batch.old_logps,
            "ref_logps": batch.ref_logps,
            "importance_sampling_ratio": batch.importance_sampling_ratio,
            "loss_type": config.loss_type,
            "objective": self.objective,
            "importance_sampling_level": config.importance_sampling_level,
            "normalizer": self.normalizer,
            "beta": config.beta,
            "kl_estimator": config.kl_estimator,
            "use_bias_correction_kl": config.use_bias_correction_kl,
            "entropy_coef": entropy_coef,
            "compute_entropy": True,
            "num_items_in_batch": num_items,
            "num_sequences_in_batch": num_sequences,
            "max_completion_length": config.max_completion_length,
        }
        arguments = (batch.completion_ids, batch.completion_mask, batch.advantages)
        functions = linear_grpo_loss, grpo_loss
        return self._through_head(model, batch, functions, arguments, **options)

    def _through_head(self, model, batch, functions, arguments, **options):
        """A function of hidden states and head, or the other one of logits, of the completion."""
        of_hidden, of_logits = functions
        options["temperature"] = self.config.temperature
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self.takes_positions:  # counted from the first real token, as `generate` does
            positions = inputs["attention_mask"].cumsum(1) - 1
            inputs["position_ids"] = positions.clamp(min=0)
        inputs["logits_to_keep"] = batch.completion_ids.shape[1] + 1  # the last is ignored
        if self.config.loss_input == "logits":
            logits = model(**inputs, use_cache=False).logits
            return of_logits(logits, *arguments, **options)
        return model(
            **inputs,
            head=lambda hidden, weight, **head: of_hidden(
                hidden, weight, *arguments, **head, **options
            ),
        )


class Reference:
    """The model that the KL penalty pulls towards: the policy as it was, or as it was refreshed.

    A frozen copy; of a model with adapters no copy, but itself with the adapters switched off or,
    once refreshed, as they were then.

    Args:
        model: the policy, before it is prepared or wrapped.
        mix: share of the policy in a refreshed reference, in (0, 1].

    Raises:
        ValueError: a mix below 1 for a model with adapters, whose average is no average of models.
    """

    def __init__(self, model, mix=1.0):
        self.mix, self.adapters = mix, None
        self.model = None
        if not is_adapted(model):
            self.model = copy.deepcopy(model).eval().requires_grad_(False)
        elif mix != 1.0:
            raise ValueError(f"reference_mix must be 1 for a model with adapters, got {mix}")

    @contextlib.contextmanager
    def instead_of(self, model, policy):
        """The model to ask: the copy, or `model` (policy, as it is wrapped) with other adapters."""
        if self.model is not None:
            yield self.model
        elif self.adapters is None:
            with policy.disable_adapter():
                yield model
        else:
            with exchanged(trained(policy), self.adapters):
                yield model

    @torch.no_grad()
    def refresh(self, policy):
        """Becomes the policy, or moves towards it."""
        if self.model is None:
            self.adapters = [parameter.detach().clone() for parameter in trained(policy)]
            return
        for mine, new in zip(self.model.parameters(), policy.parameters(), strict=True):
            new = whole(new).to(mine.dtype)
            mine.copy_(new) if self.mix == 1 else mine.lerp_(new, self.mix)
        for mine, new in zip(self.model.buffers(), policy.buffers(), strict=True):
            mine.copy_(new)

    def state_dict(self):
        """Of the copy, the same on every rank, or of the adapters, each rank's own share."""
        if self.model is not None:
            return self.model.state_dict()
        return None if self.adapters is None else list(map(local, self.adapters))

    @torch.no_grad()
    def load_state_dict(self, state, policy):
        if self.model is not None:
            self.model.load_state_dict(state)
        elif state is not None:
            self.refresh(policy)  # in the policy's shape and place
            for tensor, saved in zip(self.adapters, state, strict=True):
                local(tensor).copy_(saved)


def whole(tensor):
    """What is sharded over ranks, gathered; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def local(tensor):
    """This rank's share of what is sharded; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def exchanged(parameters, others):
    """Parameters hold other values for a while, where they are: wrappers keep their memory."""

    @torch.no_grad()
    def put(values):
        for parameter, value in zip(parameters, values, strict=True):
            local(parameter).copy_(local(value))

    own = [parameter.detach().clone() for parameter in parameters]
    put(others)
    try:
        yield
    finally:
        put(own)
