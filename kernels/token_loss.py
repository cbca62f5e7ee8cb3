"""Device function: the loss of one token from its log-probability and entropy."""

from typing import NamedTuple

import triton
import triton.language as tl

from .objective import clamped_exp
from .softmax import scalar, token_value


class TokenLoss(NamedTuple):
    """The weighted loss of a token, its derivatives times grad_scale, and terms of the metrics."""

    loss: tl.tensor
    dlogp: tl.tensor
    dentropy: tl.tensor
    kl: tl.tensor
    clipped: tl.tensor  # -1, 0 or +1
    ratio: tl.tensor


@triton.jit
def weighted(weight, value):
    """weight * value; a weight of 0 drops the value, because 0 * inf is NaN."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def token_loss(logp, entropy, known, token, tokens, formula):
    """The `TokenLoss` w_policy objective + w_kl KL - w_entropy H of an active token.

    Loss and derivative are NaN if the target is not `known` to lie in the vocabulary.
    """
    log_ratio = tl.where(logp == logp, 0.0, logp)
    if tokens.old_logps is not None:
        log_ratio = logp - tl.load(tokens.old_logps + token)
    ratio, dratio = clamped_exp(log_ratio)
    advantage = token_value(tokens.advantages, token)
    loss, dlogp, clipped = formula.objective(logp, log_ratio, advantage, *formula.params)
    w_policy = token_value(tokens.w_policy, token)
    loss = weighted(w_policy, loss)
    dlogp = weighted(w_policy, dlogp)
    kl = 0.0
    if tokens.ref_logps is not None:
        kl, dkl, dcorrected = formula.kl_estimator(tl.load(tokens.ref_logps + token) - logp)
        if formula.bias_correction:
            dkl = ratio * tl.where(dratio == ratio, dcorrected, dkl)
            kl *= ratio
        w_kl = token_value(tokens.w_kl, token)
        loss += weighted(w_kl, kl)
        dlogp += weighted(w_kl, dkl)
    grad_scale = scalar(formula.grad_scale)
    dentropy = 0.0
    if tokens.w_entropy is not None:
        w_entropy = token_value(tokens.w_entropy, token)
        loss -= weighted(w_entropy, entropy)
        dentropy = -w_entropy * grad_scale
    loss = tl.where(known, loss, float("nan"))
    dlogp = tl.where(loss == loss, dlogp * grad_scale, float("nan"))
    return TokenLoss(loss, dlogp, dentropy, kl, clipped, ratio)
