"""The family over hidden states: the LM head inside, logits never exist as a whole."""

from grpo_fused import validation
from grpo_fused.autograd import Options
from grpo_fused.family import family_loss
from grpo_fused.inputs import prepare_scales, prepare_tokens
from grpo_fused.logprob import as_ids
from grpo_fused.ordering import order_tokens
from grpo_fused.sources import Hidden


def linear_grpo_loss(
    hidden,
    weight,
    completion_ids,
    completion_mask,
    advantages,
    *,
    bias=None,
    chunk_bytes=None,
    upcast=False,
    main_grad=None,
    old_logps=None,
    ref_logps=None,
    importance_sampling_ratio=None,
    policy_mask=None,
    loss_type="dapo",
    objective=None,
    importance_sampling_level=None,
    normalizer=None,
    kl_normalizer=None,
    reduction="sum",
    beta=0.0,
    kl_estimator="k3",
    use_bias_correction_kl=False,
    temperature=1.0,
    logit_softcap=None,
    logit_scale=1.0,
    entropy_coef=0.0,
    compute_entropy=False,
    num_items_in_batch=None,
    num_sequences_in_batch=None,
    max_completion_length=None,
    cu_seqlens=None,
    grad_scale=1.0,
    implementation="auto",
):
    """`grpo_loss` of logits = hidden weight^T + bias, made and used a chunk of rows at a time.

    The same numbers, without memory of the size of the logits. Only active tokens are computed;
    those whose gradient is exactly 0 (no advantage, or switched off by policy_mask, without KL and
    entropy bonus) cost one matmul instead of three, on a GPU if there is a mask: its count is the
    one value that the host waits for. The gradients of hidden, weight and bias are
    made in forward wherever `grpo_loss` makes that of the logits, and for losses that couple the
    tokens of a sequence where its tokens fit a chunk; otherwise backward makes the logits again.

    Args:
        hidden: (B, T, H), or (B, T + 1, H) whose last position is ignored, or with cu_seqlens
            (N, H); float32, bfloat16 or float16. What comes out of the model's final norm.
        weight: (V, H), the head's, in the dtype of hidden. Gradients of several chunks add up in
            float32. Nothing is computed for what requires no gradient: a frozen head costs neither
            its gradient's matmul nor its memory.
        completion_ids, completion_mask, advantages: as `grpo_loss`, as is all that is not here.
        bias: (V,) or None.
        chunk_bytes: memory for the logits of a chunk; None = 1 GiB, on a CPU 32 MiB or 240 rows.
            Longer sequences than it holds make a loss that couples their tokens compute logits
            twice.
        upcast: compute logits and gradients in float32, whatever hidden and weight are.
        main_grad: (V, H) float32 that any backward adds the gradient of weight to, as Megatron
            keeps it; weight.grad stays as it is.

    Under autocast the matmuls run in its dtype, as those of a linear layer do.

    Returns:
        LossOutput, as `grpo_loss`.

    Raises:
        ValueError: as `grpo_loss`; a weight, bias or main_grad that does not fit; a DTensor weight.
        RuntimeError: a second backward where gradients were made in forward; create_graph=True; a
            weight whose memory was freed before a backward that needs it.

    Example:
        hidden = model.model(input_ids).last_hidden_state[:, -T - 1 :]
        loss = linear_grpo_loss(hidden, model.lm_head.weight, ids, mask, advantages).loss
    """
    return family_loss(
        Hidden(hidden, weight, bias, chunk_bytes, upcast, main_grad),
        completion_ids,
        completion_mask,
        advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        importance_sampling_ratio=importance_sampling_ratio,
        policy_mask=policy_mask,
        loss_type=loss_type,
        objective=objective,
        importance_sampling_level=importance_sampling_level,
        normalizer=normalizer,
        kl_normalizer=kl_normalizer,
        reduction=reduction,
        beta=beta,
        kl_estimator=kl_estimator,
        use_bias_correction_kl=use_bias_correction_kl,
        temperature=temperature,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        entropy_coef=entropy_coef,
        compute_entropy=compute_entropy,
        num_items_in_batch=num_items_in_batch,
        num_sequences_in_batch=num_sequences_in_batch,
        max_completion_length=max_completion_length,
        cu_seqlens=cu_seqlens,
        grad_scale=grad_scale,
        implementation=implementation,
    )


def linear_selective_log_softmax(
    hidden,
    weight,
    ids,
    mask=None,
    *,
    bias=None,
    chunk_bytes=None,
    upcast=False,
    main_grad=None,
    save_logits=False,
    temperature=1.0,
    logit_softcap=None,
    logit_scale=1.0,
    compute_entropy=False,
    implementation="auto",
):
    """`selective_log_softmax` of logits = hidden weight^T + bias, a chunk of rows at a time.

    Differentiable in hidden, weight and bias with any upstream gradients; backward makes the logits
    again, so that neither direction holds more than a chunk of them.

    Args:
        hidden: (B, T, H), (B, T + 1, H) or (N, H).
        weight, bias, chunk_bytes, upcast, main_grad: as `linear_grpo_loss`.
        ids: (B, T) or (N,) integer.
        mask: of the shape of ids, nonzero = active; None = all active. Others are not computed.
        save_logits: keep the logits of active tokens for backward, which then writes their gradient
            over them: one matmul of four less, for memory of their size.
        temperature, logit_softcap, logit_scale, compute_entropy, implementation: as
            `selective_log_softmax`.

    Returns:
        (logps, entropies): float32 of the shape of ids; entropies is None without compute_entropy.

    Raises:
        ValueError: as `linear_grpo_loss`.
        RuntimeError: as there; a second backward with save_logits.
    """
    source = Hidden(hidden, weight, bias, chunk_bytes, upcast, main_grad, save_logits)
    tokens, sequences, shape = prepare_tokens(source, ids, mask, None, ids_name="ids")
    scales = prepare_scales(source, shape, sequences, temperature, logit_scale, logit_softcap)
    implementation = validation.choose_implementation(implementation, hidden.device)
    options = Options(bool(compute_entropy), implementation)
    order = order_tokens(sequences)
    return as_ids(source.log_probabilities(tokens, scales, options, order), shape)
