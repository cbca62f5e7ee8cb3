"""PPO with a value model: rewards with a KL penalty, their advantages, and the value loss.

With `grpo_loss(..., loss_type="ppo")` on the advantages these are the PPO that DeepSeekMath
compares GRPO with:

    rewards = kl_rewards(scores, old_logps, ref_logps, mask, beta=0.05)
    advantages, returns = gae_advantages(rewards, old_values, mask)
    advantages = whiten(advantages, mask)
    loss = grpo_loss(logits, ids, mask, advantages, old_logps=old_logps, loss_type="ppo").loss
    loss = loss + 0.1 * value_loss(values, returns, mask, old_values=old_values).loss

Rewards and advantages track no gradient, compute in float64 and return float32. Nothing
synchronises with the device: values are validated on CPU tensors only.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_fused.advantages import suffix_scan
from grpo_fused.bundles import Number
from grpo_fused.checks import NUMBERS, active_tokens, check_choice, check_tensor
from grpo_fused.collectives import check_group, reduce_over_ranks
from grpo_fused.losses.kl import KL_ESTIMATORS, weighted
from grpo_fused.losses.weights import evaluate, rule_weight
from grpo_fused.sequences import lay_out_sequences

# Entries of ValueLossOutput.sums, over active tokens.
VALUE_SUMS = (
    "loss",
    "tokens",
    "clipped",
    "values",
    "returns",
    "squared_returns",
    "errors",
    "squared_errors",
)


class ValueLossOutput(NamedTuple):
    """Result of `value_loss`; all but `loss` detached.

    Attributes:
        loss: () float32, or of the shape of values for reduction="none"; differentiable.
        metrics: dict of () float32 on the device, of the tokens of this call, see `value_metrics`.
        sums: (8,) float64, in the order of VALUE_SUMS. Summed over ranks and micro-batches they
            give the metrics of the full batch: `value_metrics(sums)`.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    sums: Tensor


