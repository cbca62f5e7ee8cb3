"""Launchers over hidden states and the LM head: those over logits, a chunk of rows at a time."""

import functools
from typing import NamedTuple

from .library import launcher
from .linear import Head


class RowLaunchers(NamedTuple):
    """Launchers over logits, of one implementation."""

    fused_loss: object
    logprob_fwd: object
    logprob_bwd: object


def linear_loss(
    over_logits,
    hidden,
    weight,
    bias,
    dtype,
    order,
    counts,
    ids,
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
    chunk_bytes,
    terms,
    logps,
    entropies,
    dhidden,
    dweight,
    dbias,
):
    """As `fused_loss.fused_loss`, over hidden states and a head: see `linear.Head`.

    What is masked is none of `order`; its outputs are 0.
    """
    gradients = (dhidden, dweight, dbias)
    head = Head(hidden, weight, bias, dtype, order, counts, ids, chunk_bytes, *gradients)
    writes = any(gradient is not None for gradient in gradients)
    per_token = (ids, advantages, old_logps, ref_logps, ratios, policy_mask)
    per_token = [head.pack(values) for values in per_token]
    items, kl_items, entropy_items, temperature = (
        head.pack(values) for values in (items, kl_items, entropy_items, temperature)
    )
    outputs = (terms, logps, entropies)
    packed = [None if t is None else head.packed(t) for t in outputs]
    memory = head.memory(min(head.chunk_rows, head.active))
    for start, middle, stop in head.chunks():
        states = head.states(start, stop)
        logits = head.logits(states, memory[: stop - start])
        for first, last, wanted in ((start, middle, writes), (middle, stop, False)):
            if first == last:
                continue
            x = head.batch(logits[first - start : last - start])
            of_ids, *rest = (head.cut(values, first, last) for values in per_token)
            over_logits.fused_loss(
                *(x, of_ids, None, *rest),
                *(
                    head.cut(items, first, last),
                    divisor,
                    head.cut(kl_items, first, last),
                    kl_divisor,
                ),
                *(head.cut(entropy_items, first, last), entropy_coef),
                *(head.cut(temperature, first, last), logit_scale, logit_softcap, beta, grad_scale),
                *(objective, knobs, divergence, bias_correction),
                *(head.cut(output, first, last) for output in packed),
                x if wanted else None,
            )
        if writes and middle > start:
            live = middle - start
            head.backward(start, middle, states[:live], logits[:live])
    for output, values in zip(outputs, packed, strict=True):
        if output is not None:
            head.unpack(output, values)


def linear_logprob_fwd(
    over_logits,
    hidden,
    weight,
    bias,
    dtype,
    order,
    counts,
    ids,
    temperature,
    logit_scale,
    logit_softcap,
    chunk_bytes,
    logps,
    entropies,
    maxima,
    totals,
    logits,
):
    """As `logprob.logprob_fwd`, over hidden states and a head; `logits` (n, V) keeps them."""
    head = Head(hidden, weight, bias, dtype, order, counts, ids, chunk_bytes)
    ids, temperature = head.pack(ids), head.pack(temperature)
    outputs = (logps, entropies, maxima, totals)
    packed = [None if t is None else head.packed(t) for t in outputs]
    memory = head.memory(min(head.chunk_rows, head.active)) if logits is None else logits
    for start, _, stop in head.chunks():
        out = memory[: stop - start] if logits is None else logits[start:stop]
        over_logits.logprob_fwd(
            head.batch(head.logits(head.states(start, stop), out)),
            *(head.cut(ids, start, stop), None),
            *(head.cut(temperature, start, stop), logit_scale, logit_softcap),
            *(head.cut(output, start, stop) for output in packed),
        )
    for output, values in zip(outputs, packed, strict=True):
        if output is not None:
            head.unpack(output, values)


def linear_logprob_bwd(
    over_logits,
    hidden,
    weight,
    bias,
    dtype,
    order,
    counts,
    ids,
    temperature,
    logit_scale,
    logit_softcap,
    chunk_bytes,
    logps,
    entropies,
    maxima,
    totals,
    dlogps,
    dentropies,
    accumulate,
    logits,
    dhidden,
    dweight,
    dbias,
):
    """As `logprob.logprob_bwd`, over hidden states and a head.

    Args:
        accumulate: whether dweight is added to.
        logits: (n, V) that `linear_logprob_fwd` kept, overwritten; None = made again.
    """
    gradients = (dhidden, dweight, dbias)
    head = Head(
        hidden, weight, bias, dtype, order, counts, ids, chunk_bytes, *gradients, accumulate
    )
    per_token = (ids, temperature, logps, entropies, maxima, totals, dlogps, dentropies)
    ids, temperature, *rest = (head.pack(values) for values in per_token)
    memory = head.memory(min(head.chunk_rows, head.live)) if logits is None else logits
    for start, middle, _ in head.chunks():
        if middle == start:
            break
        states = head.states(start, middle)
        if logits is None:
            x = head.logits(states, memory[: middle - start])
        else:
            x = logits[start:middle]
        batch = head.batch(x)
        over_logits.logprob_bwd(
            *(batch, head.cut(ids, start, middle), None),
            *(head.cut(temperature, start, middle), logit_scale, logit_softcap),
            *(head.cut(values, start, middle) for values in rest),
            batch,
        )
        head.backward(start, middle, states, x)


def linear_launchers(over_logits, suffix=""):
    """The three launchers above, bound to RowLaunchers, as ops with that suffix."""
    functions = (linear_loss, linear_logprob_fwd, linear_logprob_bwd)
    return [
        launcher(functools.partial(function, over_logits), function.__name__, suffix)
        for function in functions
    ]
