"""The loss in one launch: a row's statistics, its objective, its weighted loss and its gradient."""

import triton
import triton.language as tl

from .launch import gradient_arguments, kernel, launch_rows, vector_width
from .library import launcher
from .objective import OBJECTIVES, clamped_exp, k3
from .online_softmax import (
    LOG2E,
    locate,
    log_probability,
    read_target,
    row_entropy,
    row_gradient,
    row_pointer,
    row_statistics,
    scalar,
)


@triton.jit
def _token_loss(
    logp,
    token,
    advantage,
    old_logps_ptr,
    ref_logps_ptr,
    beta,
    knobs,
    OBJECTIVE: tl.constexpr,
):
    """(loss, its derivative in logp, KL, -1 / 0 / +1 if clipped, ratio) of a token, unweighted."""
    log_ratio = tl.full((), 0.0, tl.float32)
    if old_logps_ptr is not None:
        log_ratio = logp - tl.load(old_logps_ptr + token)
    loss, dlogp, clipped = OBJECTIVE(logp, log_ratio, advantage, *knobs)
    kl = 0.0
    if ref_logps_ptr is not None:
        kl, dkl = k3(tl.load(ref_logps_ptr + token) - logp)
        beta = scalar(beta)
        loss += tl.where(beta == 0.0, 0.0, beta * kl)  # an infinite KL without weight is no loss
        dlogp += beta * dkl
    return loss, dlogp, kl, clipped, clamped_exp(log_ratio)[0]


@kernel
def _fused_loss_kernel(
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
    weights_ptr,
    advantages_ptr,
    advantages_stride_sequence: tl.int64,
    advantages_stride_position: tl.int64,
    old_logps_ptr,
    ref_logps_ptr,
    temperature,
    beta,
    grad_scale,
    knobs,
    terms_ptr,
    stride_term: tl.int64,
    logps_ptr,
    entropies_ptr,
    maxima_ptr,
    totals_ptr,
    dlogps_ptr,
    OBJECTIVE: tl.constexpr,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
    DLOGITS_VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    BLOCK: tl.constexpr = THREADS * UNROLL * VECTOR
    temperature = scalar(temperature)
    scale = LOG2E / temperature
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        sequence, position, token = locate(row, positions, tokens)
        x_ptr = row_pointer(
            logits_ptr, sequence, position, stride_sequence, stride_position, VECTOR
        )
        weight = tl.load(weights_ptr + token, position < tokens, 0.0)
        active = weight != 0.0
        target, known, x = read_target(x_ptr, ids_ptr, token, V, active)
        loss = 0.0
        dlogp = 0.0
        kl = 0.0
        clipped = 0.0
        ratio = 0.0
        logp = 0.0
        entropy = 0.0
        maximum = 0.0
        total = 1.0
        if active:
            maximum, total, weighted = row_statistics(
                x_ptr,
                V,
                scale,
                THREADS,
                UNROLL,
                VECTOR,
                COLUMNS,
                entropies_ptr is not None,
                "evict_last",
            )
            logp = log_probability(x, scale, maximum, total)
            if entropies_ptr is not None:
                entropy = row_entropy(total, weighted)
            advantage = tl.load(
                advantages_ptr
                + sequence.to(tl.int64) * advantages_stride_sequence
                + position.to(tl.int64) * advantages_stride_position
            ).to(tl.float32)
            loss, dlogp, kl, clipped, ratio = _token_loss(
                logp, token, advantage, old_logps_ptr, ref_logps_ptr, beta, knobs, OBJECTIVE
            )
            loss = tl.where(known, weight * loss, float("nan"))
            dlogp = tl.where(loss == loss, weight * dlogp * scalar(grad_scale), float("nan"))
        if position < tokens:
            tl.store(logps_ptr + token, logp)
            if entropies_ptr is not None:
                tl.store(entropies_ptr + token, entropy)
            if maxima_ptr is not None:
                tl.store(maxima_ptr + token, maximum)
                tl.store(totals_ptr + token, total)
                tl.store(dlogps_ptr + token, dlogp)
            term_ptr = terms_ptr + token
            tl.store(term_ptr, loss)
            tl.store(term_ptr + stride_term, active.to(tl.float32))
            tl.store(term_ptr + 2 * stride_term, kl)
            tl.store(term_ptr + 3 * stride_term, entropy)
            tl.store(term_ptr + 4 * stride_term, tl.where(clipped < 0, 1.0, 0.0))
            tl.store(term_ptr + 5 * stride_term, tl.where(clipped > 0, 1.0, 0.0))
            tl.store(term_ptr + 6 * stride_term, ratio)
        if dlogits_ptr is not None:
            row_gradient(
                x_ptr,
                row_pointer(
                    dlogits_ptr,
                    sequence,
                    position,
                    dlogits_stride_sequence,
                    dlogits_stride_position,
                    DLOGITS_VECTOR,
                ),
                V,
                target,
                known,
                temperature,
                maximum,
                total,
                logp,
                0.0,
                dlogp,
                0.0,
                BLOCK,
                VECTOR,
                COLUMNS,
                False,
            )


@launcher
def fused_loss(
    logits,
    ids,
    weights,
    advantages,
    old_logps,
    ref_logps,
    temperature,
    beta,
    grad_scale,
    objective,
    knobs,
    terms,
    logps,
    entropies,
    maxima,
    totals,
    dlogps,
    dlogits,
):
    """Write what every token adds to the sums of the batch, and the gradient in the logits.

    Args:
        logits: (B, L, V) with L = T or T + 1; the last of T + 1 positions has gradient zero.
        ids: (B, T) integer, contiguous, as are weights, old_logps and ref_logps.
        weights: (B, T) float32; rows of weight 0 are not read.
        advantages: (B, T) of any strides.
        temperature, beta, grad_scale: Python floats or 0-d tensors on the device of the logits.
        objective, knobs: name in OBJECTIVES and its arguments.
        terms: (7, B, T) float32: loss, 1 if active, KL, entropy, clipped low, clipped high, ratio.
        logps, entropies: (B, T) float32; entropies may be None and then costs nothing.
        maxima, totals, dlogps: (B, T) float32 or None, what `logprob_bwd` makes the gradient from.
        dlogits: (B, L, V) or None; may be logits itself.
    """
    launch_rows(
        _fused_loss_kernel,
        logits,
        *gradient_arguments(dlogits),
        ids.shape[1],
        ids,
        weights,
        advantages,
        *advantages.stride(),
        old_logps,
        ref_logps,
        temperature,
        beta,
        grad_scale,
        tuple(knobs),
        terms,
        terms.stride(0),
        logps,
        entropies,
        maxima,
        totals,
        dlogps,
        persistent=True,
        DLOGITS_VECTOR=1 if dlogits is None else vector_width(dlogits),
        OBJECTIVE=OBJECTIVES[objective],
    )
