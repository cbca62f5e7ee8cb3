"""Device function: the loss of one token from its log-probability and entropy."""

from typing import NamedTuple

import triton
import triton.language as tl

from .objective import clamped_exp
from .softmax import scalar, token_value


class TokenConstants(NamedTuple):
    """Inputs of a token's loss that do not depend on its logits; 0 where there are none."""

    advantage: tl.tensor
    w_policy: tl.tensor
    w_kl: tl.tensor
    w_entropy: tl.tensor
    grad_scale: tl.tensor
    old_logp: tl.tensor
    ref_logp: tl.tensor
    sampling_logp: tl.tensor


class TokenLoss(NamedTuple):
    """The weighted loss of a token, its derivatives times grad_scale, and terms of the metrics."""

    loss: tl.tensor
    dlogp: tl.tensor
    dkl_logp: tl.tensor  # of the KL, if it is over another softmax; else it is part of dlogp
    dentropy: tl.tensor
    kl: tl.tensor
    clipped: tl.tensor  # -1, 0 or +1
    ratio: tl.tensor


@triton.jit
def token_constants(tokens, formula, sequence, token, inside, active):
    """Load the `TokenConstants` of a token.

    Log-probabilities last, because they wait for the mask: those of a masked token may not exist.
    """
    advantage = token_value(tokens.advantages, sequence, token, inside)
    w_policy = token_value(tokens.w_policy, sequence, token, inside)
    w_kl = 0.0
    if tokens.ref_logps is not None:
        w_kl = token_value(tokens.w_kl, sequence, token, inside)
    w_entropy = 0.0
    if tokens.w_entropy is not None:
        w_entropy = token_value(tokens.w_entropy, sequence, token, inside)
    grad_scale = scalar(formula.grad_scale)
    old_logp = 0.0
    if tokens.old_logps is not None:
        old_logp = tl.load(tokens.old_logps + token, active)
    ref_logp = 0.0
    if tokens.ref_logps is not None:
        ref_logp = tl.load(tokens.ref_logps + token, active)
    sampling_logp = 0.0
    if tokens.sampling_logps is not None:
        sampling_logp = tl.load(tokens.sampling_logps + token, active)
    return TokenConstants(
        advantage, w_policy, w_kl, w_entropy, grad_scale, old_logp, ref_logp, sampling_logp
    )


@triton.jit
def has_gradient(constants):
    """Whether the loss of a token usually has a gradient: an objective may have one for A = 0."""
    policy = (constants.w_policy != 0.0) & (constants.advantage != 0.0)
    return policy | (constants.w_kl != 0.0) | (constants.w_entropy != 0.0)


@triton.jit
def weighted(weight, value):
    """weight * value; a weight of 0 drops the value, because 0 * inf is NaN."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def token_loss(logp, kl_logp, entropy, known, constants, tokens, formula):
    """The `TokenLoss` w_policy objective + w_kl KL - w_entropy H of an active token.

    Loss and derivatives are NaN if the target is not `known` to lie in the vocabulary. The
    log-probability in the KL may be over another softmax than that in the policy term.
    """
    ONE_SOFTMAX: tl.constexpr = formula.over.policy == formula.over.kl
    log_ratio = tl.where(logp == logp, 0.0, logp)
    if tokens.old_logps is not None:
        log_ratio = logp - constants.old_logp
    ratio, dratio = clamped_exp(log_ratio)
    advantage = constants.advantage
    if formula.uses_sampling:
        sampling_logp = logp
        if tokens.sampling_logps is not None:  # NaN: not known
            given = constants.sampling_logp
            sampling_logp = tl.where(given == given, given, logp)
        loss, dlogp, clipped = formula.objective(
            logp, log_ratio, advantage, sampling_logp, *formula.params
        )
    else:
        loss, dlogp, clipped = formula.objective(logp, log_ratio, advantage, *formula.params)
    loss = weighted(constants.w_policy, loss)
    dlogp = weighted(constants.w_policy, dlogp)
    dkl_logp = 0.0
    kl = 0.0
    if tokens.ref_logps is not None:
        kl, dkl, dcorrected = formula.kl_estimator(constants.ref_logp - kl_logp)
        if ONE_SOFTMAX:
            if formula.bias_correction:
                dkl = ratio * tl.where(dratio == ratio, dcorrected, dkl)
                kl *= ratio
            dlogp += weighted(constants.w_kl, dkl)
        else:
            if formula.bias_correction:
                dkl *= ratio
                dratio = tl.where(dratio == 0.0, 0.0, kl * dratio)  # not inf * 0
                dlogp += weighted(constants.w_kl, dratio)
                kl *= ratio
            dkl_logp = weighted(constants.w_kl, dkl) * constants.grad_scale
        loss += weighted(constants.w_kl, kl)
    grad_scale = constants.grad_scale
    dentropy = 0.0
    if tokens.w_entropy is not None:
        loss -= weighted(constants.w_entropy, entropy)
        dentropy = -constants.w_entropy * grad_scale
    loss = tl.where(known, loss, float("nan"))
    dlogp = tl.where(loss == loss, dlogp * grad_scale, float("nan"))
    if formula.over.policy or formula.over.kl:  # the whole row is NaN, not its support alone
        dkl_logp = tl.where(loss == loss, dkl_logp, float("nan"))
    return TokenLoss(loss, dlogp, dkl_logp, dentropy, kl, clipped, ratio)
