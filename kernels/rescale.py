"""The upstream gradient, applied to a gradient that was made before it was known."""

import triton.language as tl

from .columns import end_columns, find_middle, row_pointer, skip_head, split_columns
from .launch import kernel, launch_rows
from .library import launcher
from .online_softmax import scalar


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
    ENDS: tl.constexpr,
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
                ENDS,
            )
            middle = V
            if ENDS:
                head, middle = find_middle(x_ptr, V, VECTOR)
                ends = end_columns(head, middle, THREADS)
                end = tl.load(x_ptr + ends, ends < V, 0.0).to(tl.float32) * factor
                tl.store(x_ptr + ends, end.to(dtype), ends < V)
                x_ptr = skip_head(x_ptr, head, VECTOR)
            blocks, remaining = split_columns(middle, BLOCK, COLUMNS)
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
