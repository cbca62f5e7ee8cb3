"""Corrections for a policy that is not the one that sampled, and masks that choose what trains.

Nothing here has a gradient or waits for a device (values are checked on CPU tensors only). Results
are arguments of the losses: `importance_sampling_ratio` (rollout_weights) and `policy_mask`.
"""

import math

import torch
import torch.nn.functional as F

from grpo_fused.checks import check_choice, check_cu_seqlens, check_tensor
from grpo_fused.sequences import Packed, Padded

# Arguments of exp are kept within +-80, as everywhere in the package.
LIMIT = 80.0
LEVELS = ("token", "sequence")
MODES = ("truncate", "mask")


@torch.no_grad()
def rollout_weights(
    old_logps,
    sampling_logps,
    mask=None,
    *,
    level="token",
    mode="truncate",
    cap=3.0,
    floor=None,
    cu_seqlens=None,
):
    """Importance weights between the training engine's old policy and the one that sampled.

        d_t = old_logps_t - sampling_logps_t
        w = exp(d_t)                    (level "token")
          | exp(sum over active t d_t)  (level "sequence")
        truncate: min(max(w, floor), cap)
        mask: w within [floor, cap], else 0

    A NaN in sampling_logps (a token the sampler could not score) counts as d = 0. The argument of
    exp is clamped to +-80.

    Args:
        old_logps: (B, T) float, or (N,) packed; anything under the mask.
        sampling_logps: the same shape: what the sampler (vLLM, SGLang) reported.
        mask: the same shape, nonzero = active; None = all active.
        level: "token" or "sequence".
        mode: "truncate" or "mask".
        cap: largest weight, positive; None = no bound. 3 is TRL 1.16's default.
        floor: smallest weight, not negative, below cap; None = no bound.
        cu_seqlens: (B+1,) int32 or int64 where the input is packed: 0, the ends of the sequences
            (sequences may be empty), N.

    Returns:
        float32, for `importance_sampling_ratio`. Level "token": the shape of old_logps, 1 under the
        mask. Level "sequence": (B, 1), packed (B,).

    Raises:
        ValueError: shapes or devices that do not agree; unknown level or mode; bounds that are not
            0 <= floor < cap; cu_seqlens that do not rise from 0 to N (values on the CPU only).

    References:
        Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (truncated),
        https://fengyao.notion.site/off-policy-rl.
        When Speed Kills Stability (sequence level, masked), https://richardli.xyz/rl-collapse.
    """
    check_choice("level", level, LEVELS)
    check_choice("mode", mode, MODES)
    if cap is not None and not (_is_number(cap) and cap > 0):
        raise ValueError(f"cap must be a positive number or None, got {cap!r}")
    if floor is not None and not (_is_number(floor) and 0 <= floor < (cap or math.inf)):
        raise ValueError(f"floor must be None or in [0, cap), got {floor!r} with cap {cap!r}")
    sequences, (old_logps, sampling_logps) = _tokens(
        mask, cu_seqlens, old_logps=old_logps, sampling_logps=sampling_logps
    )
    difference = _difference(old_logps, sampling_logps)
    difference = sequences.sum(difference) if level == "sequence" else sequences.select(difference)
    weights = difference.clamp(-LIMIT, LIMIT).exp()
    low, high = 0.0 if floor is None else floor, math.inf if cap is None else cap
    if mode == "truncate":
        weights = weights.clamp(low, high)
    else:
        weights = weights.masked_fill((weights < low) | (weights > high), 0.0)
    if level == "token" and sequences.active is not None:
        weights = torch.where(sequences.active, weights, 1.0)
    return _as_given(weights, cu_seqlens).float()


@torch.no_grad()
def off_policy_mask(advantages, logps, sampling_logps, mask=None, *, threshold, cu_seqlens=None):
    """Drops sequences that did badly and that the policy has moved away from.

        keep = not (A < 0 and mean over active t (sampling_logps_t - logps_t) > threshold)

    A NaN in sampling_logps (a token the sampler could not score) is no evidence: it counts as a
    difference of 0, in the mean's denominator too, as in TRL.

    Args:
        advantages: (B,), or one per token, the shape of logps. Packed: (B,) or (N,), read as (B,)
            where B = N.
        logps: (B, T) float, or (N,) packed: log-probabilities under the policy of now.
        sampling_logps: the same shape: under the policy that sampled.
        mask: the same shape, nonzero = active; None = all active.
        threshold: number, not negative.
        cu_seqlens: as in rollout_weights.

    Returns:
        bool, for `policy_mask`, True = keep: (B, 1) for advantages (B,), packed (B,); the shape of
        logps for advantages per token, True under the mask.

    Raises:
        ValueError: shapes or devices that do not agree; a negative threshold; cu_seqlens that do
            not rise from 0 to N (values on the CPU only).

    References:
        DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, eq. 9.
    """
    if not _is_number(threshold) or threshold < 0:
        raise ValueError(f"threshold must be a number >= 0, got {threshold!r}")
    shape = tuple(logps.shape) if isinstance(logps, torch.Tensor) else None
    sequences, (logps, sampling_logps) = _tokens(
        mask, cu_seqlens, logps=logps, sampling_logps=sampling_logps
    )
    check_tensor("advantages", advantages)
    wanted = ((sequences.number,), shape)
    if tuple(advantages.shape) not in wanted or advantages.device != logps.device:
        choice = f"{wanted[0]} or {wanted[1]} on {logps.device}"
        got = f"{tuple(advantages.shape)} on {advantages.device}"
        raise ValueError(f"advantages must have shape {choice}, got {got}")
    off_policy = sequences.mean(-_difference(logps, sampling_logps)) > threshold
    if tuple(advantages.shape) == wanted[0]:
        return _as_given(~(off_policy & (advantages < 0)), cu_seqlens)
    dropped = sequences.spread(off_policy) & (advantages < 0)
    if sequences.active is not None:
        dropped = dropped & sequences.active
    return _as_given(~dropped, cu_seqlens)


