"""Device functions: the softmax over the columns of a row that the sampler kept, and its gradient.

The columns are a list of ids per token. They are gathered while the row is in the caches, or
instead of reading it. Their logits are kept in memory of their own: in place, the gradient over the
vocabulary overwrites them before theirs is made.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import aligned, arguments
from .row_gradient import is_zero, of_column, of_target
from .softmax import LOG2E, add_columns, empty_statistics, merge_lanes, softcapped


class KeptTokens(NamedTuple):
    """`grpo_fused.bundles.Support` with memory for the logits of the kept columns."""

    starts: tl.tensor
    stops: tl.tensor
    ids: tl.tensor
    logits: tl.tensor  # ids again, where none is needed: Triton 3.6 takes no None in a tuple


class Kept(NamedTuple):
    """The kept columns of a row: [start, stop) of ids and logits, pointers."""

    start: tl.tensor
    stop: tl.tensor
    ids: tl.tensor
    logits: tl.tensor


@triton.jit
def kept_columns(support, token, active):
    """The `Kept` of a token; masked ones have none."""
    start = tl.load(support.starts + token, active, 0)
    stop = tl.load(support.stops + token, active, 0)
    return Kept(start, stop, support.ids, support.logits)


@triton.jit
def _ids(row, kept, first, blocks: tl.constexpr):
    """(index, id, whether it is kept, whether it is also a column of the row), one per lane."""
    k = first + tl.arange(0, blocks.THREADS)
    inside = k < kept.stop
    column = tl.load(kept.ids + k, inside, 0).to(tl.int64)
    return k, column, inside, inside & (column >= 0) & (column < row.V)


@triton.jit
def kept_statistics(
    row,
    kept,
    target,
    ENTROPY: tl.constexpr,
    SHARD: tl.constexpr,
    KEEP: tl.constexpr,
    blocks: tl.constexpr,
):
    """((maximum, total, weighted), whether the target is kept); KEEP: store the logits.

    An id outside of the vocabulary makes them NaN; of a SHARD of it, another rank may have it.
    """
    scale = row.sharpness * LOG2E
    maximum, total, weighted = empty_statistics(blocks.THREADS)
    found = tl.zeros((blocks.THREADS,), tl.int32)
    for first in range(kept.start, kept.stop, blocks.THREADS):
        k, column, inside, known = _ids(row, kept, first, blocks)
        x = tl.load(row.ptr + column, known, 0.0).to(tl.float32)
        if KEEP:
            tl.store(kept.logits + k, x, inside)
        x = softcapped(x, row)[0]
        x = tl.where(known, x, -float("inf"))
        if not SHARD:
            x = tl.where(inside & (known == 0), float("nan"), x)
        x = x[None, :, None]
        maximum, total, weighted = add_columns(x, scale, maximum, total, weighted, ENTROPY)
        found += (known & (column == target.id)).to(tl.int32)
    return merge_lanes(maximum, total, weighted), tl.sum(found, axis=0) > 0


@triton.jit
def keep_logits(row, kept, blocks: tl.constexpr):
    """Store the logits of the kept columns before a gradient overwrites them."""
    for first in range(kept.start, kept.stop, blocks.THREADS):
        k, column, inside, known = _ids(row, kept, first, blocks)
        x = tl.load(row.ptr + column, known, 0.0).to(tl.float32)
        tl.store(kept.logits + k, x, inside)
    tl.debug_barrier()


@triton.jit
def add_kept_gradient(
    row,
    dx_ptr,
    target,
    kept,
    softmaxes,
    derivatives,
    ENTROPY: tl.constexpr,
    KEPT_ENTROPY: tl.constexpr,
    blocks: tl.constexpr,
):
    """Write the gradient of the kept columns: of the softmax over them plus that over all.

    Args:
        softmaxes, derivatives: pairs, over the vocabulary and over the support. The gradient over
            the vocabulary has been written to the whole row.
    """
    over_all, over_kept = derivatives
    if not is_zero(over_kept):
        dx_target = of_target(softmaxes[1], over_kept, KEPT_ENTROPY)
        if not is_zero(over_all):
            dx_target += of_target(softmaxes[0], over_all, ENTROPY)
        # Other threads have written to the same addresses.
        tl.debug_barrier()
        for first in range(kept.start, kept.stop, blocks.THREADS):
            k, column, inside, known = _ids(row, kept, first, blocks)
            x = tl.load(kept.logits + k, inside, 0.0)
            dx = of_column(
                x, row, softmaxes[1].maximum, over_kept.constant, over_kept.slope, KEPT_ENTROPY
            )
            if not is_zero(over_all):
                dx += of_column(
                    x, row, softmaxes[0].maximum, over_all.constant, over_all.slope, ENTROPY
                )
            dx = tl.where(column == target.id, dx_target * softcapped(x, row)[1], dx)
            tl.store(dx_ptr + column, dx.to(dx_ptr.dtype.element_ty), known)


def token_arguments(tokens, dlogits=None):
    """`Tokens` as kernels take them; with a gradient to write, the support has its memory."""
    support = tokens.support
    if support is None:
        return arguments(tokens)
    tokens = arguments(tokens._replace(support=None))
    starts, stops, ids = map(aligned, support)
    logits = ids
    if dlogits is not None:
        logits = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    return tokens._replace(support=KeptTokens(starts, stops, ids, logits))
