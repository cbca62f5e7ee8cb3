"""The sums of a batch and its metrics, from what every token reported, in one small launch."""

import triton.language as tl

from .launch import kernel, launch_single
from .library import launcher
from .objective import greater

BLOCK = 1024


@kernel
def _reduce_kernel(
    terms_ptr,
    stride_term: tl.int64,
    active_ptr,
    entropies_ptr,
    tokens: tl.int32,
    loss_ptr,
    sums_ptr,
    metrics_ptr,
    BLOCK: tl.constexpr,
):
    zeros = tl.zeros((BLOCK,), tl.float32)
    loss = zeros
    count = zeros
    kl = zeros
    entropy = zeros
    low = zeros
    high = zeros
    ratio = zeros
    highest = zeros
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < tokens
        if active_ptr is None:
            active = inside
        else:
            active = tl.load(active_ptr + token, inside, 0) != 0
        term_ptr = terms_ptr + token
        loss += tl.load(term_ptr, active, 0.0)
        count += active.to(tl.float32)
        kl += tl.load(term_ptr + stride_term, active, 0.0)
        if entropies_ptr is not None:
            entropy += tl.load(entropies_ptr + token, active, 0.0)
        clipped = tl.load(term_ptr + 2 * stride_term, active, 0.0)
        low += (clipped < 0.0).to(tl.float32)
        high += (clipped > 0.0).to(tl.float32)
        ratios = tl.load(term_ptr + 3 * stride_term, active, 0.0)
        ratio += ratios
        highest = greater(highest, ratios)
    total = tl.sum(loss)
    count = tl.sum(count)
    kl = tl.sum(kl)
    entropy = tl.sum(entropy)
    low = tl.sum(low)
    high = tl.sum(high)
    ratio = tl.sum(ratio)
    tl.store(loss_ptr, total)
    tl.store(sums_ptr, total)
    tl.store(sums_ptr + 1, count)
    tl.store(sums_ptr + 2, kl)
    tl.store(sums_ptr + 3, entropy)
    tl.store(sums_ptr + 4, count)
    tl.store(sums_ptr + 5, low)
    tl.store(sums_ptr + 6, high)
    tl.store(sums_ptr + 7, ratio)
    units = tl.maximum(count, 1.0)
    tl.store(metrics_ptr, kl / units)
    tl.store(metrics_ptr + 1, entropy / units)
    tl.store(metrics_ptr + 2, low / units)
    tl.store(metrics_ptr + 3, high / units)
    tl.store(metrics_ptr + 4, (low + high) / units)
    tl.store(metrics_ptr + 5, ratio / units)
    tl.store(metrics_ptr + 6, tl.reduce(highest, 0, greater))


@launcher
def reduce(terms, active, entropies, loss, sums, metrics):
    """Write the sums of `grpo_fused.metrics` and the means and the maximum that they give.

    Args:
        terms: (4, B, T) float32: loss, KL, clipped, ratio, as `fused_loss` writes them.
        active: (B, T) contiguous, nonzero = active, or None: all are.
        entropies: (B, T) float32 or None.
        loss, sums, metrics: (), (8,), (7,) float32.
    """
    launch_single(
        _reduce_kernel,
        terms,
        terms,
        terms.stride(0),
        active,
        entropies,
        terms.numel() // 4,
        loss,
        sums,
        metrics,
        BLOCK=BLOCK,
        num_warps=8,
    )
