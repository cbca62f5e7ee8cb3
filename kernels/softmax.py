"""Device functions: log-softmax statistics of one row of logits in one read.

Everything is in base 2 and relative to the rounded maximum. With x the logits, softcapped if there
is a softcap, and scale = log2(e) / temperature (times logit_scale without a softcap),

    z_j = fma(x_j, scale, -maximum)      maximum = round(scale * max_j x_j)
    total = sum_j 2^z_j                  weighted = sum_j 2^z_j z_j
    log p_j = ln2 (z_j - log2 total)     H = ln2 (log2 total - weighted / total)

The rounding of `maximum` is the same for every column and cancels, so logits shifted by thousands
give the same answer; a log-sum-exp carries the rounding error of its own magnitude.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# Below every logit that counts. Finite, so that a block of -inf gives 2^(-inf - START) = 0, not
# NaN. Not lower, because a maximum of -1e10 has a rounding error of 512 and 2^512 is inf:
# vocabularies masked with -1e10, -1e30 or the lowest float are below START and have probability 0.
START = tl.constexpr(-1.0e9)
# 2^z is exactly 0 below this, and 0 * FLOOR is 0 where 0 * -inf would be NaN.
FLOOR = tl.constexpr(-1.0e4)


class Row(NamedTuple):
    """One row of logits without a softcap, and how they become log-probabilities."""

    ptr: tl.tensor  # first column
    V: tl.tensor
    sharpness: tl.tensor  # factor of a logit: logit_scale / temperature


class CappedRow(NamedTuple):
    """One row of logits with a softcap. Triton 3.6 builds no tuple with None in it."""

    ptr: tl.tensor
    V: tl.tensor
    sharpness: tl.tensor  # factor of a softcapped logit: 1 / temperature
    logit_scale: tl.tensor
    softcap: tl.tensor


class Softmax(NamedTuple):
    """Softmax statistics of a row, over the vocabulary or over its support."""

    maximum: tl.tensor
    total: tl.tensor
    logp: tl.tensor  # of the target
    entropy: tl.tensor  # 0 if it is not computed


class Target(NamedTuple):
    """The target token of a row."""

    id: tl.tensor
    known: tl.tensor  # whether it lies in the vocabulary
    x: tl.tensor  # its logit as it is stored, NaN if it is not known


@triton.jit
def scalar(value):
    """A number, or the value of a 0-d tensor in a tuple (`launch.argument`), as float32."""
    if hasattr(value, "__len__"):
        return tl.load(value[0]).to(tl.float32)
    elif hasattr(value, "dtype"):  # the interpreter hands numbers over as they are
        return value.to(tl.float32)
    else:
        return value


@triton.jit
def token_value(value, sequence, token, inside):
    """A number, the value of a 0-d tensor, or one per sequence or token (`launch.argument`); of the
    last two 0 outside.
    """
    if hasattr(value, "__len__"):
        if len(value) == 2:
            return tl.load(value[0] + sequence, inside, 0).to(tl.float32)
        else:
            return scalar(value)
    elif hasattr(value, "dtype"):
        if value.dtype.is_ptr():
            return tl.load(value + token, inside, 0).to(tl.float32)
        else:
            return scalar(value)
    else:
        return value


@triton.jit
def is_active(active_ptr, token, inside):
    """Whether a token is active; without a mask all tokens inside of (B, T) are."""
    if active_ptr is None:
        return inside
    else:
        return tl.load(active_ptr + token, inside, 0) != 0


@triton.jit
def locate(row, positions, num_tokens):
    """(sequence, position, index of the token among all tokens) of a row of logits (B, L, V)."""
    sequence = row // positions
    position = row % positions
    return sequence, position, sequence * num_tokens + position


@triton.jit
def row_pointer(ptr, sequence, position, stride_sequence, stride_position, blocks: tl.constexpr):
    """Start of a row, aligned to VECTOR columns."""
    start = ptr + sequence.to(tl.int64) * stride_sequence + position.to(tl.int64) * stride_position
    BYTES: tl.constexpr = blocks.VECTOR * ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(start, BYTES)


@triton.jit
def read_row(ptr, V, temperature, scales):
    """A `Row` or `CappedRow` from the pointer to its first column."""
    logit_scale = scalar(scales.logit_scale)
    if scales.logit_softcap is None:
        return Row(ptr, V, logit_scale / temperature)
    else:
        return CappedRow(ptr, V, 1.0 / temperature, logit_scale, scalar(scales.logit_softcap))


@triton.jit
def read_target(row, target_id, active):
    """The `Target` of a row; the logit of a masked row is not loaded.

    Nothing is computed from the logit here, so that it arrives while the row is read.
    """
    known = active & (target_id >= 0) & (target_id < row.V)
    return Target(target_id, known, tl.load(row.ptr + target_id, known, float("nan")))


@triton.jit
def softcapped(x, row):
    """(softcap tanh(x logit_scale / softcap), its derivative in x); (x, 1) without a softcap."""
    if len(row) == 3:  # a `Row`; `hasattr` of a tuple's field fails in Triton 3.6
        return x, 1.0
    else:
        v = x * (row.logit_scale / row.softcap)
        e = tl.exp2(tl.abs(v) * (-2.0 * LOG2E))
        v2 = v * v
        near = v * (1 + v2 * (-1 / 3 + v2 * (2 / 15 + v2 * (-17 / 315 + v2 * (62 / 2835)))))
        inverse = 1.0 / (1.0 + e)
        far = tl.where(v < 0.0, e - 1.0, 1.0 - e) * inverse
        tanh = tl.where(tl.abs(v) < 0.3, near, far)  # 1 - e cancels where the series does not
        return row.softcap * tanh, (4.0 * row.logit_scale) * e * inverse * inverse


@triton.jit
def split_columns(V, blocks: tl.constexpr):
    """(number of whole blocks in a row, columns after them)."""
    BLOCK: tl.constexpr = blocks.UNROLL * blocks.THREADS * blocks.VECTOR
    COLUMNS: tl.constexpr = blocks.COLUMNS
    whole = V // BLOCK
    # On an argument of a kernel `multiple_of` has no effect, on a computed value it does.
    return whole, tl.multiple_of(V - whole * BLOCK, COLUMNS)


@triton.jit
def line_pointers(x_ptr, blocks: tl.constexpr):
    """Pointers to the first line of a block, for `load`: one vector per thread.

    bfloat16 is read in 32-bit words: one shift and one mask make two float32, where unpacking
    16-bit registers takes three instructions.
    """
    LINE: tl.constexpr = blocks.THREADS * blocks.VECTOR
    if (x_ptr.dtype.element_ty == tl.bfloat16) & (blocks.VECTOR > 1):
        return x_ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, LINE // 2)
    else:
        return x_ptr + tl.arange(0, LINE)


@triton.jit
def tail_pointers(x_ptr, blocks: tl.constexpr):
    """As `line_pointers`, for a block of which not all columns lie in the row.

    In an odd vocabulary the last 32-bit word would reach past the row, and past the memory if that
    ends there. Made anew, not carried out of the loop: Triton 3.6 would change the layout of the
    loop's pointers through shared memory.
    """
    if blocks.COLUMNS % 2 == 0:
        return line_pointers(x_ptr, blocks)
    else:
        return x_ptr + tl.arange(0, blocks.THREADS * blocks.VECTOR)


@triton.jit
def lines_from(line, blocks: tl.constexpr):
    """Columns, or pointers to them, of the UNROLL lines that start with this one.

    A loop that moves one line and derives the others keeps one address per thread: the distance
    between lines is a constant in the instruction.
    """
    return line[None, :] + (tl.arange(0, blocks.UNROLL) * line.shape[0])[:, None]


@triton.jit
def within_row(remaining, blocks: tl.constexpr):
    """Mask of a block of which only the first `remaining` columns lie in the row."""
    return lines_from(tl.arange(0, blocks.THREADS * blocks.VECTOR), blocks) < remaining


@triton.jit
def load(x_ptrs, remaining, EVICTION: tl.constexpr, blocks: tl.constexpr):
    """A block (UNROLL, THREADS x VECTOR) in float32, undefined from column `remaining` on if given.

    x_ptrs are `line_pointers` to its first line, or `tail_pointers` if `remaining` is given.
    """
    LINE: tl.constexpr = blocks.THREADS * blocks.VECTOR
    PAIRS: tl.constexpr = x_ptrs.shape[0] < LINE
    within = None
    if remaining is not None:
        if PAIRS:
            COLUMNS: tl.constexpr = (blocks.COLUMNS + 1) // 2  # of an odd V the last is left out
            pairs = tl.multiple_of(remaining // 2, COLUMNS)
            within = lines_from(tl.arange(0, LINE // 2), blocks) < pairs
        else:
            within = within_row(remaining, blocks)
    x = tl.load(lines_from(x_ptrs, blocks), within, eviction_policy=EVICTION)
    if PAIRS:
        even = (x << 16).to(tl.float32, bitcast=True)
        odd = (x & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(even, odd), (blocks.UNROLL, LINE))
    else:
        return x.to(tl.float32)


@triton.jit
def empty_statistics(LANES: tl.constexpr):
    """(maximum, total, weighted) per lane over no columns."""
    zeros = tl.zeros((LANES,), tl.float32)
    return tl.full((LANES,), START, tl.float32), zeros, zeros


@triton.jit
def add_block(x, scale, maximum, total, weighted, ENTROPY: tl.constexpr, blocks: tl.constexpr):
    """Running statistics of every lane after one more block.

    The reshape puts the columns of a lane into one thread, so nothing is exchanged between threads.
    """
    x = tl.reshape(x, (blocks.UNROLL, blocks.THREADS, blocks.VECTOR))
    return add_columns(x, scale, maximum, total, weighted, ENTROPY)


@triton.jit
def add_columns(x, scale, maximum, total, weighted, ENTROPY: tl.constexpr):
    """Running statistics of every lane after columns (a, lanes, b)."""
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
def row_statistics(row, ENTROPY: tl.constexpr, EVICTION: tl.constexpr, blocks: tl.constexpr):
    """(maximum, total, weighted) of a row; without ENTROPY weighted is 0.

    The order of additions depends on `blocks` alone, never on the number of rows.
    """
    BLOCK: tl.constexpr = blocks.UNROLL * blocks.THREADS * blocks.VECTOR
    scale = row.sharpness * LOG2E
    whole, remaining = split_columns(row.V, blocks)
    x_ptrs = line_pointers(row.ptr, blocks)
    maximum, total, weighted = empty_statistics(blocks.THREADS)
    for _ in range(whole):
        x = softcapped(load(x_ptrs, None, EVICTION, blocks), row)[0]
        maximum, total, weighted = add_block(x, scale, maximum, total, weighted, ENTROPY, blocks)
        x_ptrs += blocks.UNROLL * x_ptrs.shape[0]
    if remaining > 0:
        tail_ptrs = tail_pointers(row.ptr + whole * BLOCK, blocks)
        x = softcapped(load(tail_ptrs, remaining, EVICTION, blocks), row)[0]
        x = tl.where(within_row(remaining, blocks), x, -float("inf"))
        maximum, total, weighted = add_block(x, scale, maximum, total, weighted, ENTROPY, blocks)
    return merge_lanes(maximum, total, weighted)


@triton.jit
def merge_lanes(maximum, total, weighted):
    """(maximum, total, weighted) of a row from those of its lanes."""
    row_maximum = tl.max(maximum, axis=0)
    shift = maximum - row_maximum
    shrink = tl.exp2(shift)
    # Not products: contracted into the first addition of the butterfly, a product would make sums
    # that differ from lane to lane by its rounding.
    weighted = tl.fma(tl.fma(shift, total, weighted), shrink, 0.0)
    total = tl.fma(total, shrink, 0.0)
    return row_maximum, tl.sum(total, axis=0), tl.sum(weighted, axis=0)


@triton.jit
def relative_logit(target, row, maximum):
    """z of the target; of the maximum itself it is the maximum's rounding, above or below 0."""
    x = softcapped(target.x.to(tl.float32), row)[0]
    return tl.fma(x, row.sharpness * LOG2E, -maximum)


@triton.jit
def softmax(target, row, statistics, ENTROPY: tl.constexpr):
    """The `Softmax` of a row from its (maximum, total, weighted)."""
    maximum, total, weighted = statistics
    # Never above 0, though z of the maximum may be.
    logp = LN2 * (relative_logit(target, row, maximum) - tl.log2(total))
    logp = tl.where(logp > 0.0, 0.0, logp)
    entropy = 0.0
    if ENTROPY:
        entropy = LN2 * (tl.log2(total) - weighted / total)
        entropy = tl.where(entropy < 0.0, 0.0, entropy)
    return Softmax(maximum, total, logp, entropy)