@torch.no_grad()
def kl_rewards(
    rewards: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float,
    kl_estimator: str = "k1",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Rewards per token with a penalty on the divergence from a reference model, as PPO has it.

        r_t = score_t - beta kl(logps_t, ref_logps_t)
        kl = logps_t - ref_logps_t                       (k1)

    where score_t is the reward of the token, or that of the completion at its last active token and
    0 elsewhere. The reward of a completion without an active token is lost.

    Args:
        rewards: (B,) float, integer or bool, one per completion, or of the shape of logps, ignored
            where masked. With cu_seqlens and B = N they are per completion.
        logps: (B, T) float, or packed (N,), log-probabilities of the policy that sampled; ignored
            where masked, as ref_logps are.
        ref_logps: of the shape of logps, under the reference model.
        mask: of the shape of logps, nonzero = active; None = all active.
        beta: number, coefficient of the penalty; 0 = no penalty, whatever the log-probabilities.
        kl_estimator: "k1", "k2", "k3" or "abs", as in `grpo_loss`. Those with a "+" differ in their
            gradient alone, and here there is none.
        cu_seqlens: (B + 1,) int32 or int64, for packed sequences: 0 and the end of each sequence;
            sequences may be empty.

    Returns:
        float32 of the shape of logps, exactly 0 where masked; the rewards of `gae_advantages`.

    Raises:
        ValueError: mismatched shapes or devices; a beta that is not a finite number; an unknown
            kl_estimator; cu_seqlens that decrease or do not span 0 to N (on the CPU).

    References:
        DeepSeekMath, https://arxiv.org/abs/2402.03300, eq. 2 (k1).
    """
    if not isinstance(beta, NUMBERS) or not math.isfinite(beta):
        raise ValueError(f"beta must be a finite number, got {beta!r}")
    check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    shape = tuple(logps.shape) if isinstance(logps, torch.Tensor) else None
    sequences, (logps, ref_logps) = lay_out_sequences(
        mask, cu_seqlens, None, logps=logps, ref_logps=ref_logps
    )
    check_tensor("rewards", rewards)
    wanted = ((sequences.number,), shape)
    if tuple(rewards.shape) not in wanted or rewards.device != logps.device:
        got = f"{tuple(rewards.shape)} on {rewards.device}"
        raise ValueError(
            f"rewards must have shape {wanted[0]} or {shape} on {logps.device}, got {got}"
        )
    scores = rewards.double()
    if tuple(rewards.shape) == wanted[0]:
        is_last = _following(sequences) == sequences.length
        scores = torch.where(is_last, sequences.spread(scores), 0.0)
    penalty = KL_ESTIMATORS[kl_estimator](ref_logps.double() - logps.double())[0]
    result = sequences.select(scores.view_as(logps) - weighted(float(beta), penalty))
    return result.float().view(shape)


@torch.no_grad()
def gae_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.

        delta_t = r_t + gamma V_t+1 - V_t
        A_t = delta_t + gamma lam A_t+1 = sum_k (gamma lam)^k delta_t+k
        returns_t = A_t + V_t

    where t + 1 is the next active token and V and A are 0 after the last one. Masked tokens, such
    as tool outputs within a completion, are skipped. Takes log2(T) vectorised steps.

    Args:
        rewards: (B, T) float, integer or bool, or packed (N,); ignored, NaN included, where masked.
        values: of the shape of rewards, predictions of the value model before each token; ignored
            where masked.
        mask: of the shape of rewards, nonzero = active; None = all active.
        gamma: discount factor in [0, 1].
        lam: lambda in [0, 1]; 0 gives the TD error, 1 the discounted return minus V.
        cu_seqlens: as in kl_rewards.

    Returns:
        (advantages, returns): float32 of the shape of rewards, exactly 0 where masked; not
        whitened.

    Raises:
        ValueError: mismatched shapes or devices; gamma or lam outside [0, 1]; cu_seqlens as in
            kl_rewards.

    References:
        High-Dimensional Continuous Control Using GAE, https://arxiv.org/abs/1506.02438, eq. 16.
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    shape = tuple(rewards.shape) if isinstance(rewards, torch.Tensor) else None
    sequences, (rewards, values) = lay_out_sequences(
        mask, cu_seqlens, None, rewards=rewards, values=values
    )
    values = sequences.select(values.double())
    delta = rewards.double() - values
    delta = delta + gamma * F.pad(values, (0, 1)).gather(1, _following(sequences))
    # Masked tokens pass later advantages on unchanged: they add 0 and decay by 1.
    decay = torch.full_like(delta, gamma * lam)
    if sequences.active is not None:
        decay = decay.masked_fill(~sequences.active, 1.0)
    # The last token of a sequence, masked or not, takes nothing from the next sequence.
    columns = torch.arange(1, sequences.length + 1, device=delta.device)
    decay = decay.masked_fill(columns == sequences.ends, 0.0)
    advantages = sequences.select(suffix_scan(sequences.select(delta), decay))
    returns = advantages + values
    return advantages.float().view(shape), returns.float().view(shape)


@torch.no_grad()
def whiten(
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Normalise advantages to mean 0 and variance 1 over the active tokens, as PPO does.

        (A - mean(A)) / sqrt(var(A) + 1e-8)

    with the unbiased variance. Call it before splitting into micro-batches. TRL and verl name it
    masked_whiten.

    Args:
        advantages: float, any shape; ignored, NaN included, where masked.
        mask: of the shape of advantages, nonzero = active; None = all active.
        group: the ranks that each have a part of the batch, over all of which mean and variance
            are; every one must call it, with any shape. None = this rank has the batch.

    Returns:
        float32 of the shape of advantages, exactly 0 where masked.

    Raises:
        ValueError: mismatched shapes or devices; a group that is none.
    """
    check_tensor("advantages", advantages)
    check_group("group", group)
    active = active_tokens(mask, advantages)
    values = torch.where(active, advantages.double(), 0.0)
    sums = torch.stack([active.sum().double(), values.sum()])
    count, total = (sums if group is None else reduce_over_ranks(sums, group)).unbind()
    centred = torch.where(active, values - total / count.clamp(min=1), 0.0)
    squares = centred.square().sum()
    squares = squares if group is None else reduce_over_ranks(squares, group)
    variance = squares / (count - 1).clamp(min=1)
    return (centred / (variance + 1e-8).sqrt()).float()


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    old_values: Tensor | None = None,
    cliprange: float = 0.2,
    normalizer: str = "token-mean",
    reduction: str = "sum",
    num_items_in_batch: Number | None = None,
    num_sequences_in_batch: Number | None = None,
    max_completion_length: Number | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_group: "torch.distributed.ProcessGroup | None" = None,
) -> ValueLossOutput:
    """PPO's clipped loss of a value model.

        loss = sum_bt w[b, t] max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)[b, t] / 2

    with c the cliprange and w the weights of the normalizer (`token_weights`). Where the clipped
    error is the larger one the gradient is 0, elsewhere it is w (V - R). Masked tokens contribute
    nothing, and their gradient is exactly 0.

    Args:
        values: (B, T) float, or packed (N,), predictions of the value model before each token.
        returns: of the shape of values, constants, from `gae_advantages`.
        mask: of the shape of values, nonzero = active; None = all active. Masked values are never
            read: NaN there changes nothing.
        old_values: of the shape of values, constants, predictions when the completions were
            sampled; None = no clipping.
        cliprange: number > 0, of the scale of the returns. The default is that of OpenAI Baselines
            (as its ratio clip), TRL and SkyRL; verl and AReaL have 0.5.
        normalizer: a rule of `token_weights`. The default is what TRL, verl and AReaL do; the
            row "ppo" of LOSSES has seq-mean-token-mean.
        reduction: "sum", or "none": unweighted losses per token, exactly 0 where masked.
        num_items_in_batch, num_sequences_in_batch, max_completion_length: global divisors, see
            `token_weights`.
        cu_seqlens: as in kl_rewards.
        sequence_group: the ranks that hold the tokens of the same sequences, as in `grpo_loss`.

    Returns:
        ValueLossOutput. The loss is computed in float32, in float64 if the values are. Without an
        active token it is a differentiable 0. NaN in an active token is NaN in the loss.

    Raises:
        ValueError: values that are not floating point; mismatched shapes or devices; a cliprange
            that is not a positive number; an unknown normalizer or reduction; divisors as in
            `token_weights`; cu_seqlens that decrease or do not span 0 to N (on the CPU).

    References:
        PPO, https://arxiv.org/abs/1707.06347, eq. 9 (unclipped). The clipping is that of its code,
            OpenAI Baselines, see https://arxiv.org/abs/2005.12729.
    """
    if not isinstance(cliprange, NUMBERS) or not 0 < cliprange < math.inf:
        raise ValueError(f"cliprange must be a finite number > 0, got {cliprange!r}")
    check_choice("reduction", reduction, ("sum", "none"))
    tensors = {"values": values, "returns": returns}
    if old_values is not None:
        tensors["old_values"] = old_values
    sequences, found = lay_out_sequences(mask, cu_seqlens, sequence_group, **tensors)
    if not values.is_floating_point():
        raise ValueError(f"values must be floating point, got {values.dtype}")
    weight = rule_weight(
        sequences,
        normalizer,
        num_items_in_batch=num_items_in_batch,
        num_sequences_in_batch=num_sequences_in_batch,
        max_completion_length=max_completion_length,
    )
    dtype = torch.promote_types(values.dtype, torch.float32)
    prediction, target, *old = (sequences.select(x.to(dtype)) for x in found)
    errors = prediction - target.detach()
    losses, clipped = errors.square(), torch.zeros_like(errors, dtype=torch.bool)
    if old:
        low, high = old[0].detach() - cliprange, old[0].detach() + cliprange
        held = (prediction.detach().clamp(low, high) - target.detach()).square()
        clipped = ~(held <= losses.detach())  # NaN too
        losses = torch.where(clipped, held, losses)
    losses = losses / 2
    if reduction == "sum":
        losses = losses * evaluate(weight, sequences)
    sums = _value_sums(losses, clipped, prediction, target, sequences)
    loss = losses.sum() if reduction == "sum" else losses.view(values.shape)
    return ValueLossOutput(loss, value_metrics(sums), sums)


