"""Device functions for one row of logits: softmax statistics in one read.

A row is read in blocks of UNROLL lines of THREADS x VECTOR columns. The reshape to those three axes
puts axes 0 and 2 inside one thread (VECTOR columns are one 128-bit load), so every thread keeps an
online softmax of its own and nothing is exchanged before the last block.

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
        return tl.load(value[0] + tl.where(value[1], sequence, token)).to(tl.float32)


@triton.jit
def locate(row, positions, tokens_per_sequence):
    """(sequence, position, index of the token among all tokens) of a row of logits (B, L, V)."""
    sequence = row // positions
    position = row % positions
    return sequence, position, sequence * tokens_per_sequence + position


@triton.jit
def row_pointer(ptr, sequence, position, stride_sequence, stride_position, VECTOR: tl.constexpr):
    """Start of a row; VECTOR columns from there on are aligned to their size."""
    start = ptr + sequence.to(tl.int64) * stride_sequence + position.to(tl.int64) * stride_position
    return tl.multiple_of(start, VECTOR * ptr.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def split_columns(V, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """(number of whole blocks in a row, columns after them, known to be a multiple of COLUMNS)."""
    blocks = V // BLOCK
    return blocks, tl.multiple_of(V - blocks * BLOCK, COLUMNS)


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
def line_pointers(x_ptr, LINE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to the first line of a block, for `load`: one vector a thread.

    bfloat16 is read in 32-bit words: one shift and one mask make two float32, where unpacking
    16-bit registers takes three instructions.
    """
    if (x_ptr.dtype.element_ty == tl.bfloat16) & (VECTOR > 1):
        return x_ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, LINE // 2)
    else:
        return x_ptr + tl.arange(0, LINE)


@triton.jit
def block_of(line, UNROLL: tl.constexpr):
    """Columns, or pointers to them, of the UNROLL lines that start with this one.

    A loop that moves one line and derives the others keeps one address a thread: the distance
    between lines is a constant in the instruction.
    """
    return line[None, :] + (tl.arange(0, UNROLL) * line.shape[0])[:, None]


@triton.jit
def load(x_ptrs, remaining, UNROLL: tl.constexpr, LINE: tl.constexpr, EVICTION: tl.constexpr):
    """The block (UNROLL, LINE) in float32, -inf from column `remaining` on unless None.

    x_ptrs are `line_pointers` to its first line.
    """
    PAIRS: tl.constexpr = x_ptrs.shape[0] < LINE
    x_ptrs = block_of(x_ptrs, UNROLL)
    columns = block_of(tl.arange(0, LINE), UNROLL)
    if PAIRS:
        if remaining is None:
            words = tl.load(x_ptrs, eviction_policy=EVICTION)
        else:
            pairs = block_of(tl.arange(0, LINE // 2), UNROLL)
            words = tl.load(x_ptrs, 2 * pairs < remaining, 0, eviction_policy=EVICTION)
        even = (words << 16).to(tl.float32, bitcast=True)
        odd = (words & -65536).to(tl.float32, bitcast=True)
        x = tl.reshape(tl.join(even, odd), (UNROLL, LINE))
        if remaining is not None:
            x = tl.where(columns < remaining, x, -float("inf"))
    elif remaining is None:
        x = tl.load(x_ptrs, eviction_policy=EVICTION)
    else:
        x = tl.load(x_ptrs, columns < remaining, -float("inf"), eviction_policy=EVICTION)
    return x.to(tl.float32)


@triton.jit
def _load_capped(
    x_ptrs,
    remaining,
    logit_scale,
    softcap,
    UNROLL: tl.constexpr,
    LINE: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """`load`, capped; what lies outside the row stays -inf."""
    x = load(x_ptrs, remaining, UNROLL, LINE, EVICTION)
    if softcap is not None:
        x = capped(x, logit_scale, softcap)[0]
        if remaining is not None:
            x = tl.where(block_of(tl.arange(0, LINE), UNROLL) < remaining, x, -float("inf"))
    return x


@triton.jit
def _fold(x, scale, maximum, total, weighted, tile: tl.constexpr, ENTROPY: tl.constexpr):
    """Fold one block of columns into the running statistics of each thread."""
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
def row_statistics(
    x_ptr,
    V,
    scale,
    logit_scale,
    softcap,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Read a row once: (maximum, total, weighted) of the module; without ENTROPY weighted is 0."""
    tile: tl.constexpr = (UNROLL, THREADS, VECTOR)
    LINE: tl.constexpr = THREADS * VECTOR
    maximum = tl.full((THREADS,), START, tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    weighted = tl.zeros((THREADS,), tl.float32)
    blocks, remaining = split_columns(V, UNROLL * LINE, COLUMNS)
    x_ptrs = line_pointers(x_ptr, LINE, VECTOR)
    for _ in range(blocks):
        x = _load_capped(x_ptrs, None, logit_scale, softcap, UNROLL, LINE, EVICTION)
        maximum, total, weighted = _fold(x, scale, maximum, total, weighted, tile, ENTROPY)
        x_ptrs += UNROLL * x_ptrs.shape[0]
    if remaining > 0:
        x = _load_capped(x_ptrs, remaining, logit_scale, softcap, UNROLL, LINE, EVICTION)
        maximum, total, weighted = _fold(x, scale, maximum, total, weighted, tile, ENTROPY)
    row_maximum = tl.max(maximum, axis=0)
    shift = maximum - row_maximum
    shrink = tl.exp2(shift)
    weighted = tl.sum(tl.fma(shift, total, weighted) * shrink, axis=0)
    return row_maximum, tl.sum(total * shrink, axis=0), weighted


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
def read_target(x_ptr, ids_ptr, token, V, active, logit_scale, softcap):
    """(target id, whether it is in the vocabulary, its logit, that one's derivative).

    The logit is NaN, and nothing is read, if the id is not in the vocabulary.
    """
    target = tl.load(ids_ptr + token, active, -1).to(tl.int64)
    known = (target >= 0) & (target < V)
    x, dx = capped(
        tl.load(x_ptr + target, known, float("nan")).to(tl.float32), logit_scale, softcap
    )
    return target, known, x, dx
