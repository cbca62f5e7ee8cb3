"""The public losses: over logits, over a head, and over log-probabilities."""

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
    resolve,
    with_options,
)


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
            policy with it, `Ipo` and `RolloutIs`; the others ignore it. None = old_logps; NaN = not
            known: that of the policy.
        importance_sampling_ratio: (B,), (B, 1) or (B, T) float, rollout correction
            (`rollout_weights`): multiplies the policy term, never the KL.
        policy_mask: (B,), (B, 1) or (B, T), 0 switches the policy term off (`off_policy_mask`,
            `entropy_quantile_mask`); divisors stay as they are.
        loss_type: a row of LOSSES.
        objective: e.g. Clip(epsilon_low=0.2, epsilon_high=0.28); None = the row's.
        importance_sampling_level: "token", "sequence", "sequence_sum" or "sequence_token"; None =
            the row's.
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
        support: (offsets, ids), the tokens that the sampler kept (`sampling_support`): those of
            token n, counted over (B, T), are ids[offsets[n] : offsets[n + 1]], distinct, in any
            order, the target among them; both int32 or int64. Of masked tokens they are not read.
            Of (B, T + 1, V) logits the last position has none. On a GPU a row whose target was not
            kept is NaN, and a gradient takes four bytes of memory an id. The torch backend
            synchronises. A "keep sampling mask" in DeepSeek-V3.2.
        policy_over, kl_over, entropy_over: "support" or "vocabulary": the softmax of the ratio and
            the objective, of the KL penalty, of entropies and their bonus. Without a support the
            vocabulary's. Gradients of terms over the support are 0 elsewhere; without a term over
            the vocabulary the kept logits are all that is read. old_logps are then over the
            support too, as samplers report them, ref_logps as kl_over says.
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
            and rank, 16 with entropies, of each softmax; the logits are read twice. Logits that
            are a DTensor, sharded over the vocabulary alone, bring their group.
        vocab_start: the first column of this rank; None = found in one more exchange, which
            synchronises with the device.
        implementation: "triton", "torch", or "auto": triton where the device of the logits has a
            Triton driver. "triton" takes CPU tensors only under TRITON_INTERPRET=1.

    Returns:
        LossOutput, its logps those of the ratio. Without an active token the loss is a
        differentiable 0. A target whose logit is -inf has logp -inf: on policy a clipped loss is
        -A, off policy its ratio is e^-80, and with a KL penalty the loss is -inf; objectives of
        logp itself are infinite there. NaN in an active token is NaN in the loss. A KL of e^80
        times a ratio of e^80 overflows.

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
    logits, shards = arguments.local_logits(logits, resolved)
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
    logits_dtype: torch.dtype | None = None,
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
        chunk_bytes: memory for the logits of a chunk and their gradient; None = 1 GiB, 2 GiB for
            float32 logits of a half-precision head, on a CPU 32 MiB or 240 rows. A sequence-level
            loss computes logits twice if a sequence does not fit.
        upcast: compute logits and gradients in float32, regardless of the dtypes of hidden and
            weight: float32 matmuls.
        logits_dtype: of the logits of a half-precision head: torch.float32, in which the products
            of its matmul are exact, or that of the head, to which they are rounded. None = float32
            on CPUs and NVIDIA GPUs, elsewhere that of the head. Their gradient has the dtype of the
            head either way.
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
        **arguments.local_head(weight, bias, resolved, reduce_hidden_grad),
        ids=completion_ids,
        chunk_bytes=chunk_bytes,
        upcast=upcast,
        logits_dtype=logits_dtype,
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
    kl_logps: Tensor | None = None,
    log_ratio_bounds: tuple[float, float] | None = None,
    **options: Unpack[FamilyOptions],
) -> LossOutput:
    """Loss of the GRPO family over log-probabilities, for trainers whose losses get no logits.

    The formula of `grpo_loss`, differentiable in logps and kl_logps, and in entropies under an
    entropy bonus. Plain torch on (B, T) tensors. With log-probabilities from
    `selective_log_softmax` or `linear_selective_log_softmax` nothing of size V is stored;
    `grpo_loss` reads the logits once less.

    Args:
        logps: (B, T) float32, bfloat16 or float16, log-probabilities of the tokens under the
            policy, at its temperature; (N,) with cu_seqlens. Masked values may be anything.
        completion_mask, advantages: as `grpo_loss`.
        entropies: float, the shape of logps, entropies of the policy; needed for entropy_coef.
        kl_logps: float, the shape of logps, log-probabilities of the policy that the KL compares
            with ref_logps, differentiable; None = logps. With a support those over the vocabulary.
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
    if kl_logps is not None:
        check_tensor("kl_logps", kl_logps, tuple(logps.shape), logps.device)
        validation.check_floats("kl_logps", kl_logps)
        if resolved.ref_logps is None:
            raise ValueError("kl_logps requires ref_logps, got None")
    source = LogpsInput(logps, entropies, kl_logps)
    bounds = _check_bounds(log_ratio_bounds)
    return compute_loss(source, completion_mask, advantages, resolved, bounds)


def _check_bounds(bounds):
    if bounds is None:
        return None
    low, high = bounds if isinstance(bounds, tuple) and len(bounds) == 2 else (math.nan, math.nan)
    numbers = isinstance(low, Real) and isinstance(high, Real)
    if not (numbers and low <= high):
        raise ValueError(f"log_ratio_bounds must be (low, high) with low <= high, got {bounds!r}")
    return float(low), float(high)
