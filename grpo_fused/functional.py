"""The public functions: losses and log-probabilities over logits, a head, or log-probabilities."""

import math
from numbers import Real

import torch
from torch import Tensor
from typing_extensions import Unpack

from grpo_fused import arguments, validation
from grpo_fused.checks import check_tensor
from grpo_fused.inputs import HeadInput, LogitsInput, LogpsInput
from grpo_fused.loss import LossOutput, compute_loss
from grpo_fused.options import (
    FamilyOptions,
    LossOptions,
    ResolvedFamilyOptions,
    ResolvedLossOptions,
    ResolvedSoftmaxOptions,
    SoftmaxOptions,
    resolve,
    with_options,
)
from grpo_fused.parallel import find_head_shards, find_shards, is_dtensor

LogProbabilities = tuple[Tensor, Tensor | None]


@with_options(LossOptions)
def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor | None,
    advantages: Tensor,
    *,
    inplace: bool = False,
    **options: Unpack[LossOptions],
) -> LossOutput:
    """Loss of the GRPO family over the logits of the policy.

        loss = sum_bt w[b, t] (c[b, t] objective(logp, log_ratio, A)[b, t])
             + sum_bt w_kl[b, t] beta kl(ref_logps - logp)[b, t]
             - entropy_coef mean_bt H[b, t]

    with logp the log-softmax at completion_ids, log_ratio = logp - old_logps of the token or of its
    sequence, c the importance_sampling_ratio, 0 where policy_mask is, and w the weights of the
    normalizer (`token_weights`). Gradients flow into the logits alone.

    Token-level losses compute their gradient in the pass that reads the logits. Sequence-level
    losses, reduction="none", and float16 without grad_scale compute it in backward and read the
    logits twice. Masked tokens contribute nothing; nothing synchronises with the device.

    Args:
        logits: (B, T, V) or (B, T + 1, V) float32, bfloat16 or float16, last dimension contiguous,
            raw: scale, softcap, temperature are applied here. Of T + 1 positions the last is
            ignored and its gradient is zero: pass `model(..., logits_to_keep=T + 1).logits` whole.
            Fills below -1e9 have probability 0; a row that is below -1e9 as a whole, or above 1e9,
            is NaN. With cu_seqlens (N, V); what is (B, T) below is then (N,), and what may be
            (B,) is that if N = B.
        completion_ids: (B, T) integer. Any value is allowed where the mask is 0, -100 included. On
            a GPU an active id outside [0, V) makes the results of its row NaN.
        completion_mask: (B, T) bool, integer or float, nonzero = active; None = all active.
            Masked values are never read: NaN there changes nothing.
        advantages: (B,) or (B, T) float.
        old_logps: (B, T) float, log-probabilities of the policy that sampled; None = on policy:
            the ratio is 1, and its gradient is not 0.
        ref_logps: (B, T) float, of the reference model; needed unless beta is 0.
        sampling_logps: (B, T) float, of the sampler (vLLM, SGLang), for objectives that compare the
            policy with it, `Ipo` and `RolloutIs`; the others ignore it. None = old_logps.
        importance_sampling_ratio: (B,), (B, 1) or (B, T) float, rollout correction
            (`rollout_weights`): multiplies the policy term, never the KL.
        policy_mask: (B,), (B, 1) or (B, T), 0 switches the policy term off (`off_policy_mask`,
            `entropy_quantile_mask`); divisors stay as they are.
        loss_type: a row of LOSSES.
        objective: e.g. Clip(epsilon_low=0.2, epsilon_high=0.28); None = the row's.
        importance_sampling_level: "token", "sequence" or "sequence_token"; None = the row's.
        normalizer: a rule of `token_weights`; None = the row's.
        kl_normalizer: the rule of the KL penalty; None = the normalizer.
        reduction: "sum", or "none": unweighted losses per token, exactly 0 where masked.
        beta: number or 0-d tensor, coefficient of the KL penalty. With ref_logps and beta 0 the
            KL is still reported.
        kl_estimator: "k1", "k2", "k3", "abs", or with the gradient of k2 "k1+", "k3+", "abs+".
        use_bias_correction_kl: whether the KL is multiplied by the ratio of the level.
        temperature: number or 0-d tensor > 0, or one per sequence (B,) or token (B, T).
        logit_softcap, logit_scale: number or 0-d tensor > 0: logits become
            softcap tanh(scale logits / softcap), or scale logits without a softcap.
        entropy_coef: number or 0-d tensor, coefficient of the entropy bonus, a mean over active
            tokens, whatever the normalizer.
        compute_entropy: whether entropies and their mean are computed; they cost nothing when not.
        num_items_in_batch, num_sequences_in_batch, max_completion_length: global divisors, see
            `token_weights`.
        num_entropy_items_in_batch: number or 0-d tensor, divisor of the entropy bonus, as
            num_items_in_batch is that of token-mean; None = the active tokens of this call.
        cu_seqlens: (B + 1,) int32 or int64, for packed sequences: their first tokens, and N.
        sequence_group: a torch.distributed group whose ranks hold the tokens of the same B
            sequences (context parallelism), in any order; ids are the targets of a rank's own rows.
            The losses and sums of the ranks add up to those of whole sequences, and gradients are
            those of this total. Ranks exchange (B,) numbers, in forward and backward, where a mean
            or a ratio spans a sequence: all must call both. None = a rank holds whole sequences.
        grad_scale: number or 0-d tensor != 0, the upstream gradient expected in backward (of a
            loss scaler, or 1 / accumulation steps). A gradient computed in forward contains it, the
            loss does not; another upstream gradient costs one more pass.
        inplace: write the gradient over the logits, which then must not be read again and must
            not be a leaf. A producer that saved its output raises autograd's version error.
        vocab_parallel_group: a torch.distributed group whose ranks each hold contiguous columns of
            every row, in the order of the ranks; all call with the same tokens and get the same
            results, to the bit, and the gradient of their columns. One exchange of 12 bytes a token
            and rank, 16 with entropies; the logits are read twice. Logits that are a DTensor,
            sharded over the vocabulary alone, bring their group.
        vocab_start: the first column of this rank; None = found in one more exchange, which
            synchronises with the device.
        implementation: "triton", "torch", or "auto": triton where the device of the logits has a
            Triton driver. "triton" takes CPU tensors only under TRITON_INTERPRET=1.

    Returns:
        LossOutput. Without an active token the loss is a differentiable 0. A target whose logit is
        -inf has logp -inf: on policy a clipped loss is -A, off policy its ratio is e^-80, and with
        a KL penalty the loss is -inf; objectives of logp itself are infinite there. NaN in an
        active token is NaN in the loss. A KL of e^80 times a ratio of e^80 overflows.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, named in the message;
            incompatible arguments; an implementation that cannot run here.
        TypeError: an unknown keyword.
        RuntimeError: a second backward through a gradient that was computed in forward, or
            inplace; create_graph=True.

    References:
        DeepSeekMath, https://arxiv.org/abs/2402.03300, eq. 3 and 4; the papers of LOSSES.
    """
    resolved = resolve(ResolvedLossOptions, "grpo_loss", options)
    logits, shards = _shards(logits, resolved)
    source = LogitsInput(logits, completion_ids, "completion_ids", inplace, shards)
    return compute_loss(source, completion_mask, advantages, resolved)


