"""Token-level estimators of KL(policy || reference) from d = ref_logp - logp.

Each returns (value, derivative in logp, sum of both). The sum is d (ratio * value) / d logp divided
by the ratio, computed without cancellation.

k1, k2 and k3 estimate the divergence from tokens sampled by the policy (Schulman,
http://joschu.net/blog/kl-approx.html). On policy, the gradient of k2 is that of the divergence; "+"
combines the value of an estimator with it. `grpo_fused.kernels.objective` has the same estimators
for the kernels.
"""

import torch

from grpo_fused.kernels.objective import KL_ESTIMATORS as KERNELS


def k1(difference):
    return -difference, torch.ones_like(difference), 1 - difference


def k2(difference):
    return difference * difference / 2, -difference, difference * (difference / 2 - 1)


def k3(difference):
    """e^d - d - 1, unbiased and nonnegative, with the exponent clamped to +-80.

    The derivative is 0 for d > 80, where the clamp leaves only the linear term, whose gradient
    increases the distance to the reference.
    """
    cut = difference > 80.0
    inside = difference.abs() <= 80.0
    growth = torch.expm1(difference.clamp(-80.0, 80.0))  # accurate for small d
    value = growth - difference
    derivative = torch.where(inside, -growth, torch.where(cut, 0.0, 1.0))
    return value, derivative, torch.where(inside, -difference, value + derivative)


def absolute(difference):
    value, sign = difference.abs(), difference.sign()
    return value, -sign, value - sign


def _straight_through(estimator):
    def with_gradient_of_k2(difference):
        value = estimator(difference)[0]
        return value, -difference, value - difference

    return with_gradient_of_k2


def corrected(estimator, difference, ratio, dratio):
    """(value, derivative in logp) of a KL estimator times a ratio with derivative dratio."""
    value, derivative, both = estimator(difference)
    return value * ratio, ratio * torch.where(dratio == ratio, both, derivative)


def weighted(weight, value):
    """weight * value, and 0 where the weight is 0, even if the value is infinite or NaN."""
    if isinstance(weight, torch.Tensor):
        return (weight * value).masked_fill(weight == 0.0, 0.0)
    return weight * value if weight else torch.zeros_like(value)


KL_ESTIMATORS = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "abs": absolute,
    "k1+": _straight_through(k1),
    "k3+": _straight_through(k3),
    "abs+": _straight_through(absolute),
}
assert KL_ESTIMATORS.keys() == KERNELS.keys()