@torch.no_grad()
def value_metrics(sums: Tensor) -> dict[str, Tensor]:
    """Metrics of a batch from its `ValueLossOutput.sums` (8,).

    Returns:
        dict of 0-d float32 tensors: `value/mean` of V; `value/clip_ratio`, the share of tokens that
        are clipped; `value/explained_variance`, 1 - var(R - V) / var(R), and 0 where all returns
        are equal. All are 0 without tokens.
    """
    _, tokens, *totals = sums.unbind()
    clipped, value, mean, square, error, squared_error = torch.stack(totals) / tokens.clamp(min=1)
    variance, unexplained = square - mean.square(), squared_error - error.square()
    # The variance of equal returns is rounding, of about 1e-16 of their squares.
    explained = 1 - unexplained / variance
    explained = torch.where(variance <= 1e-12 * square, 0.0, explained)
    names = ("value/mean", "value/clip_ratio", "value/explained_variance")
    return dict(zip(names, torch.stack((value, clipped, explained)).float().unbind(), strict=True))


@torch.no_grad()
def _value_sums(losses, clipped, values, returns, sequences):
    """(8,) float64, in the order of VALUE_SUMS, of tensors that are 0 where masked."""
    values, returns = values.double(), returns.double()
    tokens = torch.as_tensor(sequences.local.total, dtype=torch.float64, device=values.device)
    errors = returns - values
    parts = (losses, clipped, values, returns, returns.square(), errors, errors.square())
    loss, *sums = (part.sum().double() for part in parts)
    return torch.stack((loss, tokens, *sums))


def _following(sequences):
    """(B, T) int64, the column of the next active token of the same sequence, T without one."""
    T = sequences.length
    tokens = torch.arange(T, device=sequences.device).expand(sequences.shape)
    if sequences.active is not None:
        tokens = tokens.masked_fill(~sequences.active, T)
    following = F.pad(tokens, (0, 1), value=T).flip(1).cummin(1).values.flip(1)[:, 1:]
    return following.masked_fill(following >= sequences.ends, T)
