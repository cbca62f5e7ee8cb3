"""Fused losses of the GRPO family over logits, in Triton and in plain torch."""

from importlib import import_module
from typing import TYPE_CHECKING

try:
    import grpo_fused.kernels  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "this grpo_fused lies in a checkout, apart from its kernels: import the installed package "
        "from another folder, or link them with `pip install -e .`"
    ) from error

from grpo_fused.advantages import (
    mask_truncated,
    multi_reward_advantages,
    outcome_advantages,
    pass_at_k_advantages,
    process_advantages,
)
from grpo_fused.corrections import entropy_quantile_mask, off_policy_mask, rollout_weights
from grpo_fused.functional import (
    grpo_loss,
    grpo_loss_from_logps,
    linear_grpo_loss,
)
from grpo_fused.log_softmax import linear_selective_log_softmax, selective_log_softmax
from grpo_fused.loss import LossOutput
from grpo_fused.losses import LOSSES
from grpo_fused.losses.batch_objectives import ClipCov, KlCov, M2po
from grpo_fused.losses.objectives import Cispo, Clip, PolicyGradient, Sapo
from grpo_fused.losses.off_policy_objectives import (
    DppoKl,
    DppoTv,
    Dro,
    ImportanceSampling,
    Ipo,
    RolloutIs,
)
from grpo_fused.losses.penalty import kl_penalty
from grpo_fused.losses.sequence_objectives import Fipo, Gmpo, Topr, Vespo
from grpo_fused.losses.weights import token_weights
from grpo_fused.ppo import (
    ValueLossOutput,
    gae_advantages,
    kl_rewards,
    value_loss,
    value_metrics,
    whiten,
)
from grpo_fused.selections import covariance_mask, second_moment_mask
from grpo_fused.support import sampling_support, support_from_mask

if TYPE_CHECKING:
    from grpo_fused.trainer import GRPOTrainer as GRPOTrainer
    from grpo_fused.trainer import GRPOTrainerConfig as GRPOTrainerConfig

__version__ = "0.2.0"

__all__ = [
    "LOSSES",
    "Cispo",
    "Clip",
    "ClipCov",
    "DppoKl",
    "DppoTv",
    "Dro",
    "Fipo",
    "Gmpo",
    "ImportanceSampling",
    "Ipo",
    "KlCov",
    "LossOutput",
    "M2po",
    "PolicyGradient",
    "RolloutIs",
    "Sapo",
    "Topr",
    "ValueLossOutput",
    "Vespo",
    "covariance_mask",
    "entropy_quantile_mask",
    "gae_advantages",
    "grpo_loss",
    "grpo_loss_from_logps",
    "kl_penalty",
    "kl_rewards",
    "linear_grpo_loss",
    "linear_selective_log_softmax",
    "mask_truncated",
    "multi_reward_advantages",
    "off_policy_mask",
    "outcome_advantages",
    "pass_at_k_advantages",
    "process_advantages",
    "rollout_weights",
    "sampling_support",
    "second_moment_mask",
    "selective_log_softmax",
    "support_from_mask",
    "token_weights",
    "value_loss",
    "value_metrics",
    "whiten",
]

# Names that need the extra [train] are imported on first use.
LAZY = {"GRPOTrainer": "grpo_fused.trainer", "GRPOTrainerConfig": "grpo_fused.trainer"}


def __getattr__(name):
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(LAZY[name]), name)
