"""Metrics of a batch: additive sums, and the means computed from them.

`LossOutput.sums` is a float32 vector with one entry per name of SUMS. Sum it over ranks and
micro-batches, then call `means(sums)` for the exact means of the full batch. Reduce `ratio/max`
separately, with a maximum.

A sum is defined by a function of the `Terms` of a token or ratio, which runs both on tensors and as
a jit function in the kernel. A new metric is one such function, and a row in SUMS and MEANS.
"""

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_fused.kernels.objective import HAS_TRITON, Terms, jit, tl  # noqa: F401 (the interpreter's)
from grpo_fused.kernels.objective import MEANS as KERNEL_MEANS
from grpo_fused.kernels.objective import SUMS as KERNEL_SUMS


@jit
def _loss(terms):
    return terms.loss


@jit
def _tokens(terms):
    return terms.token


@jit
def _kl(terms):
    return terms.kl


@jit
def _entropy(terms):
    return terms.entropy


@jit
def _ratios(terms):
    return terms.unit


@jit
def _clipped_low(terms):
    return terms.clipped < 0


@jit
def _clipped_high(terms):
    return terms.clipped > 0


@jit
def _ratio(terms):
    return terms.ratio


SUMS = {
    "loss": _loss,
    "tokens": _tokens,
    "kl": _kl,
    "entropy": _entropy,
    "ratios": _ratios,
    "clipped_low": _clipped_low,
    "clipped_high": _clipped_high,
    "ratio": _ratio,
}
# Name: (sums that add up to the numerator, sum in the denominator).
MEANS = {
    "kl": (("kl",), "tokens"),
    "entropy": (("entropy",), "tokens"),
    "clip_ratio/low_mean": (("clipped_low",), "ratios"),
    "clip_ratio/high_mean": (("clipped_high",), "ratios"),
    "clip_ratio/region_mean": (("clipped_low", "clipped_high"), "ratios"),
    "ratio/mean": (("ratio",), "ratios"),
}
# Entries of the metrics vector that every loss returns.
METRICS = (*MEANS, "ratio/max")

PLACES = {name: place for place, name in enumerate(SUMS)}
KERNEL_SUMS.update(SUMS)
for name, (numerator, denominator) in MEANS.items():
    bits = (sum(1 << PLACES[x] for x in numerator), 1 << PLACES[denominator])
    KERNEL_MEANS[name] = bits


def means(sums: Tensor) -> dict[str, Tensor]:
    """Means of a batch from its `LossOutput.sums` (8,).

    Returns:
        dict of 0-d tensors by the names of MEANS. Means over no tokens are 0; so are `kl` without
        ref_logps and `entropy` without compute_entropy.
    """
    return dict(zip(MEANS, _means(sums), strict=True))


def _means(sums):
    named = dict(zip(SUMS, sums.unbind(), strict=True))
    numerators = [
        functools.reduce(operator.add, map(named.get, names)) for names, _ in MEANS.values()
    ]
    denominators = torch.stack([named[name] for _, name in MEANS.values()])
    return torch.stack(numerators) / denominators.clamp(min=1)


def total(terms: Terms) -> tuple[Tensor, Tensor]:
    """(sums (8,), metrics (7,)) of the terms of a batch; terms.entropy may be the number 0."""
    functions = (function.fn if HAS_TRITON else function for function in SUMS.values())
    sums = torch.stack([_sum(function(terms), terms.loss) for function in functions])
    ratio = terms.ratio
    highest = ratio.amax() if ratio.numel() else ratio.new_zeros(())
    return sums, torch.cat([_means(sums), highest[None]])


def without_ratios(sums: Tensor) -> Tensor:
    """Sums (8,) without those over ratios, the last ones, which another rank counts."""
    kept = PLACES["ratios"]
    return F.pad(sums[:kept], (0, len(SUMS) - kept))


def _sum(values, like):
    return values.sum().float() if isinstance(values, Tensor) else like.new_full((), values)


def as_dict(metrics: Tensor, *, has_ref: bool, has_entropy: bool) -> dict[str, Tensor]:
    """Metrics (7,) as a dict, without `kl` or `entropy` where they were not computed."""
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    if not has_ref:
        del named["kl"]
    if not has_entropy:
        del named["entropy"]
    return named
