"""Device functions for the online softmax: statistics of lanes, and what follows from a row's.

Everything is in base 2 and relative to the rounded maximum: with x the logits, capped if they have
a softcap, and scale = log2(e) / temperature (times logit_scale without a softcap),

    z_j = fma(x_j, scale, -maximum)      maximum = round(scale * max_j x_j)
    total = sum_j 2^z_j                  weighted = sum_j 2^z_j z_j
    log p_j = ln2 (z_j - log2 total)     H = ln2 (log2 total - weighted / total)

The rounding of `maximum` is the same for every column and cancels, so logits shifted by thousands
give the same answer; a log-sum-exp, which carries the rounding of its own magnitude, does not.
"""

import triton
import triton.language as tl

from .columns import block_of, load

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# Below every logit that counts. Finite, so that a block of -inf leaves 2^(-inf - START) = 0 and not
# NaN; no lower, because the rounding of a maximum of -1e10 is 512 and 2^512 is inf: vocabularies
# masked with -1e10, -1e30 or the least float are below START and have probability 0.
START = tl.constexpr(-1.0e9)
# 2^z is exactly 0 below this, and 0 * FLOOR is 0 where 0 * -inf would be NaN.
FLOOR = tl.constexpr(-1.0e4)


@triton.jit
def scalar(value):
    """A number given by value, or by pointer as a 0-d tensor."""
    if hasattr(value, "dtype"):  # the interpreter hands numbers over as they are
        if value.dtype.is_ptr():
            value = tl.load(value)
        value = value.to(tl.float32)
    return value


@triton.jit
def token_value(value, sequence, token):
    """A number of the token from `launch.argument`: one for all, per sequence, or per token."""
    if len(value) == 1:
        return scalar(value[0])
    else:
        return tl.load(value[0] + tl.where(value[1] != 0.0, sequence, token)).to(tl.float32)


@triton.jit
def sharpness(temperature, logit_scale, softcap):
    """What logits are multiplied by: the scale too, unless `capped` has applied it already."""
    return (logit_scale if softcap is None else 1.0) / temperature


@triton.jit
def capped(x, logit_scale, softcap):
    """(softcap tanh(x logit_scale / softcap), its derivative in x); (x, 1) without a softcap."""
    if softcap is None:
        return x, 1.0
    else:
        v = x * (logit_scale / softcap)
        e = tl.exp2(tl.abs(v) * (-2.0 * LOG2E))
        v2 = v * v
        near = v * (1 + v2 * (-1 / 3 + v2 * (2 / 15 + v2 * (-17 / 315 + v2 * (62 / 2835)))))
        inverse = 1.0 / (1.0 + e)
        far = tl.where(v < 0.0, e - 1.0, 1.0 - e) * inverse
        tanh = tl.where(tl.abs(v) < 0.3, near, far)  # 1 - e cancels where the series does not
        return softcap * tanh, (4.0 * logit_scale) * e * inverse * inverse


@triton.jit
def load_capped(
    x_ptrs,
    remaining,
    surplus,
    logit_scale,
    softcap,
    UNROLL: tl.constexpr,
    LINE: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """`load`, capped, -inf from column `remaining - surplus` on."""
    x = load(x_ptrs, remaining, UNROLL, LINE, COLUMNS, EVICTION)
    if softcap is not None:
        x = capped(x, logit_scale, softcap)[0]
    if remaining is not None:
        x = tl.where(block_of(tl.arange(0, LINE), UNROLL) < remaining - surplus, x, -float("inf"))
    return x


@triton.jit
def fold(x, scale, maximum, total, weighted, tile: tl.constexpr, ENTROPY: tl.constexpr):
    """Fold one block of columns, reshaped to the tile, into the running statistics of its lanes."""
    x = tl.reshape(x, tile)
    highest = tl.maximum(maximum, tl.max(tl.max(x, axis=2), axis=0) * scale)
    shift = maximum - highest
    shrink = tl.exp2(shift)
    z = tl.fma(x, scale, -highest[None, :, None])
    e = tl.exp2(z)
    if ENTROPY:
        terms = e * tl.maximum(z, FLOOR)
        weighted = tl.fma(shift, total, weighted) * shrink + tl.sum(tl.sum(terms, axis=2), axis=0)
    total = total * shrink + tl.sum(tl.sum(e, axis=2), axis=0)
    return highest, total, weighted


@triton.jit
def nothing(LANES: tl.constexpr):
    """Running statistics of no columns."""
    zeros = tl.zeros((LANES,), tl.float32)
    return tl.full((LANES,), START, tl.float32), zeros, zeros


@triton.jit
def merge(
    maximum, total, weighted, other_maximum, other_total, other_weighted, ENTROPY: tl.constexpr
):
    """Running statistics of both, lane by lane.

    Spelled in multiply-adds: what the compiler may contract one way or another would differ, in the
    last bit, between kernels.
    """
    highest = tl.maximum(maximum, other_maximum)
    shift = maximum - highest
    other_shift = other_maximum - highest
    shrink = tl.exp2(shift)
    other_shrink = tl.exp2(other_shift)
    if ENTROPY:
        weighted = tl.fma(shift, total, weighted)
        other_weighted = tl.fma(other_shift, other_total, other_weighted)
        weighted = tl.fma(weighted, shrink, other_weighted * other_shrink)
    return highest, tl.fma(total, shrink, other_total * other_shrink), weighted


@triton.jit
def relative(maximum, total, weighted, row_maximum):
    """Totals of every lane, relative to the maximum of the row."""
    shift = maximum - row_maximum
    shrink = tl.exp2(shift)
    weighted = tl.fma(shift, total, weighted) * shrink
    return total * shrink, weighted


@triton.jit
def log_probability(x, scale, maximum, total):
    """Of a column with logit x; never above 0, though z of the maximum itself is a rounding."""
    logp = LN2 * (tl.fma(x, scale, -maximum) - tl.log2(total))
    return tl.where(logp > 0.0, 0.0, logp)


@triton.jit
def row_entropy(total, weighted):
    """Of the whole row, never below 0."""
    entropy = LN2 * (tl.log2(total) - weighted / total)
    return tl.where(entropy < 0.0, 0.0, entropy)


@triton.jit
def read_target(x_ptr, targets_ptr, row, ids_ptr, token, V, active, logit_scale, softcap):
    """(target id, whether it is in the vocabulary, its logit, that one's derivative).

    The logit comes from `partials` if they have it: another program may have overwritten it. It is
    NaN, and nothing is read, if the id is not in the vocabulary.
    """
    target = tl.load(ids_ptr + token, active, -1).to(tl.int64)
    known = (target >= 0) & (target < V)
    if targets_ptr is None:
        x = tl.load(x_ptr + target, known, float("nan")).to(tl.float32)
    else:
        x = tl.load(targets_ptr + row, known, float("nan"))
    x, dx = capped(x, logit_scale, softcap)
    return target, known, x, dx
