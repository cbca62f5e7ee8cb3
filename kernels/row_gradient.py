"""Device functions: the gradient of one row of logits from its statistics."""

from typing import NamedTuple

import triton
import triton.language as tl

from .softmax import (
    FLOOR,
    LN2,
    LOG2E,
    line_pointers,
    lines_from,
    load,
    softcapped,
    split_columns,
    within_row,
)


class Derivative(NamedTuple):
    """Upstream gradients of a row, times the sharpness, and what every column makes of them."""

    g: tl.tensor  # dL/dlogp
    h: tl.tensor  # dL/dH
    constant: tl.tensor
    slope: tl.tensor


@triton.jit
def of_column(x, row, maximum, constant, slope, ENTROPY: tl.constexpr):
    """2^z (constant + slope z) du / dx of columns with logits x."""
    x, dx = softcapped(x, row)
    z = tl.fma(x, row.sharpness * LOG2E, -maximum)
    factor = constant
    if ENTROPY:
        factor = tl.fma(tl.maximum(z, FLOOR), slope, constant)
    return tl.exp2(z) * factor * dx


@triton.jit
def _write_block(
    x_ptrs,
    dx_ptrs,
    remaining,
    row,
    maximum,
    constant,
    slope,
    ENTROPY: tl.constexpr,
    blocks: tl.constexpr,
):
    """Write the gradient of a block from pointers to its first line, up to column `remaining`."""
    x = load(x_ptrs, remaining, "evict_first", blocks)
    dx = of_column(x, row, maximum, constant, slope, ENTROPY).to(dx_ptrs.dtype.element_ty)
    within = None
    if remaining is not None:
        within = within_row(remaining, blocks)
    tl.store(lines_from(dx_ptrs, blocks), dx, within, eviction_policy="evict_first")


@triton.jit
def _write_columns(
    row, columns, dx_ptr, maximum, constant, slope, ENTROPY: tl.constexpr, blocks: tl.constexpr
):
    """Write the gradient of the first columns of a row; dx may be x itself.

    In reverse order: the columns that the statistics read last are still cached. Two blocks per
    iteration share the cost of the loop; they are written out, because the compiler's own
    unrolling moves more addresses.
    """
    LINE: tl.constexpr = blocks.THREADS * blocks.VECTOR
    BLOCK: tl.constexpr = blocks.UNROLL * LINE
    whole, remaining = split_columns(columns, blocks)
    x_ptrs = line_pointers(row.ptr + whole * BLOCK, blocks)
    dx_ptrs = dx_ptr + whole * BLOCK + tl.arange(0, LINE)
    if remaining > 0:
        _write_block(x_ptrs, dx_ptrs, remaining, row, maximum, constant, slope, ENTROPY, blocks)
    if whole % 2 == 1:
        x_ptrs -= blocks.UNROLL * x_ptrs.shape[0]
        dx_ptrs -= BLOCK
        _write_block(x_ptrs, dx_ptrs, None, row, maximum, constant, slope, ENTROPY, blocks)
    for _ in range(whole // 2):
        for _ in tl.static_range(2):
            x_ptrs -= blocks.UNROLL * x_ptrs.shape[0]
            dx_ptrs -= BLOCK
            _write_block(x_ptrs, dx_ptrs, None, row, maximum, constant, slope, ENTROPY, blocks)


@triton.jit
def _write_zeros(dx_ptr, V, blocks: tl.constexpr):
    """Write a gradient that is exactly zero, without reading the row."""
    BLOCK: tl.constexpr = blocks.UNROLL * blocks.THREADS * blocks.VECTOR
    columns = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), dx_ptr.dtype.element_ty)
    whole, remaining = split_columns(V, blocks)
    for _ in range(whole):
        tl.store(dx_ptr + columns, zeros, eviction_policy="evict_first")
        dx_ptr += BLOCK
    if remaining > 0:
        tl.store(dx_ptr + columns, zeros, columns < remaining, eviction_policy="evict_first")


@triton.jit
def derivative(row, softmax, dlogp, dentropy):
    """The `Derivative` of g = dL/dlogp and h = dL/dH."""
    g = dlogp * row.sharpness
    h = dentropy * row.sharpness
    total = softmax.total
    constant = -(g + h * (softmax.entropy - LN2 * tl.log2(total))) / total
    return Derivative(g, h, constant, -h * LN2 / total)


@triton.jit
def of_target(softmax, derivative, ENTROPY: tl.constexpr):
    """The gradient in the (softcapped) logit of the target."""
    logp = softmax.logp
    p = tl.exp2(logp * LOG2E)
    dx = derivative.g * (1.0 - p)
    if ENTROPY:
        dx -= tl.where(p > 0.0, derivative.h * p * (logp + softmax.entropy), 0.0)
    return dx


@triton.jit
def is_zero(derivative):
    return (derivative.g == 0.0) & (derivative.h == 0.0)


@triton.jit
def row_gradient(
    row, dx_ptr, target, softmax, derivative, ENTROPY: tl.constexpr, blocks: tl.constexpr
):
    """Write the gradient of a row; h counts only with ENTROPY.

    dx_j = (g (1[j = target] - p_j) - h p_j (log p_j + H)) sharpness du_j / dx_j
    """
    if is_zero(derivative):
        _write_zeros(dx_ptr, row.V, blocks)
    else:
        # In words of 32 bits the last column of an odd vocabulary would be read with one behind it.
        IN_WORDS: tl.constexpr = (row.ptr.dtype.element_ty == tl.bfloat16) & (blocks.VECTOR > 1)
        LAST: tl.constexpr = IN_WORDS & (blocks.COLUMNS % 2 == 1)
        maximum, constant, slope = softmax.maximum, derivative.constant, derivative.slope
        columns = row.V
        dx_last = 0.0
        if LAST:
            columns = row.V - 1
            x = tl.load(row.ptr + columns).to(tl.float32)
            dx_last = of_column(x, row, maximum, constant, slope, ENTROPY)
        _write_columns(row, columns, dx_ptr, maximum, constant, slope, ENTROPY, blocks)
        # One store for the target, after every thread has written its columns, instead of a
        # comparison in each of them.
        dx_target = of_target(softmax, derivative, ENTROPY)
        # Between the columns' stores and the target's and last one's, which other threads make
        # to the same addresses or, in place, from logits that these overwrite.
        tl.debug_barrier()
        if LAST:
            dx_last = dx_last.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + columns, dx_last, target.id != columns)
        dx_target *= softcapped(target.x.to(tl.float32), row)[1]
        dx_target = dx_target.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + target.id, dx_target, target.known)
