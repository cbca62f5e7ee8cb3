"""The KL penalty of a token, with the bounds that trainers put on it."""

import math

import torch
from torch import Tensor

from grpo_fused.checks import NUMBERS, active_tokens, check_choice, check_tensor
from grpo_fused.losses.kl import KL_ESTIMATORS, corrected
from grpo_fused.losses.objectives import clamped_exp
from grpo_fused.losses.on_logps import Derivative


def kl_penalty(
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor | None = None,
    *,
    kl_estimator: str = "k3",
    old_logps: Tensor | None = None,
    use_bias_correction_kl: bool = False,
    max_difference: float | None = None,
    max_kl: float | None = None,
) -> Tensor:
    """KL penalty per token, as a trainer has it that bounds it.

        d = min(max(ref_logps - logps, -max_difference), max_difference)
        kl = min(max(rho k(d), -max_kl), max_kl)
        rho = exp(logps - old_logps) with use_bias_correction_kl, otherwise 1

    with the estimator k of `grpo_loss`, which has this term without bounds. Where a bound holds the
    gradient is 0, also that of rho; an estimator with "+" keeps rho times the gradient of k2 there.
    verl's low_var_kl is k3 with max_difference=20, max_kl=10, and its low_var_kl+ is k3+ with the
    same. NeMo-RL's KL is k3 with these bounds and use_bias_correction_kl: over the generator
    (old_logps) with use_on_policy_kl_approximation, on policy without. slime's low_var_kl and
    OpenRLHF's estimators have max_kl=10.

    Args:
        logps: (B, T) or (N,) float, log-probabilities of the tokens under the policy; masked
            values may be anything.
        ref_logps: of the shape of logps, under the reference model.
        mask: of the shape of logps, nonzero = active; None = all active.
        kl_estimator: "k1", "k2", "k3", "abs", "k1+", "k3+" or "abs+".
        old_logps: of the shape of logps, of the policy that sampled, for rho; None = on policy: rho
            is 1, and its gradient is not 0. Ignored without use_bias_correction_kl.
        use_bias_correction_kl: whether the KL is multiplied by rho.
        max_difference, max_kl: numbers > 0; None = exponents are clamped at +-80, and nothing else.

    Returns:
        float32 of the shape of logps, exactly 0 where masked, differentiable in logps.

    Raises:
        ValueError: mismatched shapes or devices; an unknown kl_estimator; a bound that is not a
            number > 0.

    Example:
        kl = kl_penalty(logps, ref_logps, mask, max_difference=20.0, max_kl=10.0)
        loss = out.loss + beta * (token_weights(mask, "token-mean") * kl).sum()
    """
    check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    for name, bound in (("max_difference", max_difference), ("max_kl", max_kl)):
        if bound is not None and not (isinstance(bound, NUMBERS) and bound > 0):
            raise ValueError(f"{name} must be a number > 0 or None, got {bound!r}")
    check_tensor("logps", logps)
    others = {"ref_logps": ref_logps}
    if old_logps is not None and use_bias_correction_kl:
        others["old_logps"] = old_logps
    for name, tensor in others.items():
        check_tensor(name, tensor, tuple(logps.shape), logps.device)
    active = active_tokens(mask, logps)
    with torch.no_grad():
        # Masked values are selected away before arithmetic, where they could be NaN.
        now, reference = (torch.where(active, x.float(), 0.0) for x in (logps, ref_logps))
        free = reference - now
        limit = math.inf if max_difference is None else max_difference
        difference = free.clamp(-limit, limit)
        estimator = KL_ESTIMATORS[kl_estimator]
        value, slope, _ = estimator(difference)
        if use_bias_correction_kl:
            old = now if old_logps is None else torch.where(active, old_logps.float(), 0.0)
            ratio, dratio = clamped_exp(now - old)
            value, slope = corrected(estimator, difference, ratio, dratio)
        outside = free.abs() > limit
        if max_kl is not None:
            outside = outside | (value.abs() > max_kl)
            value = value.clamp(-max_kl, max_kl)
        straight = -free if kl_estimator.endswith("+") else torch.zeros_like(free)
        straight = ratio * straight if use_bias_correction_kl else straight
        slope = torch.where(outside, straight, slope)
        value, slope = (torch.where(active, x, 0.0) for x in (value, slope))
    return Derivative.apply(logps.float(), value, slope)
