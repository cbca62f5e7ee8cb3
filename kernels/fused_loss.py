"""The loss in one launch: a row's statistics, its objective, its weighted loss and its gradient."""

import triton.language as tl

from .columns import locate, row_pointer
from .launch import argument, gradient_arguments, kernel, launch_rows, store_width
from .library import launcher
from .logprob import is_active
from .objective import DIVERGENCES, OBJECTIVES
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
from .token_loss import token_loss


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
    active_ptr,
    advantages,
    old_logps_ptr,
    ref_logps_ptr,
    ratios,
    policy_mask,
    items,
    divisor,
    kl_items,
    kl_divisor,
    entropy_items,
    entropy_coef,
    temperature,
    logit_scale,
    logit_softcap,
    beta,
    grad_scale,
    knobs,
    terms_ptr,
    stride_term: tl.int64,
    logps_ptr,
    entropies_ptr,
    partials_ptr,
    slots: tl.int32,
    targets_ptr,
    parts: tl.int32,
    OBJECTIVE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
    DLOGITS_VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ENDS: tl.constexpr,
):
    logit_scale = scalar(logit_scale)
    softcap = logit_softcap
    if logit_softcap is not None:  # Triton 3.6 cannot hand None to `scalar`
        softcap = scalar(logit_softcap)
    for work in tl.range(tl.program_id(0), rows * parts, tl.num_programs(0), disable_licm=ENDS):
        row = work
        part = None
        if partials_ptr is not None:
            row = work // parts
            part = work % parts
        sequence, position, token = locate(row, positions, tokens)
        x_ptr = row_pointer(
            logits_ptr, sequence, position, stride_sequence, stride_position, VECTOR, ENDS
        )
        active = position < tokens
        if active:
            active = is_active(active_ptr, token)
        target, known, x, dtarget = read_target(
            x_ptr, targets_ptr, row, ids_ptr, token, V, active, logit_scale, softcap
        )
        loss = 0.0
        dlogp = 0.0
        dentropy = 0.0
        kl = 0.0
        clipped = 0.0
        ratio = 0.0
        logp = 0.0
        entropy = 0.0
        maximum = 0.0
        total = 1.0
        row_temperature = 1.0
        if active:
            row_temperature = token_value(temperature, sequence, token)
            scale = sharpness(row_temperature, logit_scale, softcap) * LOG2E
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
                "evict_last",
            )
            logp = log_probability(x, scale, maximum, total)
            if entropies_ptr is not None:
                entropy = row_entropy(total, weighted)
            loss, dlogp, dentropy, kl, clipped, ratio = token_loss(
                logp,
                entropy,
                known,
                sequence,
                token,
                advantages,
                old_logps_ptr,
                ref_logps_ptr,
                ratios,
                policy_mask,
                items,
                divisor,
                kl_items,
                kl_divisor,
                entropy_items,
                entropy_coef,
                beta,
                grad_scale,
                knobs,
                OBJECTIVE,
                DIVERGENCE,
                BIAS_CORRECTION,
            )
        reports = position < tokens
        if partials_ptr is not None:
            reports &= part == 0
        if reports:
            tl.store(logps_ptr + token, logp)
            if entropies_ptr is not None:
                tl.store(entropies_ptr + token, entropy)
            term_ptr = terms_ptr + token
            tl.store(term_ptr, loss)
            tl.store(term_ptr + stride_term, kl)
            tl.store(term_ptr + 2 * stride_term, clipped)
            tl.store(term_ptr + 3 * stride_term, ratio)
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
                    ENDS,
                ),
                V,
                target,
                known,
                dtarget,
                row_temperature,
                logit_scale,
                softcap,
                maximum,
                total,
                logp,
                entropy,
                dlogp,
                dentropy,
                part,
                UNROLL,
                THREADS,
                VECTOR,
                DLOGITS_VECTOR,
                COLUMNS,
                SEGMENT,
                ENDS,
                entropy_coef is not None,
            )


@launcher
def fused_loss(
    logits,
    ids,
    active,
    advantages,
    old_logps,
    ref_logps,
    ratios,
    policy_mask,
    items,
    divisor,
    kl_items,
    kl_divisor,
    entropy_items,
    entropy_coef,
    temperature,
    logit_scale,
    logit_softcap,
    beta,
    grad_scale,
    objective,
    knobs,
    divergence,
    bias_correction,
    terms,
    logps,
    entropies,
    dlogits,
):
    """Write what every token adds to the sums of the batch, and the gradient in the logits.

        weight = 1 / (max(items, 1) divisor)

    A value per token is a number or a contiguous tensor of (), (B,) or (B, T); a scalar is a number
    or a 0-d tensor.

    Args:
        logits: (B, L, V) with L = T or T + 1; the last of T + 1 positions has gradient zero.
        ids: (B, T) integer, contiguous, as are active, old_logps and ref_logps.
        active: nonzero = active, or None: all are; other rows are not read.
        advantages, ratios, policy_mask: values per token, the last two or None.
        items, divisor: value per token and scalar, of the weight of the policy term; kl_items and
            kl_divisor of the KL penalty's; entropy_items of the bonus's, whose divisor is 1.
        entropy_coef: scalar or None; needs entropies.
        temperature: value per token.
        logit_scale, logit_softcap, beta, grad_scale: scalars; no softcap is None.
        objective, knobs: name in OBJECTIVES and its arguments.
        divergence, bias_correction: name in DIVERGENCES; whether it is multiplied by the ratio.
        terms: (4, B, T) float32: loss, KL, clipped (-1, 0, +1), ratio.
        logps, entropies: (B, T) float32; entropies may be None and then costs nothing.
        dlogits: (B, L, V) or None; may be logits itself.
    """
    found, slots, targets, parts = partials(
        logits, ids, active, temperature, logit_scale, logit_softcap, entropies is not None
    )
    launch_rows(
        _fused_loss_kernel,
        logits,
        *gradient_arguments(dlogits),
        ids.shape[1],
        ids,
        active,
        argument(advantages),
        old_logps,
        ref_logps,
        argument(ratios),
        argument(policy_mask),
        argument(items),
        divisor,
        argument(kl_items),
        kl_divisor,
        argument(entropy_items),
        entropy_coef,
        argument(temperature),
        logit_scale,
        logit_softcap,
        beta,
        grad_scale,
        tuple(knobs),
        terms,
        terms.stride(0),
        logps,
        entropies,
        found,
        slots,
        targets,
        parts=1 if dlogits is None else parts,
        reads=found is None,
        writes=dlogits is not None,
        persistent=True,
        crowd=1,
        DLOGITS_VECTOR=store_width(logits, dlogits),
        OBJECTIVE=OBJECTIVES[objective],
        DIVERGENCE=DIVERGENCES[divergence],
        BIAS_CORRECTION=bias_correction,
    )
