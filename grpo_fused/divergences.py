"""KL penalties per token: estimators of KL(policy || reference) from d = ref_logp - logp.

Each returns (value, derivative in logp, their sum), the sum without what cancels in it: it is the
derivative of ratio * value over the ratio. Averaged over tokens of the policy, k1, k2 and k3
estimate the divergence (Schulman, http://joschu.net/blog/kl-approx.html); their gradients differ:
that of k2 is the divergence's own on policy, so a "+" keeps a value and takes k2's gradient.
"""

import torch

from grpo_fused.kernels.objective import DIVERGENCES as KERNELS


def k1(difference):
    return -difference, torch.ones_like(difference), 1 - difference


def k2(difference):
    return difference * difference / 2, -difference, difference * (difference / 2 - 1)


def k3(difference):
    """e^d - d - 1: unbiased, never negative; the exponent is clamped to +-80."""
    inside = difference.abs() <= 80.0
    growth = torch.expm1(difference.clamp(-80.0, 80.0))  # keeps the digits of a small divergence
    derivative = torch.where(inside, -growth, 1.0)
    beyond = growth - difference + 1.0
    return growth - difference, derivative, torch.where(inside, -difference, beyond)


def absolute(difference):
    value, sign = difference.abs(), difference.sign()
    return value, -sign, value - sign


def _straight_through(estimator):
    def with_gradient_of_k2(difference):
        value = estimator(difference)[0]
        return value, -difference, value - difference

    return with_gradient_of_k2


def corrected(divergence, difference, ratio, dratio):
    """(value, derivative in logp) of a divergence times a ratio, whose derivative is it or 0."""
    value, derivative, both = divergence(difference)
    return value * ratio, ratio * torch.where(dratio == ratio, both, derivative)


def weighted(weight, value):
    """weight * value, exactly 0 where the weight is: an infinite KL without weight is no loss."""
    if isinstance(weight, torch.Tensor):
        return torch.where(weight == 0.0, 0.0, weight * value)
    return weight * value if weight else torch.zeros_like(value)


DIVERGENCES = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "abs": absolute,
    "k1+": _straight_through(k1),
    "k3+": _straight_through(k3),
    "abs+": _straight_through(absolute),
}
assert DIVERGENCES.keys() == KERNELS.keys()
