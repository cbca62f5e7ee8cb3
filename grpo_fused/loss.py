"""The public functions: validate, choose an implementation, assemble."""

from typing import NamedTuple

import torch

from grpo_fused import validation
from grpo_fused.autograd import (
    FusedLoss,
    LogProb,
    LogProbOptions,
    LossOptions,
    run_fused_loss,
    run_logprob,
)
from grpo_fused.metrics import metrics_of
from grpo_fused.objectives import LOSSES
from grpo_fused.weights import token_weights


class LossOutput(NamedTuple):
    """What `grpo_loss` returns; all but `loss` detached.

    Attributes:
        loss: () float32, differentiable in the logits.
        metrics: dict of () float32 on the device, means over the active tokens at hand:
            `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean` (their sum),
            `ratio/mean`, `ratio/max`; `kl` with ref_logps, `entropy` with compute_entropy.
        sums: (7,) float32, see `grpo_fused.metrics`, for exact means over ranks and micro-batches.
        logps: (B, T) float32, 0 where masked.
        entropies: (B, T) float32, 0 where masked, or None without compute_entropy.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    sums: torch.Tensor
    logps: torch.Tensor
    entropies: torch.Tensor | None


def grpo_loss(
    logits,
    completion_ids,
    completion_mask,
    advantages,
    *,
    old_logps=None,
    ref_logps=None,
    loss_type="dapo",
    objective=None,
    normalizer=None,
    beta=0.0,
    temperature=1.0,
    compute_entropy=False,
    num_items_in_batch=None,
    num_sequences_in_batch=None,
    max_completion_length=None,
    grad_scale=1.0,
    inplace=False,
    implementation="auto",
):
    """Loss of the GRPO family over the logits of the policy, gradient made in the same pass.

        loss = sum_bt w[b, t] (objective(logp[b, t], logp[b, t] - old_logps[b, t], A[b, t])
                               + beta k3(ref_logps[b, t] - logp[b, t]))

    with logp the log-softmax of logits / temperature at completion_ids and w the weights of the
    normalizer (`token_weights`). Gradients flow into the logits alone; all else is a constant.

    Args:
        logits: (B, T, V) or (B, T + 1, V) float32, bfloat16 or float16, last dimension contiguous,
            raw: temperature is applied here. Of T + 1 positions the last is ignored and its
            gradient is zero: pass `model(..., logits_to_keep=T + 1).logits` whole. Fills below
            -1e9 have probability 0; a row that is below -1e9 as a whole, or above 1e9, is NaN.
        completion_ids: (B, T) integer. Any value is allowed where the mask is 0, -100 included. On
            a GPU an active id outside [0, V) makes its row's results NaN (no wait to check it).
        completion_mask: (B, T) bool, integer or float, nonzero = active; None = all active. What
            is masked is never read: NaN there changes nothing.
        advantages: (B,) or (B, T) float.
        old_logps: (B, T) float, log-probabilities of the policy that sampled; None = on policy:
            the ratio is 1 and its gradient alive.
        ref_logps: (B, T) float, of the reference model; needed unless beta is 0.
        loss_type: a row of LOSSES.
        objective: e.g. Clip(epsilon_low=0.2, epsilon_high=0.28), replaces the row's.
        normalizer: a rule of `token_weights`, replaces the row's.
        beta: number or 0-d tensor, weight of the k3 KL penalty. With ref_logps and beta 0 the KL
            is still reported.
        temperature: number or 0-d tensor > 0.
        compute_entropy: whether entropies and their mean are computed (not differentiable here;
            `selective_log_softmax` has the gradient). They cost nothing when not.
        num_items_in_batch, num_sequences_in_batch, max_completion_length: global divisors, see
            `token_weights`.
        grad_scale: number or 0-d tensor != 0, the upstream gradient expected in backward (of a
            loss scaler, or 1 / accumulation steps). It is folded into the gradient when that is
            made, the loss is not multiplied; any other upstream gradient costs one more pass.
        inplace: write the gradient over the logits, which then must not be read again and must
            not be a leaf. A producer that saved its output raises autograd's version error.
        implementation: "triton", "torch", or "auto": triton where the device of the logits has a
            Triton driver. "triton" takes CPU tensors only under TRITON_INTERPRET=1.

    Returns:
        LossOutput. Without an active token the loss is a differentiable 0. A target whose logit is
        -inf has logp -inf: on policy its loss is -A, off policy its ratio is e^-80, and with a KL
        penalty the loss is -inf. NaN in an active token is NaN in the loss and in its row.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, named in the message;
            beta without ref_logps; inplace on a leaf; an implementation that cannot serve.
        RuntimeError: a second backward through the result (the gradient lives in one buffer).

    References:
        DeepSeekMath, https://arxiv.org/abs/2402.03300, eq. 3 and 4; the papers of LOSSES.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSSES)}, got {loss_type!r}")
    row = LOSSES[loss_type]
    objective = row.objective if objective is None else objective
    validation.check_objective(objective)
    validation.check_logits(logits, completion_ids, "completion_ids", inplace)
    tokens = {
        "completion_mask": completion_mask,
        "advantages": advantages,
        "old_logps": old_logps,
        "ref_logps": ref_logps,
    }
    validation.check_tokens(logits, completion_ids, "completion_ids", tokens)
    validation.check_ids(logits, completion_ids, "completion_ids", completion_mask)
    scales = (
        validation.check_scale("temperature", temperature, logits, positive=True),
        validation.check_scale("beta", beta, logits),
        validation.check_scale("grad_scale", grad_scale, logits, nonzero=True),
    )
    if ref_logps is None and not (isinstance(beta, (int, float)) and beta == 0):
        raise ValueError("ref_logps is needed unless beta is 0, got None")
    implementation = validation.choose_implementation(implementation, logits)

    mask = torch.ones_like(completion_ids) if completion_mask is None else completion_mask
    weights = token_weights(
        mask,
        row.normalizer if normalizer is None else normalizer,
        num_items_in_batch=num_items_in_batch,
        num_sequences_in_batch=num_sequences_in_batch,
        max_completion_length=max_completion_length,
    )
    tokens = (
        completion_ids.contiguous(),
        weights.contiguous(),
        _per_token(advantages.detach()).expand_as(completion_ids),
        _constant(old_logps),
        _constant(ref_logps),
    )
    options = LossOptions(
        objective.name(),
        objective.knobs(),
        bool(compute_entropy),
        deferred=logits.dtype == torch.float16 and _is_one(grad_scale),
        inplace=inplace,
        implementation=implementation,
    )
    if torch.is_grad_enabled() and logits.requires_grad:
        loss, terms, sums, logps, entropies = FusedLoss.apply(logits, tokens, scales, options)
    else:
        options = options._replace(deferred=False)
        terms, logps, entropies, _ = run_fused_loss(logits, tokens, scales, options)
        sums = terms.sum((1, 2))
        loss = sums[0].clone()
    metrics = metrics_of(
        terms, sums, has_ref=ref_logps is not None, has_entropy=entropies is not None
    )
    return LossOutput(loss, metrics, sums, logps, entropies)


