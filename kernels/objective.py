"""Device arithmetic of one token: exponentials, KL estimators, and the table of objectives.

An objective is a jit function `per_token(logp, log_ratio, advantage, *params)` that returns
(loss, d loss / d logp, clipped), clipped being -1, 0 or +1. A KL estimator takes d = ref - logp
and returns (value, derivative in logp, their sum): the sum is the derivative of ratio * value
divided by the ratio, whose large terms cancel for k3. Kernels receive these functions as
constexprs. An op of torch.library cannot carry a function, so launchers take names, which
OBJECTIVES and KL_ESTIMATORS resolve.
"""

import importlib.util
from typing import Any, NamedTuple

HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton.language as tl
    from triton import jit
else:  # macOS, Windows: objectives can be defined, the torch backend runs them
    tl = None

    def jit(function):
        return function


OBJECTIVES = {}  # name -> per_token, filled when objective classes are defined
# Filled by `grpo_fused.losses.metrics`.
SUMS = {}  # name -> jit function of the terms of a token
MEANS = {}  # name -> (numerator, denominator), each the sums whose bits are set


class Terms(NamedTuple):
    """Summands of the sums, 0 where masked.

    Ratios are per sequence at sequence level with advantages (B,), otherwise per token.
    """

    loss: Any  # per token; weighted, or unweighted for reduction="none"
    kl: Any  # per token
    entropy: Any  # per token
    token: Any  # 1 per active token
    clipped: Any  # per ratio: -1, 0, +1
    ratio: Any  # per ratio
    unit: Any  # 1 per active ratio


@jit
def exp(x):
    """e^x to one rounding: 2^x alone would carry the rounding of x log2(e), 7e-6 at x = 80."""
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    part = tl.fma(x, 1.4426950216293335, -whole)
    part = tl.fma(x, 1.92596298909109e-8, part)
    return tl.exp2(part) * tl.exp2(whole)


@jit
def lesser(a, b):
    """Minimum that is NaN if either is, as in torch."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def greater(a, b):
    """Maximum that is NaN if either is, as in torch."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def clamped_exp(x):
    """(e^clamp(x, -80, 80), its derivative): the derivative is 0 outside the clamp."""
    value = exp(lesser(greater(x, -80.0), 80.0))
    return value, tl.where(tl.abs(x) <= 80.0, value, 0.0)


@jit
def k1(difference):
    return -difference, 1.0, 1.0 - difference


@jit
def k2(difference):
    return difference * difference / 2, -difference, difference * (difference / 2 - 1)


@jit
def k3(difference):
    """Schulman's k3 estimator e^d - d - 1.

    Near 0 the three terms cancel; the series keeps every digit of a small KL.
    """
    value, derivative = clamped_exp(difference)
    d = difference
    series = 1 + d / 8 * (1 + d / 9 * (1 + d / 10 * (1 + d / 11 * (1 + d / 12))))
    series = 1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7 * series))))
    near = tl.abs(d) < 1.0
    slope_series = 1 + d / 2 * series
    # Where the exponential is cut, the linear term alone would push logp away from the reference.
    cut = d > 80.0
    return (
        tl.where(near, d * d / 2 * series, value - d - 1.0),
        tl.where(near, -d * slope_series, tl.where(cut, 0.0, 1.0 - derivative)),
        (value - derivative) - d,  # where it is cut, the missing -1 is below the rounding of e^80
    )


@jit
def absolute(difference):
    sign = tl.where(difference > 0.0, 1.0, tl.where(difference < 0.0, -1.0, difference))
    return tl.abs(difference), -sign, tl.abs(difference) - sign


@jit
def k1_straight_through(difference):
    return -difference, -difference, -2 * difference


@jit
def k3_straight_through(difference):
    value = k3(difference)[0]
    return value, -difference, value - difference


@jit
def absolute_straight_through(difference):
    value = tl.abs(difference)
    return value, -difference, value - difference


KL_ESTIMATORS = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "abs": absolute,
    "k1+": k1_straight_through,
    "k3+": k3_straight_through,
    "abs+": absolute_straight_through,
}