@with_options(LossOptions)
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor | None,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    upcast: bool = False,
    main_grad: Tensor | None = None,
    reduce_hidden_grad: bool = True,
    **options: Unpack[LossOptions],
) -> LossOutput:
    """`grpo_loss` of logits = hidden weight^T + bias, computed a chunk of tokens at a time.

    The same numbers, without memory of the size of the logits. Masked tokens are not computed.
    Tokens whose gradient is exactly 0 (no advantage, if the objective needs one, or switched off by
    policy_mask, without KL and entropy bonus) cost one matmul instead of three; on a GPU only with
    a mask, whose count is the one value that synchronises with the device (with shards, their sizes
    too). The gradients of hidden, weight and bias are computed in forward wherever `grpo_loss`
    computes that of the logits, and for sequence-level losses if every sequence fits a chunk.
    Otherwise, and where a loss couples the tokens of the batch, backward computes the logits again.

    Args:
        hidden: (B, T, H), or (B, T + 1, H) whose last position is ignored, or with cu_seqlens
            (N, H); float32, bfloat16 or float16. The output of the model's final norm.
        weight: (V, H), the head's, in the dtype of hidden. Gradients of several chunks add up in
            float32. A frozen head costs neither the matmul of its gradient nor its memory.
        completion_ids, completion_mask, advantages, and keywords not listed here: as `grpo_loss`.
        bias: (V,) or None.
        chunk_bytes: memory for the logits of a chunk; None = 1 GiB, on a CPU 32 MiB or 240 rows.
            A sequence-level loss computes logits twice if a sequence does not fit.
        upcast: compute logits and gradients in float32, regardless of the dtypes of hidden and
            weight.
        main_grad: (V, H) float32 that any backward adds the gradient of weight to, as Megatron
            keeps it; weight.grad stays as it is.
        reduce_hidden_grad: with a vocab_parallel_group, of which every rank holds rows of weight
            and bias and the same hidden states: whether the gradient of hidden is summed over the
            ranks; False if the layer before does it. Ranks exchange statistics once a chunk,
            during the matmul of the next one, for which chunk_bytes holds two chunks; chunks need
            the sizes of all shards, one exchange more if only vocab_start is given. A weight on a
            DeviceMesh ("tp",), as transformers shards it, brings its group.

    Under autocast the matmuls run in its dtype, as those of a linear layer do.

    Returns:
        LossOutput, as `grpo_loss`.

    Raises:
        ValueError: as `grpo_loss`; a weight, bias or main_grad that does not fit; a DTensor weight
            of which it is not known whether its vocabulary is parallel or FSDP has sharded it.
        RuntimeError: a second backward where gradients were computed in forward;
            create_graph=True; a weight whose memory was freed before a backward that needs it.

    Example:
        hidden = model.model(input_ids).last_hidden_state[:, -T - 1 :]
        loss = linear_grpo_loss(hidden, model.lm_head.weight, ids, mask, advantages).loss
    """
    resolved = resolve(ResolvedLossOptions, "linear_grpo_loss", options)
    source = HeadInput(
        hidden,
        **_local_head(weight, bias, resolved, reduce_hidden_grad),
        ids=completion_ids,
        chunk_bytes=chunk_bytes,
        upcast=upcast,
        main_grad=main_grad,
    )
    return compute_loss(source, completion_mask, advantages, resolved)


