"""The upstream gradient, applied to a gradient that was made before it was known."""

import triton.language as tl

from .launch import kernel, launch_rows
from .library import launcher
from .online_softmax import row_pointer, scalar, split_columns


@kernel
def _rescale_kernel(
    dlogits_ptr,
    stride_sequence: tl.int64,
    stride_position: tl.int64,
    rows: tl.int32,
    positions: tl.int32,
    V: tl.int32,
    grad_output,
    grad_scale,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Multiply by grad_output / grad_scale; a program that finds them equal returns at once."""
    grad_output = scalar(grad_output)
    grad_scale = scalar(grad_scale)
    if grad_output != grad_scale:
        BLOCK: tl.constexpr = THREADS * UNROLL * VECTOR
        dtype: tl.constexpr = dlogits_ptr.dtype.element_ty
        factor = grad_output / grad_scale
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            x_ptr = row_pointer(
                dlogits_ptr,
                row // positions,
                row % positions,
                stride_sequence,
                stride_position,
                VECTOR,
            )
            blocks, remaining = split_columns(V, BLOCK, COLUMNS)
            columns = tl.arange(0, BLOCK)
            for _ in range(blocks):
                x = tl.load(x_ptr + columns).to(tl.float32) * factor
                tl.store(x_ptr + columns, x.to(dtype))
                x_ptr += BLOCK
            if remaining > 0:
                x = tl.load(x_ptr + columns, columns < remaining, 0.0).to(tl.float32) * factor
                tl.store(x_ptr + columns, x.to(dtype), columns < remaining)


@launcher
def rescale(dlogits, grad_output, grad_scale):
    """Turn dlogits (B, L, V), made for the upstream gradient grad_scale, into grad_output's."""
    launch_rows(_rescale_kernel, dlogits, grad_output, grad_scale, writes=True, persistent=True)
