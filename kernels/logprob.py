"""Log-probability and entropy of one token per row of logits, and their gradient."""

import triton
import triton.language as tl

from .launch import arguments, kernel, launch_rows
from .row_gradient import derivative, row_gradient
from .softmax import (
    LN2,
    Softmax,
    is_active,
    locate,
    read_row,
    read_target,
    relative_logit,
    row_pointer,
    row_statistics,
    softmax,
    token_value,
)
from .support import add_kept_gradient, keep_logits, kept_columns, kept_statistics, token_arguments


@triton.jit
def gradient_pointer(dlogits, x_ptr, row, V, blocks: tl.constexpr):
    """Start of a row of the gradient: in memory of its own or, for `IN_PLACE`, over the logits."""
    if hasattr(dlogits, "dtype"):
        BYTES: tl.constexpr = blocks.STORE_VECTOR * dlogits.dtype.element_ty.primitive_bitwidth // 8
        columns = V
        if blocks.PADDING > 1:
            columns = tl.cdiv(V, blocks.PADDING) * blocks.PADDING
        return tl.multiple_of(dlogits + row.to(tl.int64) * columns, BYTES)
    else:
        return x_ptr


# Stands for the pointer to the logits, whose alignment in a bundle would make a variant.
IN_PLACE = tl.constexpr(True)


def gradient_argument(dlogits, logits):
    """The gradient as an entry of a bundle."""
    in_place = dlogits is not None and dlogits.data_ptr() == logits.data_ptr()
    return IN_PLACE if in_place else dlogits


@triton.jit
def _softmax_of(target, row, statistics, ENTROPY: tl.constexpr, SHARD: tl.constexpr):
    """The `Softmax` of a row, or of a SHARD what `grpo_fused.parallel.merge` takes."""
    if SHARD:
        maximum, total, weighted = statistics
        return Softmax(maximum, total, relative_logit(target, row, maximum) * LN2, weighted)
    else:
        return softmax(target, row, statistics, ENTROPY)


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
        kept_logp = 0.0
        kept_entropy = 0.0
        kept_maximum = 0.0
        kept_total = 1.0
        if active:
            x_ptr = row_pointer(
                logits_ptr, sequence, position, stride_sequence, stride_position, blocks
            )
            row = read_row(
                x_ptr, V, token_value(tokens.temperature, sequence, token, inside), scales
            )
            target = read_target(row, target_id, active)
            if tokens.support is not None:
                KEPT_ENTROPY: tl.constexpr = statistics.kept_entropies is not None
                kept = kept_columns(tokens.support, token, active)
                found, known = kept_statistics(
                    row, kept, target, KEPT_ENTROPY, SHARD, False, blocks
                )
                kept_maximum, kept_total, kept_logp, kept_entropy = _softmax_of(
                    target, row, found, KEPT_ENTROPY, SHARD
                )
                kept_logp = tl.where(known, kept_logp, float("nan"))
            if statistics.logps is not None:
                ENTROPY: tl.constexpr = statistics.entropies is not None
                found = row_statistics(row, ENTROPY, "evict_first", blocks)
                maximum, total, logp, entropy = _softmax_of(target, row, found, ENTROPY, SHARD)
        _store(statistics[:4], token, (logp, entropy, maximum, total))
        _store(statistics[4:], token, (kept_logp, kept_entropy, kept_maximum, kept_total))


@triton.jit
def _store(ptrs, token, values):
    for i in tl.static_range(4):
        if ptrs[i] is not None:
            tl.store(ptrs[i] + token, values[i])


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
    maximum = 0.0
    total = 1.0
    logp = 0.0
    dlogp = 0.0
    if derivatives.dlogps is not None:
        maximum = tl.load(statistics.maxima + token, inside)
        total = tl.load(statistics.totals + token, inside)
        logp = tl.load(statistics.logps + token, inside)
        dlogp = tl.load(derivatives.dlogps + token, inside)
    entropy = 0.0
    dentropy = 0.0
    if derivatives.dentropies is not None:
        entropy = tl.load(statistics.entropies + token, inside)
        dentropy = tl.load(derivatives.dentropies + token, inside)
    if tokens.support is not None:
        kept = kept_columns(tokens.support, token, active)
        kept_logp = tl.load(statistics.kept_logps + token, inside)
    # Upstream gradients of masked tokens may be NaN; their statistics are 0 and 1.
    row = read_row(x_ptr, V, tl.where(active, temperature, 1.0), scales)
    target = read_target(row, target_id, active)
    if scales.logit_softcap is not None:
        # Between the load of the target's logit, of which its slope is computed, and the columns'
        # stores: in place, a faster warp would overwrite it.
        tl.debug_barrier()
    # NaN where the target is not in the vocabulary; in a shard of it, it may be in another one.
    dlogp = tl.where(active, tl.where(logp == logp, dlogp, float("nan")), 0.0)
    dentropy = tl.where(active, dentropy, 0.0)
    if tokens.support is not None:
        keep_logits(row, kept, blocks)
        dlogp = tl.where(active & (kept_logp != kept_logp), float("nan"), dlogp)
    over_all = Softmax(maximum, total, logp, entropy)
    to_all = derivative(row, over_all, dlogp, dentropy)
    ENTROPY: tl.constexpr = derivatives.dentropies is not None
    row_gradient(row, dx_ptr, target, over_all, to_all, ENTROPY, blocks)
    if tokens.support is not None:
        # Not before the columns, for which they would take registers.
        kept_maximum = tl.load(statistics.kept_maxima + token, inside)
        kept_total = tl.load(statistics.kept_totals + token, inside)
        kept_dlogp = tl.load(derivatives.kept_dlogps + token, inside)
        kept_entropy = 0.0
        kept_dentropy = 0.0
        if derivatives.kept_dentropies is not None:
            kept_entropy = tl.load(statistics.kept_entropies + token, inside)
            kept_dentropy = tl.load(derivatives.kept_dentropies + token, inside)
        # Whatever it is for masked tokens: they have no kept columns.
        kept_dlogp = tl.where(kept_logp == kept_logp, kept_dlogp, float("nan"))
        over_kept = Softmax(kept_maximum, kept_total, kept_logp, kept_entropy)
        to_kept = derivative(row, over_kept, kept_dlogp, kept_dentropy)
        add_kept_gradient(
            row,
            dx_ptr,
            target,
            kept,
            (over_all, over_kept),
            (to_all, to_kept),
            ENTROPY,
            derivatives.kept_dentropies is not None,
            blocks,
        )


def logprob_fwd(logits, tokens, scales, statistics, shard):
    """Write log-probabilities, entropies and the statistics that the gradient starts from.

    Args:
        logits: (B, L, V) with L = T or T + 1.
        tokens, scales, statistics: `grpo_fused.bundles`; of the tokens ids, active, temperature
            and support count. Statistics that are None are not written; without those of the
            vocabulary the kept columns are all that is read.
        shard: whether the columns are a part of the vocabulary: see `grpo_fused.parallel.merge`.
    """
    launch_rows(
        _logprob_fwd_kernel,
        logits,
        tokens.ids.shape[1],
        token_arguments(tokens),
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
            Without dlogps and dentropies the gradient over the vocabulary is 0.
    """
    dlogits = derivatives.dlogits
    derivatives = arguments(derivatives._replace(dlogits=None))
    derivatives = derivatives._replace(dlogits=gradient_argument(dlogits, logits))
    launch_rows(
        _logprob_bwd_kernel,
        logits,
        tokens.ids.shape[1],
        token_arguments(tokens, dlogits),
        arguments(scales),
        arguments(statistics),
        derivatives,
        dlogits=dlogits,
    )
