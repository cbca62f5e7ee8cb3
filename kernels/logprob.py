"""Log-probability and entropy of one token per row of logits, and their gradient."""

import triton
import triton.language as tl

from .launch import arguments, kernel, launch_rows
from .row_gradient import row_gradient
from .softmax import (
    LN2,
    is_active,
    locate,
    log_probability,
    read_row,
    read_target,
    relative_logit,
    row_entropy,
    row_pointer,
    row_statistics,
    token_value,
)


@triton.jit
def gradient_pointer(dlogits, x_ptr, row, V, blocks: tl.constexpr):
    """Start of a row of the gradient: contiguous or, for `IN_PLACE`, where the logits are."""
    if hasattr(dlogits, "dtype"):
        BYTES: tl.constexpr = blocks.STORE_VECTOR * x_ptr.dtype.element_ty.primitive_bitwidth // 8
        return tl.multiple_of(dlogits + row.to(tl.int64) * V, BYTES)
    else:
        return x_ptr


# Stands for the pointer to the logits, whose alignment in a bundle would make a variant.
IN_PLACE = tl.constexpr(True)


def gradient_argument(dlogits, logits):
    """The gradient as an entry of a bundle."""
    in_place = dlogits is not None and dlogits.data_ptr() == logits.data_ptr()
    return IN_PLACE if in_place else dlogits


@kernel
def _logprob_fwd_kernel(
    logits_ptr,
    stride_sequence: tl.int64,
    stride_position: tl.int64,
    rows: tl.int32,
    positions: tl.int32,
    V: tl.int32,
    num_tokens: tl.int32,
    tokens,
    scales,
    statistics,
    SHARD: tl.constexpr,
    blocks: tl.constexpr,
):
    sequence, position, token = locate(tl.program_id(0), positions, num_tokens)
    inside = position < num_tokens
    if inside:
        active = is_active(tokens.active, token, inside)
        target_id = tl.load(tokens.ids + token).to(tl.int64)
        logp = 0.0
        entropy = 0.0
        maximum = 0.0
        total = 1.0
        if active:
            x_ptr = row_pointer(
                logits_ptr, sequence, position, stride_sequence, stride_position, blocks
            )
            row = read_row(
                x_ptr, V, token_value(tokens.temperature, sequence, token, inside), scales
            )
            target = read_target(row, target_id, active)
            maximum, total, weighted = row_statistics(
                row, statistics.entropies is not None, "evict_first", blocks
            )
            if SHARD:
                logp = LN2 * relative_logit(target, row, maximum)
                entropy = weighted
            else:
                logp = log_probability(target, row, maximum, total)
                entropy = row_entropy(total, weighted)
        tl.store(statistics.logps + token, logp)
        if statistics.entropies is not None:
            tl.store(statistics.entropies + token, entropy)
        if statistics.maxima is not None:
            tl.store(statistics.maxima + token, maximum)
            tl.store(statistics.totals + token, total)


@kernel
def _logprob_bwd_kernel(
    logits_ptr,
    stride_sequence: tl.int64,
    stride_position: tl.int64,
    rows: tl.int32,
    positions: tl.int32,
    V: tl.int32,
    num_tokens: tl.int32,
    tokens,
    scales,
    statistics,
    derivatives,
    blocks: tl.constexpr,
):
    i = tl.program_id(0)
    sequence, position, token = locate(i, positions, num_tokens)
    x_ptr = row_pointer(logits_ptr, sequence, position, stride_sequence, stride_position, blocks)
    dx_ptr = gradient_pointer(derivatives.dlogits, x_ptr, i, V, blocks)
    # All loads of a token before the first use of one: they then cost one latency and not several.
    inside = position < num_tokens
    active = is_active(tokens.active, token, inside)
    target_id = tl.load(tokens.ids + token, inside).to(tl.int64)
    temperature = token_value(tokens.temperature, sequence, token, inside)
    maximum = tl.load(statistics.maxima + token, inside)
    total = tl.load(statistics.totals + token, inside)
    logp = tl.load(statistics.logps + token, inside)
    dlogp = tl.load(derivatives.dlogps + token, inside)
    entropy = 0.0
    dentropy = 0.0
    if derivatives.dentropies is not None:
        entropy = tl.load(statistics.entropies + token, inside)
        dentropy = tl.load(derivatives.dentropies + token, inside)
    # Upstream gradients of masked tokens may be NaN; their statistics are 0 and 1.
    row = read_row(x_ptr, V, tl.where(active, temperature, 1.0), scales)
    target = read_target(row, target_id, active)
    if scales.logit_softcap is not None:
        # Between the load of the target's logit, of which its slope is computed, and the columns'
        # stores: in place, a faster warp would overwrite it.
        tl.debug_barrier()
    # NaN where the target is not in the vocabulary; in a shard of it, it may be in another one.
    dlogp = tl.where(active, tl.where(logp == logp, dlogp, float("nan")), 0.0)
    row_gradient(
        row,
        dx_ptr,
        target,
        maximum,
        total,
        logp,
        entropy,
        dlogp,
        tl.where(active, dentropy, 0.0),
        derivatives.dentropies is not None,
        blocks,
    )


def logprob_fwd(logits, tokens, scales, statistics, shard):
    """Write log-probabilities, entropies and the statistics that the gradient starts from.

    Args:
        logits: (B, L, V) with L = T or T + 1.
        tokens, scales, statistics: `grpo_fused.bundles`; of the tokens ids, active and temperature
            count. Statistics that are None are not written.
        shard: whether the columns are a part of the vocabulary: see `grpo_fused.parallel.merge`.
    """
    launch_rows(
        _logprob_fwd_kernel,
        logits,
        tokens.ids.shape[1],
        arguments(tokens),
        arguments(scales),
        statistics,
        shard,
        min_blocks_per_sm=2,
    )


def logprob_bwd(logits, tokens, scales, statistics, derivatives):
    """Write the gradient in the logits.

    Args:
        logits, tokens, scales, statistics: as `logprob_fwd`, which has written the statistics.
        derivatives: `grpo_fused.bundles`; derivatives.dlogits is contiguous or logits itself.
    """
    dlogits = derivatives.dlogits
    derivatives = arguments(derivatives._replace(dlogits=None))
    derivatives = derivatives._replace(dlogits=gradient_argument(dlogits, logits))
    launch_rows(
        _logprob_bwd_kernel,
        logits,
        tokens.ids.shape[1],
        arguments(tokens),
        arguments(scales),
        arguments(statistics),
        derivatives,
        dlogits=dlogits,
    )
