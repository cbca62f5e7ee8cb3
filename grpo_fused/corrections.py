"""Importance weights for rollouts of another policy, and masks that select training tokens.

These functions track no gradient and never synchronise with the device: values are validated on
CPU tensors only. Their results are arguments of the losses: `importance_sampling_ratio`
(rollout_weights) and `policy_mask`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_fused.checks import active_tokens, check_choice, check_tensor
from grpo_fused.collectives import check_group, reduce_over_ranks
from grpo_fused.sequences import advantages_of, as_given, lay_out_sequences

LIMIT = 80.0  # exponents are clamped to +-80, as everywhere in the package
LEVELS = ("token", "sequence", "sequence_mean")
MODES = ("truncate", "mask")


@torch.no_grad()
def rollout_weights(
    old_logps: Tensor,
    sampling_logps: Tensor,
    mask: Tensor | None = None,
    *,
    level: str = "token",
    mode: str = "truncate",
    cap: float | None = 3.0,
    floor: float | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Importance weights of the old policy in the training engine relative to the sampling policy.

        d_t = old_logps_t - sampling_logps_t
        w = exp(d_t)                     (level "token")
          | exp(sum over active t d_t)   (level "sequence")
          | exp(mean over active t d_t)  (level "sequence_mean", the geometric mean)
        min(max(w, floor), cap)               (mode "truncate")
        w if floor <= w <= cap else 0         (mode "mask")

    Tokens with a NaN in sampling_logps count as d = 0. The argument of exp is clamped to +-80.

    Args:
        old_logps: (B, T) float, or packed (N,); ignored where masked.
        sampling_logps: of the shape of old_logps, log-probabilities reported by the sampler (vLLM,
            SGLang); NaN = unknown.
        mask: of the shape of old_logps, nonzero = active; None = all active.
        level: "token", "sequence" or "sequence_mean".
        mode: "truncate" or "mask".
        cap: upper bound > 0; None = unbounded. The default is that of TRL 1.16.
        floor: lower bound in [0, cap); None = unbounded.
        cu_seqlens: (B + 1,) int32 or int64, for packed sequences: 0 and the end of each sequence;
            sequences may be empty.
        sequence_group: the ranks that hold the tokens of the same sequences, as in `grpo_loss`.

    Returns:
        float32, for `importance_sampling_ratio`. Level "token": the shape of old_logps, 1 where
        masked. Levels of sequences: (B, 1), packed (B,).

    Raises:
        ValueError: mismatched shapes or devices; unknown level or mode; bounds that violate
            0 <= floor < cap; cu_seqlens that decrease or do not span 0 to N (on the CPU).

    References:
        Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (mode "truncate"),
        https://fengyao.notion.site/off-policy-rl.
        When Speed Kills Stability (level "sequence", mode "mask"),
        https://richardli.xyz/rl-collapse.
        seq-mask-tis of NeMo-RL and OpenRLHF keeps the weights of tokens, where those of level
        "sequence_mean" and mode "mask" are not 0.
    """
    check_choice("level", level, LEVELS)
    check_choice("mode", mode, MODES)
    if cap is not None and not (_is_number(cap) and cap > 0):
        raise ValueError(f"cap must be a positive number or None, got {cap!r}")
    if floor is not None and not (_is_number(floor) and 0 <= floor < (cap or math.inf)):
        raise ValueError(f"floor must be None or in [0, cap), got {floor!r} with cap {cap!r}")
    sequences, (old_logps, sampling_logps) = lay_out_sequences(
        mask, cu_seqlens, sequence_group, old_logps=old_logps, sampling_logps=sampling_logps
    )
    difference = _difference(old_logps, sampling_logps)
    reduce = {"sequence": sequences.sum, "sequence_mean": sequences.mean}
    difference = reduce.get(level, sequences.select)(difference)
    weights = difference.clamp(-LIMIT, LIMIT).exp()
    low, high = 0.0 if floor is None else floor, math.inf if cap is None else cap
    if mode == "truncate":
        weights = weights.clamp(low, high)
    else:
        weights = weights.masked_fill((weights < low) | (weights > high), 0.0)
    if level == "token" and sequences.active is not None:
        weights = torch.where(sequences.active, weights, 1.0)
    return as_given(weights, cu_seqlens).float()


