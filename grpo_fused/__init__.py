"""Fused losses of the GRPO family over logits, in Triton and in plain torch."""

from grpo_fused.advantages import outcome_advantages
from grpo_fused.loss import LossOutput, grpo_loss, selective_log_softmax
from grpo_fused.objectives import LOSSES, Clip
from grpo_fused.weights import token_weights

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "Clip",
    "LossOutput",
    "grpo_loss",
    "outcome_advantages",
    "selective_log_softmax",
    "token_weights",
]
