"""Device functions for the gradient of one row of logits, made from its statistics."""

import triton
import triton.language as tl

from .columns import (
    block_of,
    end_columns,
    find_middle,
    line_pointers,
    load,
    skip_head,
    split_columns,
)
from .online_softmax import FLOOR, LN2, LOG2E, capped, sharpness


@triton.jit
def _write_block(
    x_ptrs,
    dx_ptrs,
    remaining,
    coefficients,
    UNROLL: tl.constexpr,
    LINE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Write the gradient of a block from pointers to its first line, up to column `remaining`."""
    scale, logit_scale, softcap, maximum, constant, slope = coefficients
    x = load(x_ptrs, remaining, UNROLL, LINE, COLUMNS, "evict_first")
    u, du = capped(x, logit_scale, softcap)
    z = tl.fma(u, scale, -maximum)
    factor = constant
    if ENTROPY:
        factor = tl.fma(tl.maximum(z, FLOOR), slope, constant)
    dx = (tl.exp2(z) * factor * du).to(dx_ptrs.dtype.element_ty)
    within = None
    if remaining is not None:
        within = block_of(tl.arange(0, LINE), UNROLL) < remaining
    tl.store(block_of(dx_ptrs, UNROLL), dx, within, eviction_policy="evict_first")


@triton.jit
def _columns_of(part, V, SEGMENT_COLUMNS: tl.constexpr):
    """(first column, number of columns) of one program's part of V columns; all if part is None."""
    if part is None:
        return 0, V
    else:
        first = part * SEGMENT_COLUMNS
        return first, tl.minimum(tl.maximum(V - first, 0), SEGMENT_COLUMNS)


@triton.jit
def _is_first(part):
    """Whether this program also has the columns at the ends of a row."""
    if part is None:
        return True
    else:
        return part == 0


@triton.jit
def _owns(
    part, x_ptr, V, column, SEGMENT_COLUMNS: tl.constexpr, VECTOR: tl.constexpr, ENDS: tl.constexpr
):
    """Whether this program is the one that writes a column."""
    if part is None:
        return True
    else:
        if ENDS:
            head, middle = find_middle(x_ptr, V, VECTOR)
            column = tl.where((column < head) | (column >= head + middle), 0, column - head)
        return column // SEGMENT_COLUMNS == part


@triton.jit
def write_row_gradient(
    x_ptr,
    dx_ptr,
    V,
    part,
    coefficients,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    DLOGITS_VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ENDS: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Write dx_j = 2^z_j (constant + slope z_j) du_j / dx_j for every column; dx may be x itself.

    Backwards through the row: what the statistics read last is what the caches still hold. Two
    blocks an iteration share what the loop itself costs; written out, because the compiler's own
    unrolling leaves it more addresses to move.

    Args:
        coefficients: (scale, logit_scale, softcap, maximum, constant, slope) of the row.
    """
    LINE: tl.constexpr = THREADS * VECTOR
    BLOCK: tl.constexpr = UNROLL * LINE
    if ENDS:
        head, middle = find_middle(x_ptr, V, VECTOR)
        if _is_first(part):
            ends = end_columns(head, middle, THREADS)
            x_ends, dx_ends = x_ptr + ends, dx_ptr + ends
            _write_block(x_ends, dx_ends, V - middle, coefficients, 1, THREADS, 1, ENTROPY)
        x_ptr = skip_head(x_ptr, head, VECTOR)
        dx_ptr = skip_head(dx_ptr, head, DLOGITS_VECTOR)
        V = middle
    first, V = _columns_of(part, V, SEGMENT * BLOCK)
    blocks, remaining = split_columns(V, BLOCK, COLUMNS)
    x_ptrs = line_pointers(x_ptr + (first + blocks * BLOCK), LINE, VECTOR)
    dx_ptrs = dx_ptr + (first + blocks * BLOCK) + tl.arange(0, LINE)
    if remaining > 0:
        _write_block(x_ptrs, dx_ptrs, remaining, coefficients, UNROLL, LINE, COLUMNS, ENTROPY)
    if blocks % 2 == 1:
        x_ptrs -= UNROLL * x_ptrs.shape[0]
        dx_ptrs -= BLOCK
        _write_block(x_ptrs, dx_ptrs, None, coefficients, UNROLL, LINE, COLUMNS, ENTROPY)
    for _ in range(blocks // 2):
        for _ in tl.static_range(2):
            x_ptrs -= UNROLL * x_ptrs.shape[0]
            dx_ptrs -= BLOCK
            _write_block(x_ptrs, dx_ptrs, None, coefficients, UNROLL, LINE, COLUMNS, ENTROPY)


@triton.jit
def write_row_zeros(
    dx_ptr,
    V,
    part,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ENDS: tl.constexpr,
):
    """Write a gradient that is exactly zero, without reading the row."""
    BLOCK: tl.constexpr = UNROLL * THREADS * VECTOR
    if ENDS:
        head, middle = find_middle(dx_ptr, V, VECTOR)
        if _is_first(part):
            ends = end_columns(head, middle, THREADS)
            nothing = tl.zeros((THREADS,), dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + ends, nothing, ends < V, eviction_policy="evict_first")
        dx_ptr = skip_head(dx_ptr, head, VECTOR)
        V = middle
    first, V = _columns_of(part, V, SEGMENT * BLOCK)
    dx_ptr += first
    columns = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), dx_ptr.dtype.element_ty)
    blocks, remaining = split_columns(V, BLOCK, COLUMNS)
    for _ in range(blocks):
        tl.store(dx_ptr + columns, zeros, eviction_policy="evict_first")
        dx_ptr += BLOCK
    if remaining > 0:
        tl.store(dx_ptr + columns, zeros, columns < remaining, eviction_policy="evict_first")


@triton.jit
def row_gradient(
    x_ptr,
    dx_ptr,
    V,
    target,
    known,
    dtarget,
    temperature,
    logit_scale,
    softcap,
    maximum,
    total,
    logp,
    entropy,
    dlogp,
    dentropy,
    part,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    DLOGITS_VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ENDS: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Gradient of a row, or of one program's part of it unless that is None.

    From g = dL/dlogp and h = dL/dH; h counts only if ENTROPY:

    dx_j = (g (1[j = target] - p_j) - h p_j (log p_j + H)) sharpness du_j / dx_j
    """
    factor = sharpness(temperature, logit_scale, softcap)
    g = dlogp * factor
    h = dentropy * factor
    constant = -(g + h * (entropy - LN2 * tl.log2(total))) / total
    slope = -h * LN2 / total
    if (g == 0.0) & (h == 0.0):
        write_row_zeros(dx_ptr, V, part, UNROLL, THREADS, VECTOR, COLUMNS, SEGMENT, ENDS)
    else:
        coefficients = (factor * LOG2E, logit_scale, softcap, maximum, constant, slope)
        write_row_gradient(
            x_ptr,
            dx_ptr,
            V,
            part,
            coefficients,
            UNROLL,
            THREADS,
            VECTOR,
            DLOGITS_VECTOR,
            COLUMNS,
            SEGMENT,
            ENDS,
            ENTROPY,
        )
        # One store for the target, after every thread has written its columns, instead of a
        # compare in each of them.
        p = tl.exp2(logp * LOG2E)
        dx_target = g * (1.0 - p)
        if ENTROPY:
            dx_target -= tl.where(p > 0.0, h * p * (logp + entropy), 0.0)
        tl.debug_barrier()
        known &= _owns(part, x_ptr, V, target, SEGMENT * UNROLL * THREADS * VECTOR, VECTOR, ENDS)
        tl.store(dx_ptr + target, (dx_target * dtarget).to(dx_ptr.dtype.element_ty), known)
