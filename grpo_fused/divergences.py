"""KL penalties per token: estimators of KL(policy || reference) from d = ref_logp - logp.

Each returns (value, derivative in logp). Averaged over tokens of the policy, k1, k2 and k3 estimate
the divergence (Schulman, http://joschu.net/blog/kl-approx.html); their gradients differ: that of k2
is the divergence's own on policy, so a "+" keeps a value and takes the gradient of k2 instead.
"""

import torch

from grpo_fused.kernels.objective import DIVERGENCES as KERNELS


def k1(difference):
    return -difference, torch.ones_like(difference)


def k2(difference):
    return difference * difference / 2, -difference


def k3(difference):
    """e^d - d - 1: unbiased, never negative; the exponent is clamped to +-80."""
    inside = difference.abs() <= 80.0
    growth = torch.expm1(difference.clamp(-80.0, 80.0))  # keeps the digits of a small divergence
    return growth - difference, torch.where(inside, -growth, 1.0)


def absolute(difference):
    return difference.abs(), -difference.sign()


def _straight_through(estimator):
    return lambda difference: (estimator(difference)[0], -difference)


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
