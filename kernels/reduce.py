"""Small kernels: sums and metrics of a batch, the upstream gradient, where packed sequences lie."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import argument, kernel, launch_rows, launch_small
from .objective import MEANS, SUMS, Terms, greater
from .softmax import row_pointer, scalar, split_columns

BLOCK = 512
PARTS = 64  # programs of a first stage at most; its results are one block of the second
ONE_STAGE = 8  # blocks of tokens that one program adds up faster than two launches


@triton.jit
def _read_terms(outputs, active_ptr, token, num_tokens):
    """The `Terms` of tokens."""
    active = token < num_tokens
    if active_ptr is not None:
        active = active & (tl.load(active_ptr + token, active, 0) != 0)
    counted = active.to(tl.float32)
    entropy = 0.0 * counted
    if outputs.entropies is not None:
        entropy = tl.load(outputs.entropies + token, active, 0.0)
    return Terms(
        tl.load(outputs.loss + token, active, 0.0),
        tl.load(outputs.kl + token, active, 0.0),
        entropy,
        counted,
        tl.load(outputs.clipped + token, active, 0.0),
        tl.load(outputs.ratio + token, active, 0.0),
        counted,
    )


@triton.jit
def _total(values, places, chosen):
    """Sum of the values at the places whose bits are set in `chosen`."""
    return tl.sum(tl.where((chosen >> places) & 1 != 0, values, 0.0))


@triton.jit
def _highest(values):
    """Their maximum, NaN if one of them is, which tl.max would drop."""
    total = tl.sum(values)
    return tl.where(total == total, tl.max(values), total)


class Results(NamedTuple):
    """Outputs of a reduction."""

    loss: torch.Tensor  # ()
    sums: torch.Tensor  # (8,)
    metrics: torch.Tensor  # (7,): means, and the greatest ratio


@triton.jit
def _write_sums(values, places, sums_ptr, NUMBER: tl.constexpr):
    for i in tl.static_range(NUMBER):
        tl.store(sums_ptr + i, _total(values, places, 1 << i))


@triton.jit
def _write_results(values, highest, places, results, tables: tl.constexpr):
    """Write the `Results` from lanes that belong to the sums at `places`."""
    _write_sums(values, places, results.sums, tables.SUMS)
    tl.store(results.loss, _total(values, places, 1))
    for i in tl.static_range(len(tables.NUMERATORS)):
        denominator = tl.maximum(_total(values, places, tables.DENOMINATORS[i]), 1.0)
        mean = _total(values, places, tables.NUMERATORS[i]) / denominator
        tl.store(results.metrics + i, mean)
    tl.store(results.metrics + len(tables.NUMERATORS), _highest(highest))


@kernel
def _reduce_kernel(
    outputs,
    active_ptr,
    num_tokens: tl.int32,
    functions,
    parts_ptr,
    results,
    tables: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A lane adds up one of the sums over one in BLOCK tokens of those of its program.

    One program writes the results; several write their sums and greatest ratios to parts (P, 9).
    """
    lanes = tl.arange(0, tables.PLACES * BLOCK)
    places = lanes // BLOCK
    values = tl.zeros((tables.PLACES * BLOCK,), tl.float32)
    highest = values
    part = tl.program_id(0)
    for start in range(part * BLOCK, num_tokens, tl.num_programs(0) * BLOCK):
        terms = _read_terms(outputs, active_ptr, start + lanes % BLOCK, num_tokens)
        for i in tl.static_range(len(functions)):
            values += tl.where(places == i, functions[i](terms).to(tl.float32), 0.0)
        highest = greater(highest, terms.ratio)
    if parts_ptr is None:
        _write_results(values, highest, places, results, tables)
    else:
        part_ptr = parts_ptr + part * (tables.SUMS + 1)
        _write_sums(values, places, part_ptr, tables.SUMS)
        tl.store(part_ptr + tables.SUMS, _highest(highest))