@torch.no_grad()
def entropy_quantile_mask(entropies, mask=None, *, share, process_group=None):
    """Keeps the share of active tokens with the highest entropy: where the policy decides.

        keep = active and H >= quantile(H of the active tokens, 1 - share)

    with torch.quantile's linear interpolation, for any number of tokens. The order statistics are
    found by bisection over the bits of a float32: 32 counts, exact, without a sort. Ranks exchange
    nothing but counts, and may hold any number of tokens.

    Args:
        entropies: (B, T) or (N,) float; under the mask anything, NaN included.
        mask: the same shape, nonzero = active; None = all active.
        share: number in [0, 1]: 0.2 keeps a fifth; 1 keeps all; 0 keeps the highest alone.
        process_group: a torch.distributed group (`torch.distributed.group.WORLD`) whose ranks all
            call this and share one quantile, in 35 all-reduces of a number; None = this tensor's.

    Returns:
        bool, for `policy_mask`, the shape of `entropies`, False under the mask. An active NaN
        ranks highest and is not kept.

    Raises:
        ValueError: shapes or devices that do not agree; share outside [0, 1]; not a process group.

    References:
        Beyond the 80/20 Rule, https://arxiv.org/abs/2506.01939 (share 0.2).
    """
    if not _is_number(share) or not 0 <= share <= 1:
        raise ValueError(f"share must be a number in [0, 1], got {share!r}")
    if process_group is not None and not isinstance(process_group, torch.distributed.ProcessGroup):
        raise ValueError(f"process_group must be a group of this process, got {process_group!r}")
    check_tensor("entropies", entropies)
    active = torch.ones_like(entropies, dtype=torch.bool)
    if mask is not None:
        check_tensor("mask", mask, tuple(entropies.shape), entropies.device)
        active = mask != 0

    def over_ranks(number, op="SUM"):
        if process_group is not None:
            op = getattr(torch.distributed.ReduceOp, op)
            torch.distributed.all_reduce(number, op=op, group=process_group)
        return number

    entropies = entropies.float()
    # Floats as integers in the same order; what is not active, and one more, comes last.
    last = torch.iinfo(torch.int32).max
    keys = _swap_order(entropies.contiguous().view(torch.int32))
    keys = F.pad(keys.masked_fill(~active | entropies.isnan(), last).flatten(), (0, 1), value=last)

    def count_up_to(key):
        return over_ranks(torch.count_nonzero(keys <= key))

    rank = (over_ranks(active.sum()).double() - 1).clamp(min=0) * (1.0 - share)
    below, above = rank.floor(), rank.ceil()
    # The smallest key that more than `below` keys do not exceed, and the smallest one above it.
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
    """Bits of a float32 as an int32 that sorts as the float does; its own inverse."""
    return bits ^ ((bits >> 31) & torch.iinfo(torch.int32).max)


def _tokens(mask, cu_seqlens, **tensors):
    """(sequences, tensors (B, T)) of checked tensors that lie side by side; packed (1, N)."""
    shape = device = None
    for name, tensor in tensors.items():
        check_tensor(name, tensor, shape, device)
        shape, device = tuple(tensor.shape), tensor.device
        layout = "(B, T)" if cu_seqlens is None else "(N,) with cu_seqlens"
        if len(shape) != (2 if cu_seqlens is None else 1):
            remedy = "; packed tensors need cu_seqlens" if len(shape) == 1 else ""
            raise ValueError(f"{name} must have shape {layout}, got {shape}{remedy}")
    if mask is not None:
        check_tensor("mask", mask, shape, device)
    if cu_seqlens is None:
        tensors = list(tensors.values())
        return Padded(tensors[0], mask), tensors
    check_cu_seqlens(cu_seqlens, shape[0], device)
    tensors = [tensor[None] for tensor in tensors.values()]
    return Packed(tensors[0], None if mask is None else mask[None], cu_seqlens), tensors


def _difference(logps, sampling_logps):
    """logps - sampling_logps in float64, 0 for a token that the sampler could not score."""
    difference = logps.double() - sampling_logps.double()
    return torch.where(sampling_logps.isnan(), 0.0, difference)


def _as_given(values, cu_seqlens):
    """Values of tokens as they came; of sequences as (B, 1), packed (B,)."""
    if cu_seqlens is not None:
        return values.flatten()
    return values[:, None] if values.dim() == 1 else values


def _is_number(value):
    return isinstance(value, (int, float)) and not math.isnan(value)
