"""Device functions for the gradient of one row of logits, made from its statistics."""

import triton
import triton.language as tl

from .online_softmax import FLOOR, LN2, LOG2E, capped, load, sharpness, split_columns


@triton.jit
def _gradient(
    x, scale, logit_scale, softcap, maximum, constant, slope, dtype, ENTROPY: tl.constexpr
):
    u, du = capped(x, logit_scale, softcap)
    z = tl.fma(u, scale, -maximum)
    factor = constant
    if ENTROPY:
        factor = tl.fma(tl.maximum(z, FLOOR), slope, constant)
    return (tl.exp2(z) * factor * du).to(dtype)


@triton.jit
def write_row_gradient(
    x_ptr,
    dx_ptr,
    V,
    scale,
    logit_scale,
    softcap,
    maximum,
    constant,
    slope,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Write dx_j = 2^z_j (constant + slope z_j) du_j / dx_j for every column; dx may be x itself.

    Backwards through the row: what the statistics read last is what the caches still hold.
    """
    columns = tl.arange(0, BLOCK)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    blocks, remaining = split_columns(V, BLOCK, COLUMNS)
    x_ptr += blocks * BLOCK
    dx_ptr += blocks * BLOCK
    if remaining > 0:
        x = load(x_ptr, remaining, BLOCK, VECTOR, "evict_first")
        dx = _gradient(x, scale, logit_scale, softcap, maximum, constant, slope, dtype, ENTROPY)
        tl.store(dx_ptr + columns, dx, columns < remaining, eviction_policy="evict_first")
    for _ in range(blocks):
        x_ptr -= BLOCK
        dx_ptr -= BLOCK
        x = load(x_ptr, None, BLOCK, VECTOR, "evict_first")
        dx = _gradient(x, scale, logit_scale, softcap, maximum, constant, slope, dtype, ENTROPY)
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
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Gradient of a row from g = dL/dlogp and h = dL/dH; h counts only if ENTROPY.

    dx_j = (g (1[j = target] - p_j) - h p_j (log p_j + H)) sharpness du_j / dx_j
    """
    factor = sharpness(temperature, logit_scale, softcap)
    g = dlogp * factor
    h = dentropy * factor
    constant = -(g + h * (entropy - LN2 * tl.log2(total))) / total
    slope = -h * LN2 / total
    if (g == 0.0) & (h == 0.0):
        write_row_zeros(dx_ptr, V, BLOCK, COLUMNS)
    else:
        write_row_gradient(
            x_ptr,
            dx_ptr,
            V,
            LOG2E * factor,
            logit_scale,
            softcap,
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
        tl.store(dx_ptr + target, (dx_target * dtarget).to(dx_ptr.dtype.element_ty), known)
