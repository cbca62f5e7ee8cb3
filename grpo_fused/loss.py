"""grpo_loss: the family over logits."""

from grpo_fused.family import family_loss
from grpo_fused.sources import Logits


def grpo_loss(
    logits,
    completion_ids,
    completion_mask,
    advantages,
    *,
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
    inplace=False,
    implementation="auto",
):
    """Loss of the GRPO family over the logits of the policy.

        loss = sum_bt w[b, t] (c[b, t] objective(logp, log_ratio, A)[b, t])
             + sum_bt w_kl[b, t] beta kl(ref_logps - logp)[b, t]
             - entropy_coef mean_bt H[b, t]

    with logp the log-softmax at completion_ids, log_ratio = logp - old_logps of the token or of its
    sequence, c the importance_sampling_ratio where policy_mask is on, w the weights of the
    normalizer (`token_weights`). Gradients flow into the logits alone; all else is a constant.

    Losses per token make their gradient in the pass that reads the logits. What couples the tokens
    of a sequence, reduction="none", and float16 without grad_scale make it in backward: the logits
    are read once more.

    Args:
        logits: (B, T, V) or (B, T + 1, V) float32, bfloat16 or float16, last dimension contiguous,
            raw: scale, softcap, temperature are applied here. Of T + 1 positions the last is
            ignored and its gradient is zero: pass `model(..., logits_to_keep=T + 1).logits` whole.
            Fills below -1e9 have probability 0; a row that is below -1e9 as a whole, or above 1e9,
            is NaN. With cu_seqlens (N, V); what is (B, T) below is then (N,), and what may be
            (B,) is that if N = B.
        completion_ids: (B, T) integer. Any value is allowed where the mask is 0, -100 included. On
            a GPU an active id outside [0, V) makes its row's results NaN (no wait to check it).
        completion_mask: (B, T) bool, integer or float, nonzero = active; None = all active. What
            is masked is never read: NaN there changes nothing.
        advantages: (B,) or (B, T) float.
        old_logps: (B, T) float, log-probabilities of the policy that sampled; None = on policy:
            the ratio is 1 and its gradient alive.
        ref_logps: (B, T) float, of the reference model; needed unless beta is 0.
        importance_sampling_ratio: (B,), (B, 1) or (B, T) float, rollout correction
            (`rollout_weights`): multiplies the policy term, never the KL.
        policy_mask: (B,), (B, 1) or (B, T), 0 switches the policy term off (`off_policy_mask`,
            `entropy_quantile_mask`); divisors stay as they are.
        loss_type: a row of LOSSES.
        objective: e.g. Clip(epsilon_low=0.2, epsilon_high=0.28), replaces the row's.
        importance_sampling_level: "token", "sequence" or "sequence_token", replaces the row's.
        normalizer: a rule of `token_weights`, replaces the row's.
        kl_normalizer: the rule of the KL penalty; None = the normalizer.
        reduction: "sum", or "none": losses per token, without weights, exactly 0 where masked.
        beta: number or 0-d tensor, weight of the KL penalty. With ref_logps and beta 0 the KL is
            still reported.
        kl_estimator: "k1", "k2", "k3", "abs", or with the gradient of k2 "k1+", "k3+", "abs+".
        use_bias_correction_kl: whether the KL is multiplied by the ratio of the level.
        temperature: number or 0-d tensor > 0, or one per sequence (B,) or token (B, T).
        logit_softcap, logit_scale: number or 0-d tensor > 0: logits become
            softcap tanh(scale logits / softcap), or scale logits without a softcap.
        entropy_coef: number or 0-d tensor, weight of the entropy bonus, a mean over the active
            tokens at hand whatever the normalizer: accumulating callers pass entropy_coef / steps.
        compute_entropy: whether entropies and their mean are computed; they cost nothing when not.
        num_items_in_batch, num_sequences_in_batch, max_completion_length: global divisors, see
            `token_weights`.
        cu_seqlens: (B + 1,) int32 or int64, for packed sequences: their first tokens, and N.
        grad_scale: number or 0-d tensor != 0, the upstream gradient expected in backward (of a
            loss scaler, or 1 / accumulation steps). It is folded into a gradient that is made in
            forward, the loss is not multiplied; another upstream gradient costs one more pass.
        inplace: write the gradient over the logits, which then must not be read again and must
            not be a leaf. A producer that saved its output raises autograd's version error.
        implementation: "triton", "torch", or "auto": triton where the device of the logits has a
            Triton driver. "triton" takes CPU tensors only under TRITON_INTERPRET=1.

    Returns:
        LossOutput. Without an active token the loss is a differentiable 0. A target whose logit is
        -inf has logp -inf: on policy a clipped loss is -A, off policy its ratio is e^-80, and with
        a KL penalty the loss is -inf; objectives of logp itself are infinite there. NaN in an
        active token is NaN in the loss. A KL of e^80 times a ratio of e^80 overflows.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, named in the message;
            arguments that do not go together; an implementation that cannot serve.
        RuntimeError: a second backward through a gradient that lives in one buffer: made in the
            same pass, or inplace; create_graph=True.

    References:
        DeepSeekMath, https://arxiv.org/abs/2402.03300, eq. 3 and 4; the papers of LOSSES.
    """
    return family_loss(
        Logits(logits, inplace),
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
