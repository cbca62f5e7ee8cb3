"""Device functions for one row of logits: softmax statistics in one read, gradient in one more.

A row is read in blocks of UNROLL x THREADS x VECTOR columns. The reshape to those three axes puts
axes 0 and 2 inside one thread (VECTOR columns are one 128-bit load), so every thread keeps an
online softmax of its own and nothing is exchanged before the last block.

Everything is in base 2 and relative to the rounded maximum: with scale = log2(e) / temperature,

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
def _load(
    x_ptr,
    remaining,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """The first BLOCK columns at x_ptr as (BLOCK,) float32, -inf from `remaining` on unless None.

    bfloat16 is read in 32-bit words: one shift and one mask make two float32, where unpacking
    16-bit registers takes three instructions.
    """
    columns = tl.arange(0, BLOCK)
    if (x_ptr.dtype.element_ty == tl.bfloat16) & (VECTOR > 1):
        pairs = tl.arange(0, BLOCK // 2)
        word_ptr = x_ptr.to(tl.pointer_type(tl.int32)) + pairs
        if remaining is None:
            words = tl.load(word_ptr, eviction_policy=EVICTION)
        else:
            words = tl.load(word_ptr, 2 * pairs < remaining, 0, eviction_policy=EVICTION)
        even = (words << 16).to(tl.float32, bitcast=True)
        odd = (words & -65536).to(tl.float32, bitcast=True)
        x = tl.reshape(tl.join(even, odd), (BLOCK,))
        if remaining is not None:
            x = tl.where(columns < remaining, x, -float("inf"))
    elif remaining is None:
        x = tl.load(x_ptr + columns, eviction_policy=EVICTION)
    else:
        x = tl.load(x_ptr + columns, columns < remaining, -float("inf"), eviction_policy=EVICTION)
    return x.to(tl.float32)


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
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Read a row once: (maximum, total, weighted) of the module; without ENTROPY weighted is 0."""
    tile: tl.constexpr = (UNROLL, THREADS, VECTOR)
    BLOCK: tl.constexpr = UNROLL * THREADS * VECTOR
    maximum = tl.full((THREADS,), START, tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    weighted = tl.zeros((THREADS,), tl.float32)
    blocks, remaining = split_columns(V, BLOCK, COLUMNS)
    for _ in range(blocks):
        x = _load(x_ptr, None, BLOCK, VECTOR, EVICTION)
        maximum, total, weighted = _fold(x, scale, maximum, total, weighted, tile, ENTROPY)
        x_ptr += BLOCK
    if remaining > 0:
        x = _load(x_ptr, remaining, BLOCK, VECTOR, EVICTION)
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
def _gradient(x, scale, maximum, constant, slope, ENTROPY: tl.constexpr):
    z = tl.fma(x, scale, -maximum)
    if ENTROPY:
        return tl.exp2(z) * tl.fma(tl.maximum(z, FLOOR), slope, constant)
    else:
        return tl.exp2(z) * constant


@triton.jit
def write_row_gradient(
    x_ptr,
    dx_ptr,
    V,
    scale,
    maximum,
    constant,
    slope,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Write dx_j = 2^z_j (constant + slope z_j) for every column; dx may be x itself.

    Backwards through the row: what the statistics read last is what the caches still hold.
    """
    columns = tl.arange(0, BLOCK)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    blocks, remaining = split_columns(V, BLOCK, COLUMNS)
    x_ptr += blocks * BLOCK
    dx_ptr += blocks * BLOCK
    if remaining > 0:
        x = _load(x_ptr, remaining, BLOCK, VECTOR, "evict_first")
        dx = _gradient(x, scale, maximum, constant, slope, ENTROPY).to(dtype)
        tl.store(dx_ptr + columns, dx, columns < remaining, eviction_policy="evict_first")
    for _ in range(blocks):
        x_ptr -= BLOCK
        dx_ptr -= BLOCK
        x = _load(x_ptr, None, BLOCK, VECTOR, "evict_first")
        dx = _gradient(x, scale, maximum, constant, slope, ENTROPY).to(dtype)
        tl.store(dx_ptr + columns, dx, eviction_policy="evict_first")


@triton.jit
def write_row_zeros(dx_ptr, V, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a gradient that is exactly zero, without reading the row."""
    columns = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), dx_ptr.dtype.element_ty)
    blocks, remaining = split_columns(V, BLOCK, COLUMNS)
    for _ in range(blocks):
        tl.store(dx_ptr + columns, zeros, eviction_policy="evict_first")
        dx_ptr += BLOCK
    if remaining > 0:
        tl.store(dx_ptr + columns, zeros, columns < remaining, eviction_policy="evict_first")


@triton.jit
def read_target(x_ptr, ids_ptr, token, V, active):
    """(target id, whether it is in the vocabulary, its logit): NaN, and no read, if it is not."""
    target = tl.load(ids_ptr + token, active, -1).to(tl.int64)
    known = (target >= 0) & (target < V)
    return target, known, tl.load(x_ptr + target, known, float("nan")).to(tl.float32)


@triton.jit
def row_gradient(
    x_ptr,
    dx_ptr,
    V,
    target,
    known,
    temperature,
    maximum,
    total,
    logp,
    entropy,
    dlogp,
    dentropy,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Gradient of a row from g = dL/dlogp and h = dL/dH; h counts only if ENTROPY.

    dx_j = (g (1[j = target] - p_j) - h p_j (log p_j + H)) / temperature
    """
    g = dlogp / temperature
    h = dentropy / temperature
    constant = -(g + h * (entropy - LN2 * tl.log2(total))) / total
    slope = -h * LN2 / total
    if (g == 0.0) & (h == 0.0):
        write_row_zeros(dx_ptr, V, BLOCK, COLUMNS)
    else:
        write_row_gradient(
            x_ptr,
            dx_ptr,
            V,
            LOG2E / temperature,
            maximum,
            constant,
            slope,
            BLOCK,
            VECTOR,
            COLUMNS,
            ENTROPY,
        )
        # One store for the target, after every thread has written its columns, instead of a
        # compare in each of them.
        p = tl.exp2(logp * LOG2E)
        dx_target = g * (1.0 - p)
        if ENTROPY:
            dx_target -= tl.where(p > 0.0, h * p * (logp + entropy), 0.0)
        tl.debug_barrier()
        tl.store(dx_ptr + target, dx_target.to(dx_ptr.dtype.element_ty), known)
