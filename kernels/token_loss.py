"""Device functions for the loss of one token, made from its log-probability and entropy."""

import triton
import triton.language as tl

from .objective import clamped_exp
from .online_softmax import scalar, token_value


@triton.jit
def _policy(
    logp, log_ratio, advantage, ratios, policy_mask, knobs, sequence, token, OBJECTIVE: tl.constexpr
):
    """(loss, derivative in logp, clipped) of the policy term: objective, correction, mask."""
    loss, dlogp, clipped = OBJECTIVE(logp, log_ratio, advantage, *knobs)
    if ratios is not None:
        correction = token_value(ratios, sequence, token)
        loss *= correction
        dlogp *= correction
    if policy_mask is not None:
        on = token_value(policy_mask, sequence, token) != 0.0
        loss = tl.where(on, loss, 0.0)
        dlogp = tl.where(on, dlogp, 0.0)
    return loss, dlogp, clipped


@triton.jit
def _weight(items, divisor, sequence, token):
    return 1.0 / (tl.maximum(token_value(items, sequence, token), 1.0) * scalar(divisor))


@triton.jit
def token_loss(
    logp,
    entropy,
    known,
    sequence,
    token,
    advantages,
    old_logps_ptr,
    ref_logps_ptr,
    ratios,
    policy_mask,
    items,
    divisor,
    kl_items,
    kl_divisor,
    entropy_items,
    entropy_coef,
    beta,
    grad_scale,
    knobs,
    OBJECTIVE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
):
    """(loss, its derivatives in logp and entropy times grad_scale, KL, clipped, ratio).

    The loss is weighted; it and its derivative are NaN if the target is not known. Arguments are
    those of `fused_loss.fused_loss`.
    """
    log_ratio = tl.where(logp == logp, 0.0, logp)
    if old_logps_ptr is not None:
        log_ratio = logp - tl.load(old_logps_ptr + token)
    ratio, dratio = clamped_exp(log_ratio)
    loss, dlogp, clipped = _policy(
        logp,
        log_ratio,
        token_value(advantages, sequence, token),
        ratios,
        policy_mask,
        knobs,
        sequence,
        token,
        OBJECTIVE,
    )
    weight = _weight(items, divisor, sequence, token)
    loss *= weight
    dlogp *= weight
    kl = 0.0
    if ref_logps_ptr is not None:
        kl, dkl, both = DIVERGENCE(tl.load(ref_logps_ptr + token) - logp)
        if BIAS_CORRECTION:
            dkl = ratio * tl.where(dratio == ratio, both, dkl)
            kl *= ratio
        penalty = scalar(beta) * _weight(kl_items, kl_divisor, sequence, token)
        loss += tl.where(penalty == 0.0, 0.0, penalty * kl)  # 0 * inf is no loss
        dlogp += tl.where(penalty == 0.0, 0.0, penalty * dkl)
    dentropy = 0.0
    if entropy_coef is not None:
        bonus = scalar(entropy_coef) * _weight(entropy_items, 1.0, sequence, token)
        loss -= bonus * entropy
        dentropy = -bonus * scalar(grad_scale)
    loss = tl.where(known, loss, float("nan"))
    dlogp = tl.where(loss == loss, dlogp * scalar(grad_scale), float("nan"))
    return loss, dlogp, dentropy, kl, clipped, ratio
