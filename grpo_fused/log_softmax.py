"""The public functions that compute log-probabilities and entropies."""

from typing import Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from grpo_fused import arguments, validation
from grpo_fused.inputs import HeadInput, LogitsInput
from grpo_fused.options import ResolvedSoftmaxOptions, SoftmaxOptions, resolve, with_options

Pair = tuple[Tensor, Tensor | None]
Triple = tuple[Tensor, Tensor | None, Tensor]


@overload
def selective_log_softmax(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    inplace: bool = False,
    return_vocabulary_logps: Literal[False] = False,
    **options: Unpack[SoftmaxOptions],
) -> Pair: ...


@overload
def selective_log_softmax(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    inplace: bool = False,
    return_vocabulary_logps: Literal[True],
    **options: Unpack[SoftmaxOptions],
) -> Triple: ...


@with_options(SoftmaxOptions)
def selective_log_softmax(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    inplace: bool = False,
    return_vocabulary_logps: bool = False,
    **options: Unpack[SoftmaxOptions],
) -> Pair | Triple:
    """Log-probability of one token per row of logits, and the entropy of the row.

        x = logit_softcap tanh(logit_scale logits / logit_softcap) / temperature
        logp[b, t] = log_softmax(x[b, t])[ids[b, t]]
        H[b, t] = -sum_v p[b, t, v] log p[b, t, v]

    Both are differentiable in the logits with any upstream gradient:

        dx_j = g (1[j = id] - p_j) - h p_j (log p_j + H)

    for g = dL/dlogp and h = dL/dH. The softmax is never stored; backward recomputes it. With a
    support both are over the tokens that the sampler kept, unless entropy_over is "vocabulary".

    Args:
        logits: (B, T, V), (B, T + 1, V) or (N, V), as in `grpo_loss`.
        ids: (B, T) or (N,) integer.
        mask: of the shape of ids, nonzero = active; None = all active. Masked results are 0.
        temperature: number or 0-d tensor > 0, or one per sequence (B,) or token, as ids.
        logit_softcap: number or 0-d tensor > 0; None = logits are not capped.
        logit_scale: number or 0-d tensor > 0.
        compute_entropy: whether to compute the entropies; they cost nothing when not.
        inplace: write the gradient over the logits in backward, as in `grpo_loss`.
        return_vocabulary_logps: whether to return also the log-probabilities over the vocabulary,
            differentiable, for a KL; with a support they cost the one read of the logits.
        support, entropy_over, vocab_parallel_group, vocab_start, implementation: as in
            `grpo_loss`.

    Returns:
        (logps, entropies), or (logps, entropies, vocabulary_logps): float32 of the shape of ids;
        entropies is None without compute_entropy.

    Raises:
        ValueError: as `grpo_loss`.
        RuntimeError: a second backward with inplace.
    """
    resolved = resolve(ResolvedSoftmaxOptions, "selective_log_softmax", options)
    logits, shards = arguments.local_logits(logits, resolved)
    source = LogitsInput(logits, ids, "ids", inplace, shards)
    return _log_probabilities(source, mask, resolved, return_vocabulary_logps)


@overload
def linear_selective_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    upcast: bool = False,
    logits_dtype: torch.dtype | None = None,
    main_grad: Tensor | None = None,
    save_logits: bool = False,
    reduce_hidden_grad: bool = True,
    return_vocabulary_logps: Literal[False] = False,
    **options: Unpack[SoftmaxOptions],
) -> Pair: ...


@overload
def linear_selective_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    upcast: bool = False,
    logits_dtype: torch.dtype | None = None,
    main_grad: Tensor | None = None,
    save_logits: bool = False,
    reduce_hidden_grad: bool = True,
    return_vocabulary_logps: Literal[True],
    **options: Unpack[SoftmaxOptions],
) -> Triple: ...


@with_options(SoftmaxOptions)
def linear_selective_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    upcast: bool = False,
    logits_dtype: torch.dtype | None = None,
    main_grad: Tensor | None = None,
    save_logits: bool = False,
    reduce_hidden_grad: bool = True,
    return_vocabulary_logps: bool = False,
    **options: Unpack[SoftmaxOptions],
) -> Pair | Triple:
    """`selective_log_softmax` of logits = hidden weight^T + bias, a chunk of tokens at a time.

    Differentiable in hidden, weight and bias with any upstream gradients. Backward computes the
    logits again, so that neither pass holds more than a chunk of them.

    Args:
        hidden: (B, T, H), (B, T + 1, H) or (N, H).
        weight, bias, chunk_bytes, upcast, logits_dtype, main_grad, reduce_hidden_grad: as
            `linear_grpo_loss`.
        ids: (B, T) or (N,) integer.
        mask: of the shape of ids, nonzero = active; None = all active. Masked tokens are not
            computed.
        save_logits: keep the logits of active tokens for backward: three matmuls instead of four,
            for memory of the size of the logits. Backward writes their gradient over them where
            logits_dtype is that of the head.
        Other keywords: as `selective_log_softmax`.

    Returns:
        As `selective_log_softmax`.

    Raises:
        ValueError: as `linear_grpo_loss`.
        RuntimeError: as there; a second backward with save_logits.
    """
    resolved = resolve(ResolvedSoftmaxOptions, "linear_selective_log_softmax", options)
    source = HeadInput(
        hidden,
        **arguments.local_head(weight, bias, resolved, reduce_hidden_grad),
        ids=ids,
        ids_name="ids",
        chunk_bytes=chunk_bytes,
        upcast=upcast,
        logits_dtype=logits_dtype,
        main_grad=main_grad,
        save_logits=save_logits,
    )
    return _log_probabilities(source, mask, resolved, return_vocabulary_logps)


def _log_probabilities(source, mask, options, over_vocabulary):
    layout, source = arguments.lay_out(source, mask)
    sequences = arguments.make_sequences(layout, mask, "torch")
    inputs = (options.temperature, options.support)
    tokens = arguments.make_tokens(source, layout, sequences, *inputs)
    scales = arguments.make_scales(source, options.logit_scale, options.logit_softcap)
    backend = validation.choose_implementation(options.implementation, source.tensor.device)
    over, supported = arguments.make_over(options), options.support is not None
    over = over._replace(policy=supported)
    wanted = over.wanted(tokens, bool(options.compute_entropy))
    if over_vocabulary:
        wanted = wanted._replace(logps=True)
    found = source.log_probabilities(tokens, scales, wanted, backend, sequences)
    results = [found.over(over.policy)[0], found.over(over.entropy)[1]]
    if over_vocabulary:
        results.append(found.logps)
    return tuple(map(layout.restore, results))