@torch.no_grad()
def off_policy_mask(
    advantages: Tensor,
    logps: Tensor,
    sampling_logps: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float,
    cu_seqlens: Tensor | None = None,
    sequence_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Mask that drops off-policy sequences with a negative advantage.

        keep = not (A < 0 and mean over active t (sampling_logps_t - logps_t) > threshold)

    Tokens with a NaN in sampling_logps count as a difference of 0 and are included in the mean, as
    in TRL.

    Args:
        advantages: (B,), or the shape of logps. With cu_seqlens (B,) or (N,); if B = N, they are
            per sequence.
        logps: (B, T) float, or packed (N,), log-probabilities under the current policy.
        sampling_logps: of the shape of logps, log-probabilities under the sampling policy; NaN =
            unknown.
        mask: of the shape of logps, nonzero = active; None = all active.
        threshold: number >= 0.
        cu_seqlens, sequence_group: as in rollout_weights.

    Returns:
        bool, for `policy_mask`, True = keep: (B, 1) for advantages (B,), packed (B,); the shape of
        logps for advantages per token, True where masked.

    Raises:
        ValueError: mismatched shapes or devices; a negative threshold; cu_seqlens that decrease or
            do not span 0 to N (on the CPU).

    References:
        DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, eq. 9.
    """
    if not _is_number(threshold) or threshold < 0:
        raise ValueError(f"threshold must be a number >= 0, got {threshold!r}")
    sequences, (rows, sampling_logps) = lay_out_sequences(
        mask, cu_seqlens, sequence_group, logps=logps, sampling_logps=sampling_logps
    )
    advantages_of(advantages, sequences, logps)
    off_policy = sequences.mean(-_difference(rows, sampling_logps)) > threshold
    if tuple(advantages.shape) == (sequences.number,):
        return as_given(~(off_policy & (advantages < 0)), cu_seqlens)
    dropped = sequences.spread(off_policy) & (advantages < 0)
    if sequences.active is not None:
        dropped = dropped & sequences.active
    return as_given(~dropped, cu_seqlens)


@torch.no_grad()
def entropy_quantile_mask(
    entropies: Tensor,
    mask: Tensor | None = None,
    *,
    share: float,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Mask that keeps the active tokens with the highest entropies.

        keep = active and H >= quantile(H of the active tokens, 1 - share)

    with the linear interpolation of torch.quantile and no limit on the number of tokens. Bisection
    over the bits of a float32 finds the exact order statistics in 32 counts, without sorting. Ranks
    exchange counts alone and may hold different numbers of tokens.

    Args:
        entropies: (B, T) or (N,) float; ignored, NaN included, where masked.
        mask: of the shape of entropies, nonzero = active; None = all active.
        share: kept fraction in [0, 1]; 0 keeps the highest entropy alone.
        process_group: a torch.distributed group, e.g. `torch.distributed.group.WORLD`, for a
            quantile over all of its ranks, each of which must call this function: 35 all-reduces
            of one number. None = the quantile of this tensor.

    Returns:
        bool, for `policy_mask`, of the shape of `entropies`, False where masked. An active NaN
        ranks highest and is dropped.

    Raises:
        ValueError: mismatched shapes or devices; share outside [0, 1]; an invalid process group.

    References:
        Beyond the 80/20 Rule, https://arxiv.org/abs/2506.01939 (share 0.2).
    """
    if not _is_number(share) or not 0 <= share <= 1:
        raise ValueError(f"share must be a number in [0, 1], got {share!r}")
    check_group("process_group", process_group)
    check_tensor("entropies", entropies)
    active = active_tokens(mask, entropies)

    def over_ranks(number, op="SUM"):
        return number if process_group is None else reduce_over_ranks(number, process_group, op)

    entropies = entropies.float()
    # Integers in the order of the floats; masked tokens, NaN and one padding key come last.
    last = torch.iinfo(torch.int32).max
    keys = _swap_order(entropies.contiguous().view(torch.int32))
    keys = F.pad(keys.masked_fill(~active | entropies.isnan(), last).flatten(), (0, 1), value=last)

    def count_up_to(key):
        return over_ranks(torch.count_nonzero(keys <= key))

    rank = (over_ranks(active.sum()).double() - 1).clamp(min=0) * (1.0 - share)
    below, above = rank.floor(), rank.ceil()
    # Smallest key with more than `below` keys up to it, by bisection, then the next larger one.
    key = torch.full_like(rank, -last - 1, dtype=torch.int64)
    high = torch.full_like(key, last)
    for _ in range(32):
        middle = (key + high) >> 1
        reached = count_up_to(middle) > below
        key, high = torch.where(reached, key, middle + 1), torch.where(reached, middle, high)
    following = over_ranks(keys.masked_fill(keys <= key, last).amin(), "MIN")
    following = torch.where(count_up_to(key) > above, key, following)
    lower, upper = (_swap_order(k.int()).view(torch.float32).double() for k in (key, following))
    return active & (entropies >= torch.lerp(lower, upper, rank - below).float())


def _swap_order(bits):
    """Map the bits of a float32 to an int32 of the same order; its own inverse."""
    return bits ^ ((bits >> 31) & torch.iinfo(torch.int32).max)


def _difference(logps, sampling_logps):
    """logps - sampling_logps in float64, 0 where sampling_logps is NaN."""
    difference = logps.double() - sampling_logps.double()
    return torch.where(sampling_logps.isnan(), 0.0, difference)


def _is_number(value):
    return isinstance(value, (int, float)) and not math.isnan(value)
