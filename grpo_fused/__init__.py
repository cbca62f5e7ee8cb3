"""Fused losses of the GRPO family over logits, in Triton and in plain torch."""

from grpo_fused.advantages import (
    gae_advantages,
    mask_truncated,
    outcome_advantages,
    process_advantages,
    whiten,
)
from grpo_fused.corrections import entropy_quantile_mask, off_policy_mask, rollout_weights
from grpo_fused.family import LossOutput
from grpo_fused.from_logps import grpo_loss_from_logps
from grpo_fused.linear import linear_grpo_loss, linear_selective_log_softmax
from grpo_fused.logprob import selective_log_softmax
from grpo_fused.loss import grpo_loss
from grpo_fused.losses import LOSSES
from grpo_fused.objectives import Cispo, Clip, PolicyGradient, Sapo
from grpo_fused.sequence_objectives import Gmpo, Vespo
from grpo_fused.weights import token_weights

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "Cispo",
    "Clip",
    "Gmpo",
    "LossOutput",
    "PolicyGradient",
    "Sapo",
    "Vespo",
    "entropy_quantile_mask",
    "gae_advantages",
    "grpo_loss",
    "grpo_loss_from_logps",
    "linear_grpo_loss",
    "linear_selective_log_softmax",
    "mask_truncated",
    "off_policy_mask",
    "outcome_advantages",
    "process_advantages",
    "rollout_weights",
    "selective_log_softmax",
    "token_weights",
    "whiten",
]
