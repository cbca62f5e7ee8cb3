"""The softmax over the columns that the sampler kept of a block of rows, in torch.

They are few against the vocabulary, so they are computed in float64, which no block of rows and no
thread rounds differently. Their number is read, which synchronises with a device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fused.torch_backend.rows import LOG2E, START, softcapped


class Kept(NamedTuple):
    """The kept columns of n rows, in the order of the rows."""

    lengths: Tensor  # (n,)
    rows: Tensor  # (K,) row
    columns: Tensor  # (K,) column, 0 where it is not known
    known: Tensor  # (K,) bool, whether it is one of the logits
    is_target: Tensor  # (K,) bool
    u: Tensor  # (K,) float64, (softcapped) logit
    factor: Tensor | float  # (K,) its sharpness
    slope: Tensor | float  # (K,) derivative of u factor in the logit


def gather_kept(x, masked, tokens, scales, factor):
    """`Kept` of logits x (n, V), or None: the tokens have no support.

    Args:
        masked: (n,) bool, rows without kept columns, or None.
        tokens, factor: of the rows.
    """
    if tokens.support is None:
        return None
    starts, stops, ids = tokens.support
    lengths = stops - starts
    if masked is not None:
        lengths = lengths.masked_fill(masked, 0)
    rows = torch.repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    index = torch.arange(len(rows), device=rows.device) - first[rows] + starts[rows]
    ids = ids[index].long()
    known = (ids >= 0) & (ids < x.shape[1])
    columns = torch.where(known, ids, 0)
    logits = x[rows, columns].float()
    u, slope = softcapped(logits, scales, torch.empty_like(logits))
    if isinstance(factor, Tensor) and factor.dim():
        factor = factor[rows]
    slope = factor if slope is None else slope * factor
    return Kept(lengths, rows, columns, known, ids == tokens.ids[rows], u.double(), factor, slope)


def kept_statistics(kept, entropy, shard=False):
    """Fields (n,) of `Statistics` over the kept columns; those of masked rows mean nothing.

    A row without its target is NaN. Of a `shard` of the vocabulary they are those of
    `grpo_fused.parallel.merge`, and columns elsewhere do not count.
    """
    absent = -torch.inf if shard else torch.nan
    u = torch.where(kept.known, kept.u, absent)
    maxima = _reduce(u, kept.lengths, "max").clamp(min=START)
    z = (u - maxima[kept.rows]) * kept.factor
    e = z.exp()
    totals = _reduce(e, kept.lengths, "sum")
    found = kept.known & kept.is_target
    chosen = _reduce(torch.where(found, z, 0.0), kept.lengths, "sum")
    chosen = chosen.masked_fill(_reduce(found.double(), kept.lengths, "sum") == 0, torch.nan)
    entropies = None
    if entropy:
        entropies = _reduce(torch.where(e > 0, e * z, e), kept.lengths, "sum")
        if shard:  # in base 2
            entropies = entropies * LOG2E
        else:
            entropies = (totals.log() - entropies / totals).clamp(min=0.0)
    if not shard:
        chosen = (chosen - totals.log()).clamp(max=0.0)
    found = (chosen, entropies, maxima, totals)
    return tuple(None if t is None else t.float() for t in found)


def write_kept_gradient(dlogits, kept, statistics, derivatives, wrong, masked):
    """Write the gradient of the kept columns: over the support plus over the vocabulary.

    Args:
        dlogits: (n, V), which has the gradient over the vocabulary in all columns.
        statistics, derivatives: `grpo_fused.bundles`, (n,).
        wrong, masked: (n,) bool, rows that are NaN unless they are masked, if any are.
    """
    over_kept = (statistics[4:], derivatives.kept_dlogps, derivatives.kept_dentropies)
    gradient = _of_columns(kept, *over_kept)
    over_all = (statistics[:4], derivatives.dlogps, derivatives.dentropies)
    if not (derivatives.dlogps is None and derivatives.dentropies is None):
        gradient = gradient + _of_columns(kept, *over_all)
    gradient = (gradient * kept.slope).to(dlogits.dtype)
    known = kept.known  # of those that are not, another shard has the gradient
    dlogits[kept.rows[known], kept.columns[known]] = gradient[known]
    wrong = wrong if masked is None else wrong & ~masked
    dlogits[wrong] = torch.nan


def _of_columns(kept, statistics, g, h):
    """g (1[target] - p) - h p (log p + H) of the kept columns, in float64; g or h may be None."""
    _, entropies, maxima, totals = (
        None if t is None else t.double()[kept.rows] for t in statistics
    )
    g, h = (None if d is None else d.double()[kept.rows] for d in (g, h))
    logp = (kept.u - maxima) * kept.factor - totals.log()
    p = logp.exp()
    gradient = torch.zeros_like(p)
    if g is not None:
        gradient = torch.where(kept.is_target, -torch.expm1(logp), -p) * g
    if h is not None:
        gradient = gradient - torch.where(p > 0, h * p * (logp + entropies), 0.0)
    return gradient


def _reduce(values, lengths, how):
    return torch.segment_reduce(values, how, lengths=lengths, unsafe=True)
