"""Log-probability and entropy of one token per row of logits, and their gradient."""

import triton
import triton.language as tl

from .columns import locate, row_pointer
from .launch import argument, gradient_arguments, kernel, launch_rows, sharing, store_width
from .library import launcher
from .online_softmax import (
    LOG2E,
    log_probability,
    read_target,
    row_entropy,
    scalar,
    sharpness,
    token_value,
)
from .partials import partials
from .row_gradient import row_gradient
from .row_statistics import row_statistics


@triton.jit
def is_active(active_ptr, token):
    """Whether the mask, if there is one, lets the token count."""
    if active_ptr is None:
        return True
    else:
        return tl.load(active_ptr + token) != 0


@kernel
def _logprob_fwd_kernel(
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
    logps_ptr,
    entropies_ptr,
    maxima_ptr,
    totals_ptr,
    partials_ptr,
    slots: tl.int32,
    targets_ptr,
    parts: tl.int32,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ENDS: tl.constexpr,
):
    logit_scale = scalar(logit_scale)
    softcap = logit_softcap
    if logit_softcap is not None:  # Triton 3.6 cannot hand None to `scalar`
        softcap = scalar(logit_softcap)
    row = tl.program_id(0)
    sequence, position, token = locate(row, positions, tokens)
    if position < tokens:
        active = is_active(active_ptr, token)
        logp = 0.0
        entropy = 0.0
        maximum = 0.0
        total = 1.0
        if active:
            x_ptr = row_pointer(
                logits_ptr, sequence, position, stride_sequence, stride_position, VECTOR, ENDS
            )
            row_temperature = token_value(temperature, sequence, token)
            scale = sharpness(row_temperature, logit_scale, softcap) * LOG2E
            _, _, x, _ = read_target(
                x_ptr, targets_ptr, row, ids_ptr, token, V, active, logit_scale, softcap
            )
            maximum, total, weighted = row_statistics(
                x_ptr,
                V,
                scale,
                logit_scale,
                softcap,
                partials_ptr,
                row,
                slots,
                THREADS,
                UNROLL,
                VECTOR,
                COLUMNS,
                SEGMENT,
                ENDS,
                entropies_ptr is not None,
                "evict_first",
            )
            logp = log_probability(x, scale, maximum, total)
            entropy = row_entropy(total, weighted)
        tl.store(logps_ptr + token, logp)
        if entropies_ptr is not None:
            tl.store(entropies_ptr + token, entropy)
        if maxima_ptr is not None:
            tl.store(maxima_ptr + token, maximum)
            tl.store(totals_ptr + token, total)


@kernel
def _logprob_bwd_kernel(
    logits_ptr,
    stride_sequence: tl.int64,
    stride_position: tl.int64,
    rows: tl.int32,
    positions: tl.int32,
    V: tl.int32,
    dlogits_ptr,
    dlogits_stride_sequence: tl.int64,
    dlogits_stride_position: tl.int64,
    tokens: tl.int32,
    ids_ptr,
    active_ptr,
    temperature,
    logit_scale,
    logit_softcap,
    logps_ptr,
    entropies_ptr,
    maxima_ptr,
    totals_ptr,
    dlogps_ptr,
    dentropies_ptr,
    parts: tl.int32,
    SHARED: tl.constexpr,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
    DLOGITS_VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ENDS: tl.constexpr,
):
    row = tl.program_id(0)
    part = None
    if SHARED:
        part = row % parts
        row = row // parts
    sequence, position, token = locate(row, positions, tokens)
    dx_ptr = row_pointer(
        dlogits_ptr,
        sequence,
        position,
        dlogits_stride_sequence,
        dlogits_stride_position,
        DLOGITS_VECTOR,
        ENDS,
    )
    x_ptr = row_pointer(
        logits_ptr, sequence, position, stride_sequence, stride_position, VECTOR, ENDS
    )
    logit_scale = scalar(logit_scale)
    softcap = logit_softcap
    if logit_softcap is not None:  # Triton 3.6 cannot hand None to `scalar`
        softcap = scalar(logit_softcap)
    row_temperature = 1.0
    active = position < tokens
    if active:
        active = is_active(active_ptr, token)
    if active:
        row_temperature = token_value(temperature, sequence, token)
    target, known, _, dtarget = read_target(
        x_ptr, None, row, ids_ptr, token, V, active, logit_scale, softcap
    )
    if softcap is not None:  # in place, a faster thread must not overwrite the logit it came from
        tl.debug_barrier()
    entropy = 0.0
    dentropy = 0.0
    if dentropies_ptr is not None:
        entropy = tl.load(entropies_ptr + token, active, 0.0)
        dentropy = tl.load(dentropies_ptr + token, active, 0.0)
    dlogp = tl.load(dlogps_ptr + token, active, 0.0)
    row_gradient(
        x_ptr,
        dx_ptr,
        V,
        target,
        known,
        dtarget,
        row_temperature,
        logit_scale,
        softcap,
        tl.load(maxima_ptr + token, active, 0.0),
        tl.load(totals_ptr + token, active, 1.0),
        tl.load(logps_ptr + token, active, 0.0),
        entropy,
        tl.where(active & (known == 0), float("nan"), dlogp),
        dentropy,
        part,
        UNROLL,
        THREADS,
        VECTOR,
        DLOGITS_VECTOR,
        COLUMNS,
        SEGMENT,
        ENDS,
        dentropies_ptr is not None,
    )


@launcher
def logprob_fwd(
    logits,
    ids,
    active,
    temperature,
    logit_scale,
    logit_softcap,
    logps,
    entropies,
    maxima,
    totals,
):
    """Write logps, entropies (B, T) and the statistics (B, T) that the gradient starts from.

    Args:
        logits: (B, L, V) with L = T or T + 1.
        ids, active: (B, T) contiguous; active of any dtype, nonzero = active, or None.
        temperature: number or tensor of (), (B,) or (B, T).
        logit_scale, logit_softcap: number or 0-d tensor; no softcap is None.
        entropies, maxima, totals: float32 as logps, or None and then not written.
    """
    found = partials(
        logits, ids, active, temperature, logit_scale, logit_softcap, entropies is not None
    )
    launch_rows(
        _logprob_fwd_kernel,
        logits,
        ids.shape[1],
        ids,
        active,
        argument(temperature),
        logit_scale,
        logit_softcap,
        logps,
        entropies,
        maxima,
        totals,
        *found[:3],
        parts=1,
        crowd=2,
        reads=found[0] is None,
    )


@launcher
def logprob_bwd(
    logits,
    ids,
    active,
    temperature,
    logit_scale,
    logit_softcap,
    logps,
    entropies,
    maxima,
    totals,
    dlogps,
    dentropies,
    dlogits,
):
    """Write dlogits (B, L, V), which may be logits itself, from dlogps and dentropies (B, T)."""
    shared = sharing(logits)
    launch_rows(
        _logprob_bwd_kernel,
        logits,
        *gradient_arguments(dlogits),
        ids.shape[1],
        ids,
        active,
        argument(temperature),
        logit_scale,
        logit_softcap,
        logps,
        entropies,
        maxima,
        totals,
        dlogps,
        dentropies,
        parts=1 if shared is None else shared[0],
        writes=True,
        SHARED=shared is not None,
        DLOGITS_VECTOR=store_width(logits, dlogits),
    )
