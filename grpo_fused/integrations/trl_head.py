"""What the fused TRL trainers share: the LM head, and when TRL computes in place of us."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_fused import linear_selective_log_softmax
from grpo_fused.integrations.transformers import (
    base_model,
    fuse_lm_head,
    why_no_router_loss,
    why_not_fused,
)
from grpo_fused.integrations.trl_compare import Comparison
from grpo_fused.integrations.trl_versions import (
    IS_NEWER,
    LIGER_HAS_LOSS,
    LUSPO_SUMS_TOKENS,
    returns_aux_loss,
    why_signatures_differ,
)

# Inputs of text-only models. With any other input, TRL computes the log-probabilities.
TEXT_INPUTS = {
    *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "advantages"),
    *("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps", "old_logps"),
    *("importance_sampling_ratio", "num_items_in_batch"),
}


class FusedHead:
    """The LM head of a TRL trainer, fused: a base class in front of the trainer's own.

    A subclass implements `_fused_loss(model, inputs)` and `_why_trl_loss(inputs)`.
    """

    _fused_loss: Callable[..., Tensor]
    _why_trl_loss: Callable[..., str | None]
    # Of TRL's trainers and their base class.
    model: Any
    ref_model: Any
    args: Any
    accelerator: Any
    temperature: float

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if LIGER_HAS_LOSS and getattr(self.args, "use_liger_kernel", False):
            raise ValueError(
                "use_liger_kernel must be False, because it selects Liger's loss; got True"
            )
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "model must have a parameter that requires a gradient, got none: TRL would train "
                "nothing without saying so. An adapter is loaded for training with "
                "PeftModel.from_pretrained(..., is_trainable=True)"
            )
        self._warned = set()
        self._comparison = Comparison(self)
        # TRL has wrapped the reference model by now: FSDP and DeepSpeed gather weights in the
        # forward of the wrapper.
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        models = [base_model(self.accelerator.unwrap_model(model)) for model in models]
        self._why_unfused = self._why_not_fused(models)
        if self._why_unfused:
            return
        for model in models:
            fuse_lm_head(model)

    @classmethod
    def _trl_class(cls) -> type:
        """The trainer of TRL that is overridden."""
        bases = inspect.getmro(cls)
        return bases[bases.index(FusedHead) + 1]

    def _why_not_fused(self, models) -> str | None:
        if IS_NEWER and (reason := why_signatures_differ(self._trl_class())):
            return reason
        config = getattr(self.model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            return "prompt-learning adapters shift the positions of the hidden states"
        if self.args.torch_compile:
            return "torch_compile=True would recompile the forward for every batch"
        if self.args.n_gpu > 1:
            return "DataParallel would split the hidden states but not the other loss inputs"
        if any(len(set(getattr(m, "hf_device_map", {}).values())) > 1 for m in models):
            return "the model is split over several devices"
        if reason := next((reason for model in models if (reason := why_not_fused(model))), None):
            return reason
        return why_no_router_loss(models[0]) if self._has_aux_loss else None

    def _backbone(self, model):
        """The part of a wrapped model that returns hidden states."""
        return base_model(self.accelerator.unwrap_model(model)).base_model

    def _warn_fallback(self, reason: str) -> None:
        """Warn, once per reason, that TRL computes the loss."""
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"TRL computes the loss, without grpo_fused: {reason}", stacklevel=3)

    @property
    def _has_aux_loss(self) -> bool:
        return getattr(self, "aux_loss_enabled", False)

    @property
    def _has_entropy_bonus(self) -> bool:
        return getattr(self, "_entropy_bonus_enabled", False)

    @property
    def _upcast(self) -> bool:
        return getattr(self.args, "cast_lm_head_to_fp32", False)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _compute_loss(self, model, inputs, *others, **options):
        """Compute the loss of a micro-batch, scaled for accumulation, and log its metrics."""

        def of_trl(model, inputs):
            return super(FusedHead, self)._compute_loss(model, inputs, *others, **options)

        if self._why_unfused or others or options or self._why_trl_loss(inputs):
            return of_trl(model, inputs)
        if self._comparison.is_open:
            self._why_unfused = self._comparison.of_losses(self._fused_loss, of_trl, model, inputs)
            if self._why_unfused:
                self._warn_fallback(self._why_unfused)
                return of_trl(model, inputs)
        return self._fused_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        **others,
    ):
        """Compute (log-probabilities (B, T), entropies (B, T) or None), from TRL 1.7 on a third.

        That is the loss of the router of a mixture of experts, (), or None.
        """
        compute_aux_loss = others.pop("compute_aux_loss", False)
        given = {name: value for name, value in others.items() if value is not None}
        returns_three = returns_aux_loss(self._trl_class())

        def of_trl(model, input_ids, attention_mask):
            options = {"compute_aux_loss": compute_aux_loss} if returns_three else {}
            return super(FusedHead, self)._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                **options,
                **others,
            )

        def ours(model, input_ids, attention_mask):
            found = self._score(
                *(model, input_ids, attention_mask, logits_to_keep, batch_size or len(input_ids)),
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
            )
            return found if returns_three else found[:2]

        rows = (model, input_ids, attention_mask)
        if not (self._why_unfused or given) and self._comparison.is_open:
            self._why_unfused = self._comparison.of_scores(ours, of_trl, *rows, logits_to_keep)
        if self._comparison.runs_trl:
            return of_trl(*rows)
        if self._why_unfused or given:
            self._warn_fallback(self._why_unfused or "the inputs are not text only")
            return of_trl(*rows)
        return ours(*rows)

    def _score(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size,
        *,
        compute_entropy,
        compute_aux_loss,
    ):
        """Return (log-probabilities, entropies or None, loss of the router or None)."""
        # LUSPO of TRL before 1.10 reads masked tokens too.
        ignores_mask = not LUSPO_SUMS_TOKENS and getattr(self, "loss_type", None) == "luspo"
        parts, aux_losses = [], []
        for ids, mask in zip(
            input_ids.split(batch_size), attention_mask.split(batch_size), strict=True
        ):

            def head(hidden, weight, *, ids=ids, mask=mask, **head):
                return linear_selective_log_softmax(
                    hidden,
                    weight,
                    ids[:, -logits_to_keep:],
                    None if ignores_mask else mask[:, -logits_to_keep:],
                    temperature=self.temperature,
                    compute_entropy=compute_entropy,
                    upcast=self._upcast,
                    **head,
                )

            part, aux_loss = self._forward(model, ids, mask, logits_to_keep, head, compute_aux_loss)
            parts.append(part)
            aux_losses.append(aux_loss)
        logps, entropies = torch.cat([logps for logps, _ in parts]), None
        if compute_entropy:
            entropies = torch.cat([entropies for _, entropies in parts])
            # TRL's have a gradient where its loss has an entropy bonus.
            entropies = entropies if self._has_entropy_bonus else entropies.detach()
        return logps, entropies, torch.stack(aux_losses).mean() if compute_aux_loss else None

    def _forward(self, model, input_ids, attention_mask, logits_to_keep, head, aux_loss=False):
        """Return (the result of the head, the loss of the router or None)."""
        options = {"output_router_logits": True} if aux_loss else {}
        with self.accelerator.autocast():
            found = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_to_keep=logits_to_keep + 1,
                head=head,
                **options,
            )
        return found if aux_loss else (found, None)


def has_other_inputs(inputs) -> bool:
    """Return whether a micro-batch has inputs of models that are not text-only."""
    return any(inputs[name] is not None for name in inputs.keys() - TEXT_INPUTS)
