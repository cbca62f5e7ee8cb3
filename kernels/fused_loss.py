"""The loss in one launch: statistics of a row, its weighted token loss, and its gradient."""

import triton.language as tl

from .launch import argument, arguments, kernel, launch_rows
from .logprob import gradient_argument, gradient_pointer
from .objective import KL_ESTIMATORS, OBJECTIVES
from .row_gradient import row_gradient
from .softmax import (
    is_active,
    locate,
    log_probability,
    read_row,
    read_target,
    row_entropy,
    row_pointer,
    row_statistics,
    token_value,
)
from .token_loss import has_gradient, token_constants, token_loss


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
        if active:
            # A hint of what the gradient will read again; the numbers do not depend on it.
            if (outputs.dlogits is not None) & has_gradient(constants):
                maximum, total, weighted = row_statistics(
                    row, outputs.entropies is not None, "evict_last", blocks
                )
            else:
                maximum, total, weighted = row_statistics(
                    row, outputs.entropies is not None, "evict_first", blocks
                )
            logp = log_probability(target, row, maximum, total)
            if outputs.entropies is not None:
                entropy = row_entropy(total, weighted)
            loss, dlogp, dentropy, kl, clipped, ratio = token_loss(
                logp, entropy, target.known, constants, tokens, formula
            )
        if inside:
            tl.store(outputs.loss + token, loss)
            tl.store(outputs.kl + token, kl)
            tl.store(outputs.clipped + token, clipped)
            tl.store(outputs.ratio + token, ratio)
            tl.store(outputs.logps + token, logp)
            if outputs.entropies is not None:
                tl.store(outputs.entropies + token, entropy)
        if outputs.dlogits is not None:
            # Not i, which is a Python number in the interpreter.
            index = sequence * positions + position
            dx_ptr = gradient_pointer(outputs.dlogits, x_ptr, index, V, blocks)
            row_gradient(
                row,
                dx_ptr,
                target,
                maximum,
                total,
                logp,
                entropy,
                dlogp,
                dentropy,
                tokens.w_entropy is not None,
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
        bias_correction=tl.constexpr(formula.bias_correction),
        grad_scale=argument(formula.grad_scale),
        uses_sampling=tl.constexpr(formula.uses_sampling),
    )
    launch_rows(
        _fused_loss_kernel,
        logits,
        tokens.ids.shape[1],
        arguments(tokens),
        arguments(scales),
        formula,
        outputs._replace(dlogits=gradient_argument(outputs.dlogits, logits)),
        dlogits=outputs.dlogits,
        persistent=True,
        min_blocks_per_sm=1,
    )
