"""grpo_loss_from_logps: the family over log-probabilities that a trainer has made already."""

import math
from numbers import Real

import torch

from grpo_fused.checks import check_tensor
from grpo_fused.family import family_loss
from grpo_fused.sources import LogProbs
from grpo_fused.validation import check_floats


def grpo_loss_from_logps(
    logps,
    completion_mask,
    advantages,
    *,
    entropies=None,
    old_logps=None,
    ref_logps=None,
    importance_sampling_ratio=None,
    policy_mask=None,
    loss_type="dapo",
    objective=None,
    importance_sampling_level=None,
    log_ratio_bounds=None,
    normalizer=None,
    kl_normalizer=None,
    reduction="sum",
    beta=0.0,
    kl_estimator="k3",
    use_bias_correction_kl=False,
    entropy_coef=0.0,
    num_items_in_batch=None,
    num_sequences_in_batch=None,
    max_completion_length=None,
    cu_seqlens=None,
):
    """Loss of the GRPO family over log-probabilities: for trainers whose losses get no logits.

    The formula of `grpo_loss`, differentiable in logps, and in entropies under an entropy bonus.
    It is plain torch on (B, T) tensors. Where the logits are at hand `grpo_loss` makes the same
    loss without ever storing what lies between; where log-probabilities are made by
    `selective_log_softmax` or `linear_selective_log_softmax` nothing of size V is stored either.

    Args:
        logps: (B, T) float32, bfloat16 or float16, log-probabilities of the tokens under the
            policy, temperature applied; (N,) with cu_seqlens. Masked values may be anything.
        completion_mask, advantages: as `grpo_loss`.
        entropies: the shape of logps, float, entropies of the policy; needed for entropy_coef.
        log_ratio_bounds: (low, high), numbers that may be infinite: the log-ratio of the level is
            clamped to them, and has no gradient outside. None = exponentials are clamped at +-80,
            as everywhere in the package.
        All others: as `grpo_loss`.

    Returns:
        LossOutput, as `grpo_loss`; its logps and entropies are those given, detached, float32, 0
        where masked.

    Raises:
        ValueError: as `grpo_loss`; logps that are not (B, T) or, with cu_seqlens, (N,); entropies
            of another shape, or none for an entropy bonus; bounds that are no interval.

    References:
        As `grpo_loss`.

    Example:
        logps, entropies = linear_selective_log_softmax(hidden, weight, ids, mask)
        loss = grpo_loss_from_logps(logps, mask, advantages, old_logps=old_logps).loss
    """
    check_floats("logps", logps)
    if logps.dim() != (2 if cu_seqlens is None else 1):
        wanted = "(B, T)" if cu_seqlens is None else "(N,) with cu_seqlens"
        raise ValueError(f"logps must be {wanted}, got {tuple(logps.shape)}")
    if entropies is not None:
        check_tensor("entropies", entropies, tuple(logps.shape), logps.device)
    elif isinstance(entropy_coef, torch.Tensor) or entropy_coef != 0:
        raise ValueError("entropies are needed unless entropy_coef is 0, got None")
    return family_loss(
        LogProbs(logps, entropies),
        # The one column of every row: log-probabilities of tokens need no ids.
        torch.zeros(logps.shape, dtype=torch.int64, device=logps.device),
        completion_mask,
        advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        importance_sampling_ratio=importance_sampling_ratio,
        policy_mask=policy_mask,
        loss_type=loss_type,
        objective=objective,
        importance_sampling_level=importance_sampling_level,
        log_ratio_bounds=_check_bounds(log_ratio_bounds),
        normalizer=normalizer,
        kl_normalizer=kl_normalizer,
        reduction=reduction,
        beta=beta,
        kl_estimator=kl_estimator,
        use_bias_correction_kl=use_bias_correction_kl,
        temperature=1.0,
        logit_softcap=None,
        logit_scale=1.0,
        entropy_coef=entropy_coef,
        compute_entropy=entropies is not None,
        num_items_in_batch=num_items_in_batch,
        num_sequences_in_batch=num_sequences_in_batch,
        max_completion_length=max_completion_length,
        cu_seqlens=cu_seqlens,
        grad_scale=1.0,
        implementation="torch",
    )


def _check_bounds(bounds):
    if bounds is None:
        return None
    low, high = bounds if isinstance(bounds, tuple) and len(bounds) == 2 else (math.nan, math.nan)
    numbers = isinstance(low, Real) and isinstance(high, Real)
    if not (numbers and low <= high):
        raise ValueError(f"log_ratio_bounds must be (low, high) with low <= high, got {bounds!r}")
    return float(low), float(high)