@kernel
def _reduce_parts_kernel(
    parts_ptr,
    num_parts: tl.int32,
    results,
    tables: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program. A lane is one of the sums of one program of the first stage."""
    lanes = tl.arange(0, tables.PLACES * PARTS)
    places = lanes // PARTS
    part = lanes % PARTS
    part_ptrs = parts_ptr + part * (tables.SUMS + 1)
    inside = part < num_parts
    values = tl.load(part_ptrs + places, inside & (places < tables.SUMS), 0.0)
    highest = tl.load(part_ptrs + tables.SUMS, inside, 0.0)
    _write_results(values, highest, places, results, tables)


def reduce(outputs, active, loss, sums, metrics):
    """Write the sums of `grpo_fused.losses.metrics`, their means, and the greatest ratio.

    In two stages if there are many tokens. The order of additions depends on their number alone.

    Args:
        outputs: what `fused_loss` has written; dlogits is None.
        active: (B, T) bool, contiguous, or None: all are.
        loss, sums, metrics: (), (8,), (7,) float32; the first of the sums is the loss.
    """
    functions, tables = _tables()
    results = Results(loss, sums, metrics)
    num_tokens = outputs.loss.numel()
    blocks = -(-num_tokens // BLOCK)  # triton.cdiv takes 3 us
    if blocks <= ONE_STAGE:
        args = (outputs, active, num_tokens, functions, None, results, tables)
        launch_small(_reduce_kernel, 1, loss, *args, BLOCK=BLOCK, num_warps=8)
        return
    num_parts = min(blocks, PARTS)
    parts = loss.new_empty(num_parts, len(sums) + 1)
    args = (outputs, active, num_tokens, functions, parts, None, tables)
    launch_small(_reduce_kernel, num_parts, loss, *args, BLOCK=BLOCK, num_warps=8)
    args = (parts, num_parts, results, tables)
    launch_small(_reduce_parts_kernel, 1, loss, *args, PARTS=PARTS, num_warps=4)


class Tables(NamedTuple):
    """The tables of `grpo_fused.losses.metrics`, a constexpr."""

    SUMS: int  # number
    PLACES: int  # their number, rounded up to a power of 2
    NUMERATORS: tuple[int, ...]  # of each mean, bits of the sums
    DENOMINATORS: tuple[int, ...]


@functools.cache
def _tables():
    """(functions of the sums, `Tables`): full once the package is imported."""
    numerators, denominators = zip(*MEANS.values(), strict=True)
    number = len(SUMS)
    places = triton.next_power_of_2(number)
    return tuple(SUMS.values()), Tables(number, places, numerators, denominators)


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
    blocks: tl.constexpr,
):
    """Multiply by grad_output / grad_scale; programs that find them equal return at once."""
    grad_output = scalar(grad_output)
    grad_scale = scalar(grad_scale)
    if grad_output != grad_scale:
        WIDTH: tl.constexpr = blocks.UNROLL * blocks.THREADS * blocks.VECTOR
        dtype: tl.constexpr = dlogits_ptr.dtype.element_ty
        factor = grad_output / grad_scale
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            sequence = row // positions
            position = row % positions
            x_ptr = row_pointer(
                dlogits_ptr, sequence, position, stride_sequence, stride_position, blocks
            )
            whole, remaining = split_columns(V, blocks)
            columns = tl.arange(0, WIDTH)
            for _ in range(whole):
                x = tl.load(x_ptr + columns).to(tl.float32) * factor
                tl.store(x_ptr + columns, x.to(dtype))
                x_ptr += WIDTH
            if remaining > 0:
                x = tl.load(x_ptr + columns, columns < remaining, 0.0).to(tl.float32) * factor
                tl.store(x_ptr + columns, x.to(dtype), columns < remaining)


def rescale(dlogits, grad_output, grad_scale):
    """Turn dlogits (B, L, V), made for the upstream gradient grad_scale, into grad_output's."""
    scales = (argument(grad_output), argument(grad_scale))
    launch_rows(_rescale_kernel, dlogits, *scales, persistent=True)


@kernel
def _locate_kernel(
    cu_seqlens_ptr,
    num_sequences: tl.int32,
    num_tokens: tl.int32,
    active_ptr,
    index_ptr,
    counts_ptr,
    BLOCK: tl.constexpr,
):
    """One program per sequence. It counts those of its tokens that exist. The first and the last
    sequence also own the tokens outside of all, so that every token gets an index.
    """
    sequence = tl.program_id(0)
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), num_tokens)
    stop = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence + 1), 0), num_tokens)
    start = start.to(tl.int32)
    stop = stop.to(tl.int32)
    first = tl.where(sequence == 0, 0, start)
    last = tl.where(sequence == num_sequences - 1, num_tokens, stop)
    count = tl.zeros((BLOCK,), tl.float32)
    for begin in range(first, last, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        tl.store(index_ptr + token, sequence.to(tl.int64), token < last)
        counted = (token >= start) & (token < stop)
        if active_ptr is not None:
            counted = counted & (tl.load(active_ptr + token, counted, 0) != 0)
        count += counted.to(tl.float32)
    tl.store(counts_ptr + sequence, tl.sum(count))


def locate(cu_seqlens, active, index, counts):
    """Write which sequence every token belongs to, and how many active tokens each has.

    Args:
        cu_seqlens: (B + 1,) int32 or int64, contiguous, B > 0; clamped to [0, N].
        active: (1, N) contiguous, nonzero = active, or None: all are.
        index: (N,) int64.
        counts: (B,) float32.
    """
    num_sequences = len(counts)
    args = (cu_seqlens, num_sequences, len(index), active, index, counts)
    launch_small(_locate_kernel, num_sequences, index, *args, BLOCK=BLOCK, num_warps=4)
