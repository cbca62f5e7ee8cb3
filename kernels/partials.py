"""Kernel: statistics of a row's segments, one program each, for launches of too few rows.

What a lane found in a segment is left in memory. The next launch merges it in the order in which
one program alone would have, so a row has the same result, bit for bit, however many programs
share it. Nothing waits for another program: the end of a launch is what it waits for.
"""

import torch
import triton.language as tl

from .columns import locate, row_pointer
from .launch import argument, kernel, launch_rows, sharing
from .online_softmax import LOG2E, scalar, sharpness, token_value
from .row_statistics import count_segments, other_columns, partial_pointer, segment_statistics


@kernel
def _partials_kernel(
    logits_ptr,
    stride_sequence: tl.int64,
    stride_position: tl.int64,
    rows: tl.int32,
    positions: tl.int32,
    V: tl.int32,
    tokens: tl.int32,
    ids_ptr,
    active_ptr,
    temperature,
    logit_scale,
    logit_softcap,
    partials_ptr,
    slots: tl.int32,
    targets_ptr,
    parts: tl.int32,
    ENTROPY: tl.constexpr,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ENDS: tl.constexpr,
):
    LINE: tl.constexpr = THREADS * VECTOR
    LANES: tl.constexpr = LINE if ENDS else THREADS
    logit_scale = scalar(logit_scale)
    softcap = logit_softcap
    if logit_softcap is not None:  # Triton 3.6 cannot hand None to `scalar`
        softcap = scalar(logit_softcap)
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    sequence, position, token = locate(row, positions, tokens)
    active = position < tokens
    if active and active_ptr is not None:
        active = tl.load(active_ptr + token) != 0
    if active:
        x_ptr = row_pointer(
            logits_ptr, sequence, position, stride_sequence, stride_position, VECTOR, ENDS
        )
        row_temperature = token_value(temperature, sequence, token)
        scale = sharpness(row_temperature, logit_scale, softcap) * LOG2E
        if part < count_segments(V, SEGMENT * UNROLL * LINE, VECTOR, ENDS):
            maximum, total, weighted = segment_statistics(
                x_ptr,
                V,
                part,
                scale,
                logit_scale,
                softcap,
                THREADS,
                UNROLL,
                VECTOR,
                COLUMNS,
                SEGMENT,
                ENDS,
                ENTROPY,
                "evict_last",
            )
            ptr = partial_pointer(partials_ptr, row, slots, part, LANES, ENTROPY)
            lanes = tl.arange(0, LANES)
            tl.store(ptr + lanes, maximum)
            tl.store(ptr + LANES + lanes, total)
            if ENTROPY:
                tl.store(ptr + 2 * LANES + lanes, weighted)
        if part == parts - 1:  # the segment of this program is the shortest
            target = tl.load(ids_ptr + token).to(tl.int64)
            known = (target >= 0) & (target < V)
            tl.store(targets_ptr + row, tl.load(x_ptr + target, known, float("nan")).to(tl.float32))
            if ENDS:
                maximum, total, weighted = other_columns(
                    x_ptr,
                    V,
                    scale,
                    logit_scale,
                    softcap,
                    THREADS,
                    LINE,
                    VECTOR,
                    ENTROPY,
                    "evict_last",
                )
                ptr = partial_pointer(partials_ptr, row, slots, parts, LANES, ENTROPY)
                threads = tl.arange(0, THREADS)
                tl.store(ptr + threads, maximum)
                tl.store(ptr + LANES + threads, total)
                if ENTROPY:
                    tl.store(ptr + 2 * LANES + threads, weighted)


def partials(logits, ids, active, temperature, logit_scale, logit_softcap, entropy):
    """(partials or None, their slots per row, logits of the targets or None, programs per row).

    None, and one program, if the launch has rows enough without; otherwise the kernel is launched.
    """
    shared = sharing(logits)
    if shared is None:
        return None, 0, None, 1
    parts, slots, lanes = shared
    rows = logits.shape[0] * logits.shape[1]
    values = (3 if entropy else 2) * lanes
    found = torch.empty(rows * slots * values, dtype=torch.float32, device=logits.device)
    targets = torch.empty(rows, dtype=torch.float32, device=logits.device)
    launch_rows(
        _partials_kernel,
        logits,
        ids.shape[1],
        ids,
        active,
        argument(temperature),
        logit_scale,
        logit_softcap,
        found,
        slots,
        targets,
        parts=parts,
        crowd=2,
        ENTROPY=entropy,
    )
    return found, slots, targets, parts
