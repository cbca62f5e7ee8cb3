"""TRL's asynchronous GRPO trainer with the LM head and its log-probabilities fused.

from grpo_fused.integrations.trl import FusedAsyncGRPOTrainer as AsyncGRPOTrainer
"""

import functools
import types
from typing import TYPE_CHECKING

from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.trainer import utils as trl_utils

from grpo_fused import linear_selective_log_softmax
from grpo_fused.integrations.transformers import base_model, fuse_lm_head, why_no_router_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

if not hasattr(trl_utils, "add_fused_lm_head"):
    raise ImportError(
        "FusedAsyncGRPOTrainer replaces trl.trainer.utils.add_fused_lm_head, which TRL has from "
        "1.15 on"
    )


class FusedAsyncGRPOTrainer(AsyncGRPOTrainer):
    """`trl.experimental.async_grpo.AsyncGRPOTrainer` on fused log-probabilities and entropies.

    The loss is TRL's own, which is one of packed tokens on log-probabilities: `fuse_log_probs`
    replaces the head below it.

    Arguments, attributes and methods are those of `AsyncGRPOTrainer`.

    Raises:
        ValueError: the LM head, or the loss of the router, cannot be fused.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        fuse_log_probs(base_model(self.model), temperature=self.temperature)


def fuse_log_probs(
    model: "PreTrainedModel", *, temperature: float = 1.0, upcast: bool = False
) -> None:
    """Compute what `trl.trainer.utils.add_fused_lm_head` adds to a model by our head.

    `model(..., labels=labels, fused_lm_head=True)` then returns the `FusedCausalLMOutput` of TRL
    with `log_probs`, `entropy`, `loss` and, with output_router_logits=True, `aux_loss`: (B, L - 1),
    or (B, L) of shift_labels, 0 where the label is -100. All else is the model's forward. Trainers
    that read other fields (SFT and DPO `is_top1`, DPO and KTO `mean_logits`) need TRL's.

    Args:
        model: transformers model, before DDP, FSDP, peft or Accelerate wraps it, or after; with or
            without TRL's head.
        temperature: the logits are divided by it.
        upcast: as `linear_grpo_loss`.

    Raises:
        ValueError: the LM head cannot be fused: see `fuse_lm_head`; a mixture of experts whose
            router has a loss that is not known.
    """
    text_config = model.config.get_text_config()
    has_router = hasattr(text_config, "output_router_logits")
    if has_router and (reason := why_no_router_loss(model)):
        raise ValueError(f"the LM head of model cannot be fused: {reason}")
    fuse_lm_head(model)
    original = model.forward.__func__  # not bound: a deep copy of the model copies the patch too

    @functools.wraps(type(model).forward)  # `generate` inspects the signature
    def forward(
        self,
        *args,
        fused_lm_head=False,
        labels=None,
        shift_labels=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        given = {"labels": labels, "shift_labels": shift_labels}
        given |= {"num_items_in_batch": num_items_in_batch}
        given = {name: value for name, value in given.items() if value is not None}
        if not fused_lm_head:
            return original(self, *args, **given, **kwargs)
        targets = labels[:, 1:] if shift_labels is None else shift_labels
        mask = targets != -100

        def head(hidden, weight, **scaling):
            return linear_selective_log_softmax(
                hidden[:, : targets.shape[1]],
                weight,
                targets,
                mask,
                temperature=temperature,
                compute_entropy=True,
                upcast=upcast,
                **scaling,
            )

        if getattr(text_config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        found, aux_loss = original(self, *args, head=head, **kwargs), None
        if kwargs.get("output_router_logits"):
            found, aux_loss = found
        log_probs, entropy = found
        items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -log_probs.sum() / items
        if aux_loss is not None:
            loss = loss + getattr(text_config, "router_aux_loss_coef", 0.0) * aux_loss
        return trl_utils.FusedCausalLMOutput(
            loss=loss, log_probs=log_probs, entropy=entropy, label_mask=mask, aux_loss=aux_loss
        )

    forward.fused_lm_head = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