def selective_log_softmax(
    logits,
    ids,
    mask=None,
    *,
    temperature=1.0,
    compute_entropy=False,
    inplace=False,
    implementation="auto",
):
    """Log-probability of one token per row of logits, and the entropy of the row.

        logp[b, t] = log_softmax(logits[b, t] / temperature)[ids[b, t]]
        H[b, t] = -sum_v p[b, t, v] log p[b, t, v]

    Both are differentiable in the logits with any upstream gradient:

        dlogits_j = (g (1[j = id] - p_j) - h p_j (log p_j + H)) / temperature

    for g = dL/dlogp and h = dL/dH. The softmax is never stored; backward recomputes it.

    Args:
        logits: (B, T, V), (B, T + 1, V) or (N, V), as in `grpo_loss`.
        ids: (B, T) or (N,) integer.
        mask: of the shape of ids, nonzero = active; None = all active. Masked results are 0.
        temperature: number or 0-d tensor > 0.
        compute_entropy: whether to compute the entropies; they cost nothing when not.
        inplace: write the gradient over the logits in backward, as in `grpo_loss`.
        implementation: as in `grpo_loss`.

    Returns:
        (logps, entropies): float32 of the shape of ids; entropies is None without compute_entropy.

    Raises:
        ValueError: as `grpo_loss`.
        RuntimeError: a second backward with inplace.
    """
    flat = logits.dim() == 2
    if flat:
        if len(logits) != len(ids):
            raise ValueError(f"logits must be (N, V) for ids (N,), got {len(logits)}, {len(ids)}")
        logits, ids, mask = (None if t is None else t.unsqueeze(0) for t in (logits, ids, mask))
    validation.check_logits(logits, ids, "ids", inplace)
    validation.check_tokens(logits, ids, "ids", {"mask": mask})
    validation.check_ids(logits, ids, "ids", mask)
    temperature = validation.check_scale("temperature", temperature, logits, positive=True)
    options = LogProbOptions(
        bool(compute_entropy), inplace, validation.choose_implementation(implementation, logits)
    )
    tokens = (ids.contiguous(), None if mask is None else (mask != 0).contiguous())
    if torch.is_grad_enabled() and logits.requires_grad:
        logps, entropies = LogProb.apply(logits, tokens, temperature, options)
    else:
        logps, entropies, _, _ = run_logprob(logits, tokens, temperature, options)
    if flat:
        logps, entropies = (None if t is None else t.squeeze(0) for t in (logps, entropies))
    return logps, entropies


def _is_one(scale):
    return not isinstance(scale, torch.Tensor) and scale == 1.0


def _per_token(advantages):
    return advantages if advantages.dim() == 2 else advantages[:, None]


def _constant(values):
    """Log-probabilities as a contiguous float32 constant."""
    return None if values is None else values.detach().float().contiguous()