@with_options(FamilyOptions)
def grpo_loss_from_logps(
    logps: Tensor,
    completion_mask: Tensor | None,
    advantages: Tensor,
    *,
    entropies: Tensor | None = None,
    log_ratio_bounds: tuple[float, float] | None = None,
    **options: Unpack[FamilyOptions],
) -> LossOutput:
    """Loss of the GRPO family over log-probabilities, for trainers whose losses get no logits.

    The formula of `grpo_loss`, differentiable in logps, and in entropies under an entropy bonus.
    Plain torch on (B, T) tensors. With log-probabilities from `selective_log_softmax` or
    `linear_selective_log_softmax` nothing of size V is stored; `grpo_loss` reads the logits once
    less.

    Args:
        logps: (B, T) float32, bfloat16 or float16, log-probabilities of the tokens under the
            policy, at its temperature; (N,) with cu_seqlens. Masked values may be anything.
        completion_mask, advantages: as `grpo_loss`.
        entropies: float, the shape of logps, entropies of the policy; needed for entropy_coef.
        log_ratio_bounds: (low, high), numbers that may be infinite: the log-ratio of the level is
            clamped to them, and has no gradient outside. None = exponentials are clamped at +-80,
            as everywhere in the package.
        Other keywords: as `grpo_loss`.

    Returns:
        LossOutput, as `grpo_loss`; its logps and entropies are those given, detached, float32, 0
        where masked.

    Raises:
        ValueError: as `grpo_loss`; logps that are not (B, T) or, with cu_seqlens, (N,); entropies
            of another shape, or missing for an entropy bonus; bounds that are not an interval.

    References:
        As `grpo_loss`.

    Example:
        logps, entropies = linear_selective_log_softmax(hidden, weight, ids, mask)
        loss = grpo_loss_from_logps(logps, mask, advantages, old_logps=old_logps).loss
    """
    validation.check_floats("logps", logps)
    resolved = resolve(ResolvedFamilyOptions, "grpo_loss_from_logps", options)
    coefficient = resolved.entropy_coef
    if entropies is not None:
        check_tensor("entropies", entropies, tuple(logps.shape), logps.device)
    elif isinstance(coefficient, torch.Tensor) or coefficient != 0:
        raise ValueError("entropies are needed unless entropy_coef is 0, got None")
    bounds = _check_bounds(log_ratio_bounds)
    return compute_loss(LogpsInput(logps, entropies), completion_mask, advantages, resolved, bounds)


