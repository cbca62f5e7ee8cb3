"""The loss in one launch: statistics of a row, its weighted token loss, and its gradient."""

import triton
import triton.language as tl

from .launch import argument, arguments, kernel, launch_rows
from .logprob import gradient_argument, gradient_pointer
from .objective import KL_ESTIMATORS, OBJECTIVES
from .row_gradient import derivative, row_gradient
from .softmax import (
    Softmax,
    is_active,
    locate,
    read_row,
    read_target,
    row_pointer,
    row_statistics,
    softmax,
    token_value,
)
from .support import add_kept_gradient, kept_columns, kept_statistics, token_arguments
from .token_loss import has_gradient, token_constants, token_loss

FLAGS = (tl.constexpr(False), tl.constexpr(True))  # made once, not with every launch


@triton.jit
def _choose(SECOND: tl.constexpr, first, second):
    if SECOND:
        return second
    else:
        return first


@kernel
def _fused_loss_kernel(
    logits_ptr,
    stride_sequence: tl.int64,
    stride_position: tl.int64,
    rows: tl.int32,
    positions: tl.int32,
    V: tl.int32,
    num_tokens: tl.int32,
    tokens,
    scales,
    formula,
    outputs,
    blocks: tl.constexpr,
):
    KEPT: tl.constexpr = tokens.support is not None
    HAS_ENTROPY: tl.constexpr = outputs.entropies is not None
    ENTROPY: tl.constexpr = HAS_ENTROPY and not formula.over.entropy
    KEPT_ENTROPY: tl.constexpr = HAS_ENTROPY and formula.over.entropy
    # Without a term over the vocabulary the kept columns are all that is read.
    KL_OVER_ALL: tl.constexpr = tokens.ref_logps is not None and not formula.over.kl
    READS: tl.constexpr = (not formula.over.policy) or KL_OVER_ALL or ENTROPY
    DENTROPY: tl.constexpr = tokens.w_entropy is not None and not formula.over.entropy
    KEPT_DENTROPY: tl.constexpr = tokens.w_entropy is not None and formula.over.entropy
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        sequence, position, token = locate(i, positions, num_tokens)
        x_ptr = row_pointer(
            logits_ptr, sequence, position, stride_sequence, stride_position, blocks
        )
        # All at once, of masked tokens too, so that a row waits for memory once before it is read.
        inside = position < num_tokens
        active = is_active(tokens.active, token, inside)
        target_id = tl.load(tokens.ids + token, inside).to(tl.int64)
        temperature = token_value(tokens.temperature, sequence, token, inside)
        constants = token_constants(tokens, formula, sequence, token, inside, active)
        row = read_row(x_ptr, V, tl.where(active, temperature, 1.0), scales)
        target = read_target(row, target_id, active)
        if KEPT:
            kept = kept_columns(tokens.support, token, active)
        loss = 0.0
        dlogp = 0.0
        dkl_logp = 0.0
        dentropy = 0.0
        kl = 0.0
        clipped = 0.0
        ratio = 0.0
        logp = 0.0
        entropy = 0.0
        maximum = 0.0
        total = 1.0
        kept_logp = 0.0
        kept_entropy = 0.0
        kept_maximum = 0.0
        kept_total = 1.0
        if active:
            known = target.known
            if KEPT:
                statistics, known = kept_statistics(
                    *(row, kept, target, KEPT_ENTROPY, False, outputs.dlogits is not None, blocks)
                )
                kept_maximum, kept_total, kept_logp, kept_entropy = softmax(
                    target, row, statistics, KEPT_ENTROPY
                )
            if READS:
                # A hint of what the gradient will read again; the numbers do not depend on it.
                if (outputs.dlogits is not None) & has_gradient(constants):
                    statistics = row_statistics(row, ENTROPY, "evict_last", blocks)
                else:
                    statistics = row_statistics(row, ENTROPY, "evict_first", blocks)
                maximum, total, logp, entropy = softmax(target, row, statistics, ENTROPY)
            loss, dlogp, dkl_logp, dentropy, kl, clipped, ratio = token_loss(
                _choose(formula.over.policy, logp, kept_logp),
                _choose(formula.over.kl, logp, kept_logp),
                _choose(formula.over.entropy, entropy, kept_entropy),
                known,
                constants,
                tokens,
                formula,
            )
        if inside:
            tl.store(outputs.loss + token, loss)
            tl.store(outputs.kl + token, kl)
            tl.store(outputs.clipped + token, clipped)
            tl.store(outputs.ratio + token, ratio)
            tl.store(outputs.logps + token, _choose(formula.over.policy, logp, kept_logp))
            if outputs.entropies is not None:
                found = _choose(formula.over.entropy, entropy, kept_entropy)
                tl.store(outputs.entropies + token, found)
        if outputs.dlogits is not None:
            # Not i, which is a Python number in the interpreter.
            index = sequence * positions + position
            dx_ptr = gradient_pointer(outputs.dlogits, x_ptr, index, V, blocks)
            over_all = Softmax(maximum, total, logp, entropy)
            to_all = derivative(
                row,
                over_all,
                _choose(formula.over.policy, dlogp, dkl_logp),
                _choose(formula.over.entropy, dentropy, 0.0),
            )
            row_gradient(row, dx_ptr, target, over_all, to_all, DENTROPY, blocks)
            if KEPT:
                over_kept = Softmax(kept_maximum, kept_total, kept_logp, kept_entropy)
                to_kept = derivative(
                    row,
                    over_kept,
                    _choose(formula.over.policy, dkl_logp, dlogp),
                    _choose(formula.over.entropy, 0.0, dentropy),
                )
                add_kept_gradient(
                    row,
                    dx_ptr,
                    target,
                    kept,
                    (over_all, over_kept),
                    (to_all, to_kept),
                    DENTROPY,
                    KEPT_DENTROPY,
                    blocks,
                )


def fused_loss(logits, tokens, scales, formula, outputs):
    """Write the loss of every token, the terms of its metrics, and the gradient in the logits.

        loss = w_policy objective(logp, log_ratio, advantage) + w_kl KL - w_entropy H

    Args:
        logits: (B, L, V) with L = T or T + 1; the last of T + 1 positions has gradient zero.
        tokens, scales, formula, outputs: `grpo_fused.bundles`. Masked tokens are not read and
            report 0. outputs.dlogits is contiguous, or logits itself, or None.
    """
    formula = formula._replace(
        objective=OBJECTIVES[formula.objective],
        params=tuple(formula.params),
        kl_estimator=KL_ESTIMATORS[formula.kl_estimator],
        bias_correction=FLAGS[formula.bias_correction],
        grad_scale=argument(formula.grad_scale),
        over=formula.over._make([FLAGS[flag] for flag in formula.over]),
        uses_sampling=FLAGS[formula.uses_sampling],
    )
    launch_rows(
        _fused_loss_kernel,
        logits,
        tokens.ids.shape[1],
        token_arguments(tokens, outputs.dlogits),
        arguments(scales),
        formula,
        outputs._replace(dlogits=gradient_argument(outputs.dlogits, logits)),
        dlogits=outputs.dlogits,
        persistent=True,
        min_blocks_per_sm=1,
    )
