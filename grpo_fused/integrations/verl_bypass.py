"""Rollout correction inside a policy loss: what verl's loss_mode "bypass_mode" does before it.

In that mode the rollout's log-probabilities stand for the old ones, and weights and rejections
compare the current policy with the rollout. They and their metrics are computed by verl's own
`rollout_corr_helper`: every option of `policy_loss.rollout_correction` means what it means there.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from grpo_fused.checks import check_choice

if TYPE_CHECKING:
    from verl.trainer.config.algorithm import RolloutCorrectionConfig
    from verl.workers.config import ActorConfig

LOSS_TYPES = ("ppo_clip", "reinforce")


class Correction(NamedTuple):
    """What is corrected for the distance between the policy and the rollout.

    Attributes:
        mask: (B, T), 0 where a token is rejected or was masked.
        weights: (B, T) importance weights, without a gradient; None = 1.
        metrics: rollout_corr/* of verl.
    """

    mask: torch.Tensor
    weights: torch.Tensor | None
    metrics: dict[str, float]


def correction_options(config: "ActorConfig") -> "RolloutCorrectionConfig":
    """Return policy_loss.rollout_correction of an actor's configuration.

    Raises:
        ValueError: it is missing, or its loss_type is not one of LOSS_TYPES.
    """
    options = config.policy_loss.get("rollout_correction", None)
    if options is None:
        raise ValueError("policy_loss.rollout_correction is required for bypass_mode, got None")
    kind = options.get("loss_type", "ppo_clip")
    check_choice("policy_loss.rollout_correction.loss_type", kind, LOSS_TYPES)
    return options


@torch.no_grad()
def correct(
    options: "RolloutCorrectionConfig",
    log_prob: torch.Tensor,
    rollout_log_prob: torch.Tensor,
    response_mask: torch.Tensor,
) -> Correction:
    """Compute weights and rejections of a micro-batch.

    Without an active token, where verl's function raises, nothing is corrected, unless weights are
    normalized over ranks that would wait for each other.

    Args:
        options: of `correction_options`.
        log_prob: (B, T), of the current policy; masked values may be anything.
        rollout_log_prob: (B, T), of the policy that sampled.
        response_mask: (B, T), nonzero = active.

    Raises:
        ValueError, TypeError: options that verl refuses.
    """
    from verl.trainer.ppo import rollout_corr_helper

    normalizes = options.get("rollout_is_batch_normalize", False)
    active = response_mask != 0
    if not normalizes and not active.any():
        return Correction(response_mask, None, {})
    # verl multiplies by the mask, and NaN times 0 is NaN.
    old, rollout = (torch.where(active, x.float(), 0.0) for x in (log_prob, rollout_log_prob))
    weights, mask, metrics = rollout_corr_helper.compute_rollout_correction_and_rejection_mask(
        old_log_prob=old,
        rollout_log_prob=rollout,
        response_mask=active.to(response_mask.dtype),
        rollout_is=options.get("rollout_is", None),
        rollout_is_threshold=options.get("rollout_is_threshold", 2.0),
        rollout_is_batch_normalize=normalizes,
        rollout_rs=options.get("rollout_rs", None),
        rollout_rs_threshold=options.get("rollout_rs_threshold", None),
    )
    weights = None if weights is None else weights.batch["rollout_is_weights"]
    return Correction(mask, weights, metrics)