@with_options(SoftmaxOptions)
def selective_log_softmax(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    inplace: bool = False,
    **options: Unpack[SoftmaxOptions],
) -> LogProbabilities:
    """Log-probability of one token per row of logits, and the entropy of the row.

        x = logit_softcap tanh(logit_scale logits / logit_softcap) / temperature
        logp[b, t] = log_softmax(x[b, t])[ids[b, t]]
        H[b, t] = -sum_v p[b, t, v] log p[b, t, v]

    Both are differentiable in the logits with any upstream gradient:

        dx_j = g (1[j = id] - p_j) - h p_j (log p_j + H)

    for g = dL/dlogp and h = dL/dH. The softmax is never stored; backward recomputes it.

    Args:
        logits: (B, T, V), (B, T + 1, V) or (N, V), as in `grpo_loss`.
        ids: (B, T) or (N,) integer.
        mask: of the shape of ids, nonzero = active; None = all active. Masked results are 0.
        temperature: number or 0-d tensor > 0, or one per sequence (B,) or token, as ids.
        logit_softcap: number or 0-d tensor > 0; None = logits are not capped.
        logit_scale: number or 0-d tensor > 0.
        compute_entropy: whether to compute the entropies; they cost nothing when not.
        inplace: write the gradient over the logits in backward, as in `grpo_loss`.
        vocab_parallel_group, vocab_start, implementation: as in `grpo_loss`.

    Returns:
        (logps, entropies): float32 of the shape of ids; entropies is None without compute_entropy.

    Raises:
        ValueError: as `grpo_loss`.
        RuntimeError: a second backward with inplace.
    """
    resolved = resolve(ResolvedSoftmaxOptions, "selective_log_softmax", options)
    logits, shards = _shards(logits, resolved)
    source = LogitsInput(logits, ids, "ids", inplace, shards)
    return _log_probabilities(source, mask, resolved)


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
    main_grad: Tensor | None = None,
    save_logits: bool = False,
    reduce_hidden_grad: bool = True,
    **options: Unpack[SoftmaxOptions],
) -> LogProbabilities:
    """`selective_log_softmax` of logits = hidden weight^T + bias, a chunk of tokens at a time.

    Differentiable in hidden, weight and bias with any upstream gradients. Backward computes the
    logits again, so that neither pass holds more than a chunk of them.

    Args:
        hidden: (B, T, H), (B, T + 1, H) or (N, H).
        weight, bias, chunk_bytes, upcast, main_grad, reduce_hidden_grad: as `linear_grpo_loss`.
        ids: (B, T) or (N,) integer.
        mask: of the shape of ids, nonzero = active; None = all active. Masked tokens are not
            computed.
        save_logits: keep the logits of active tokens for backward, which writes their gradient
            over them: three matmuls instead of four, for memory of the size of the logits.
        temperature, logit_softcap, logit_scale, compute_entropy, vocab_parallel_group, vocab_start,
            implementation: as `selective_log_softmax`.

    Returns:
        (logps, entropies): float32 of the shape of ids; entropies is None without compute_entropy.

    Raises:
        ValueError: as `linear_grpo_loss`.
        RuntimeError: as there; a second backward with save_logits.
    """
    resolved = resolve(ResolvedSoftmaxOptions, "linear_selective_log_softmax", options)
    source = HeadInput(
        hidden,
        **_local_head(weight, bias, resolved, reduce_hidden_grad),
        ids=ids,
        ids_name="ids",
        chunk_bytes=chunk_bytes,
        upcast=upcast,
        main_grad=main_grad,
        save_logits=save_logits,
    )
    return _log_probabilities(source, mask, resolved)


def _log_probabilities(source, mask, options):
    layout, source = arguments.lay_out(source, mask)
    sequences = arguments.make_sequences(layout, mask, "torch")
    tokens = arguments.make_tokens(source, layout, sequences, options.temperature)
    scales = arguments.make_scales(source, options.logit_scale, options.logit_softcap)
    backend = validation.choose_implementation(options.implementation, source.tensor.device)
    entropy = bool(options.compute_entropy)
    logps, entropies = source.log_probabilities(tokens, scales, entropy, backend, sequences)
    return layout.restore(logps), layout.restore(entropies)


def _shards(logits, options):
    validation.check_floats("logits", logits)
    group, start = options.vocab_parallel_group, options.vocab_start
    return find_shards("logits", logits, -1, group, start)


def _local_head(weight, bias, options, reduce_hidden_grad):
    """Fields of `HeadInput`: this rank's rows of the head, and where they lie."""
    group, start, shards = options.vocab_parallel_group, options.vocab_start, None
    if group is not None or start is not None or is_dtensor(weight) or is_dtensor(bias):
        validation.check_floats("weight", weight)
        weight, bias, shards = find_head_shards(weight, bias, group, start)
        shards = shards._replace(reduces=bool(reduce_hidden_grad))
    return {"weight": weight, "bias": bias, "shards": shards}


def _check_bounds(bounds):
    if bounds is None:
        return None
    low, high = bounds if isinstance(bounds, tuple) and len(bounds) == 2 else (math.nan, math.nan)
    numbers = isinstance(low, Real) and isinstance(high, Real)
    if not (numbers and low <= high):
        raise ValueError(f"log_ratio_bounds must be (low, high) with low <= high, got {bounds!r}")
    return float(low), float(high)
