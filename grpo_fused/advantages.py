"""Advantages of sampled completions, computed from rewards within the group of a prompt.

These functions track no gradient and never synchronise with the device: values are validated on
CPU tensors only. They compute in float64 and return float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_fused.checks import active_tokens, check_choice, check_tensor, is_readable

EPSILON = 1e-4  # added to standard deviations, as in TRL: bounds groups of almost equal rewards
SCALES = ("group", "batch", "none")


@torch.no_grad()
def outcome_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    scale: str = "group",
    leave_one_out: bool = False,
) -> Tensor:
    """Group-relative advantages for outcome supervision, with one reward per completion.

        A_i = (r_i - b_i) / divisor
        b_i = mean(r_group)
            | mean(r_group without r_i)           (leave_one_out, RLOO)
        divisor = std(r_group) + 1e-4             (scale "group")
                | std(r_all) + 1e-4               (scale "batch")
                | 1                               (scale "none": Dr. GRPO; RLOO with leave_one_out)

    The standard deviation is unbiased (n - 1). Groups of equal rewards and groups of one completion
    have advantages of exactly 0. A NaN reward propagates to its group, with scale "batch" to all
    groups; put completions without a reward in groups of their own.

    Args:
        rewards: (B,) float, integer or bool.
        group_size: completions per prompt, at least 1, a divisor of B. The completions of a prompt
            are contiguous: rewards[0:group_size] is the first group.
        group_ids: (B,) integer, alternative to group_size: completions with equal ids form a
            group, of any size and in any order.
        scale: "group", "batch" or "none", the divisor of the centred rewards.
        leave_one_out: whether the baseline of a completion excludes its own reward.

    Returns:
        (B,) float32, on the device of `rewards`.

    Raises:
        ValueError: rewards not (B,); both or neither of group_size and group_ids; group_size
            below 1 or not a divisor of B; group_ids not (B,) integers; unknown scale.

    References:
        DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1.2 ("group").
        Understanding R1-Zero-Like Training (Dr. GRPO), https://arxiv.org/abs/2503.20783 ("none").
        Lite PPO, https://arxiv.org/abs/2508.08221 ("batch": mean of the group, std of the batch).
        Back to Basics (RLOO), https://arxiv.org/abs/2402.14740 (leave_one_out).
    """
    _check_dims("rewards", rewards, "(B,)")
    check_choice("scale", scale, SCALES)
    labels = _group_labels("rewards", rewards, group_size, group_ids)
    num_rewards = rewards.shape[0]
    rewards = rewards.double()
    centred, std, counts = _compare(rewards, labels, num_rewards)
    if leave_one_out:
        # n / (n - 1) (r - mean of the group) = r - mean of the others
        centred = centred * counts / (counts - 1).clamp(min=1)
    if scale == "group":
        centred = centred / (std + EPSILON)
    elif scale == "batch":
        variance = (rewards - rewards.mean()).square().sum() / max(num_rewards - 1, 1)
        centred = centred / (variance.sqrt() + EPSILON)
    return torch.where(counts > 1, centred, 0.0).float()


@torch.no_grad()
def process_advantages(
    step_rewards: Tensor,
    step_ends: Tensor,
    completion_length: int,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    scale: str = "group",
) -> Tensor:
    """Group-relative advantages for process supervision: normalised rewards of later steps, summed.

        R_ij = (r_ij - mean(r_group)) / divisor    over the rewards of all steps of the group
        divisor = std(r_group) + 1e-4              (scale "group")
                | 1                                (scale "none")
        A_it = sum of R_ij over the steps j with step_ends_ij >= t

    with the unbiased standard deviation (n - 1). Groups of equal rewards and groups with a single
    step have advantages of exactly 0, and so have tokens after the last step.

    Args:
        step_rewards: (B, S) float, integer or bool; ignored, NaN included, where step_ends < 0.
        step_ends: (B, S) integer, index of the last token of each step, in any order and possibly
            equal; negative = no step.
        completion_length: T, the width of the result.
        group_size, group_ids: as in outcome_advantages.
        scale: "group" or "none".

    Returns:
        (B, T) float32, on the device of `step_rewards`.

    Raises:
        ValueError: as outcome_advantages; a negative completion_length; on the CPU, a step that
            ends at or after completion_length (on other devices it counts for all tokens).

    References:
        DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1.3.
    """
    _check_dims("step_rewards", step_rewards, "(B, S)")
    device = step_rewards.device
    check_tensor("step_ends", step_ends, tuple(step_rewards.shape), device, integer=True)
    if not isinstance(completion_length, int) or completion_length < 0:
        raise ValueError(f"completion_length must be an integer >= 0, got {completion_length!r}")
    check_choice("scale", scale, ("group", "none"))
    labels = _group_labels("step_rewards", step_rewards, group_size, group_ids)
    ends = step_ends.long()
    if is_readable(ends.device) and (ends >= completion_length).any():
        raise ValueError(f"step_ends must be < {completion_length}, got {int(ends.max())}")

    # Missing steps form a group of their own, the last one, and end before the first token.
    num_sequences = ends.shape[0]
    labels = torch.where(ends >= 0, labels[:, None], num_sequences).flatten()
    centred, std, _ = _compare(step_rewards.double().flatten(), labels, num_sequences + 1)
    if scale == "group":
        centred = centred / (std + EPSILON)
    # After sorting by end, the later steps of a token are a suffix. Avoids atomics of a scatter.
    ends, order = ends.sort(dim=1, stable=True)
    steps = centred.view_as(ends).gather(1, order)
    later = F.pad(_suffix_scan(steps, torch.ones_like(steps)), (0, 1))  # (B, S + 1)
    tokens = torch.arange(completion_length, device=device).repeat(num_sequences, 1)
    return later.gather(1, torch.searchsorted(ends, tokens)).float()


@torch.no_grad()
def gae_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, for PPO with a value model (loss_type "ppo").

        delta_t = r_t + gamma V_t+1 - V_t
        A_t = delta_t + gamma lam A_t+1 = sum_k (gamma lam)^k delta_t+k
        returns_t = A_t + V_t

    where t + 1 is the next active token and V and A are 0 after the last one. Masked tokens, such
    as tool outputs within a completion, are skipped. Takes log2(T) vectorised steps.

    Args:
        rewards: (B, T) float, integer or bool; ignored, NaN included, where masked.
        values: (B, T) float, predictions of the value model before each token; ignored where
            masked.
        mask: (B, T) bool, integer or float, nonzero = active; None = all active.
        gamma: discount factor in [0, 1].
        lam: lambda in [0, 1]; 0 gives the TD error, 1 the discounted return minus V.

    Returns:
        (advantages, returns): (B, T) float32, exactly 0 where masked; not whitened.

    Raises:
        ValueError: mismatched shapes or devices; gamma or lam outside [0, 1].

    References:
        High-Dimensional Continuous Control Using GAE, https://arxiv.org/abs/1506.02438, eq. 16.
    """
    _check_dims("rewards", rewards, "(B, T)")
    check_tensor("values", values, tuple(rewards.shape), rewards.device)
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")

    active = active_tokens(mask, rewards)
    values = torch.where(active, values.double(), 0.0)
    # Index of the first active token at or after each position, or T.
    tokens = torch.arange(active.shape[1] + 1, device=active.device)
    tokens = torch.where(F.pad(active, (0, 1), value=True), tokens, active.shape[1])
    following = tokens.flip(1).cummin(1).values.flip(1)[:, 1:]
    delta = rewards.double() + gamma * F.pad(values, (0, 1)).gather(1, following) - values
    # Masked tokens pass later advantages on unchanged: they add 0 and decay by 1.
    decay = torch.full_like(delta, gamma * lam).masked_fill(~active, 1.0)
    advantages = _suffix_scan(torch.where(active, delta, 0.0), decay)
    advantages = torch.where(active, advantages, 0.0)
    return advantages.float(), (advantages + values).float()


@torch.no_grad()
def whiten(advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """Normalise advantages to mean 0 and variance 1 over the active tokens, as PPO does.

        (A - mean(A)) / sqrt(var(A) + 1e-8)

    with the unbiased variance. Call it before splitting into micro-batches. TRL and verl name it
    masked_whiten.

    Args:
        advantages: float, any shape; ignored, NaN included, where masked.
        mask: of the shape of advantages, nonzero = active; None = all active.

    Returns:
        float32 of the shape of advantages, exactly 0 where masked.

    Raises:
        ValueError: mismatched shapes or devices.
    """
    check_tensor("advantages", advantages)
    active = active_tokens(mask, advantages)
    count = active.sum()
    values = torch.where(active, advantages.double(), 0.0)
    centred = torch.where(active, values - values.sum() / count.clamp(min=1), 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return (centred / (variance + 1e-8).sqrt()).float()


@torch.no_grad()
def mask_truncated(mask: Tensor, truncated: Tensor) -> Tensor:
    """Mask out completions that were truncated at the length limit (overlong filtering).

    Normalizers that divide by the number of sequences still count them. Compute num_items_in_batch
    from the returned mask.

    Args:
        mask: (B, T) bool, integer or float, nonzero = active.
        truncated: (B,) bool, True = no end-of-sequence token.

    Returns:
        (B, T), a new tensor of the dtype of `mask`.

    Raises:
        ValueError: mismatched shapes or devices; truncated not bool.

    References:
        DAPO, https://arxiv.org/abs/2503.14476, section 3.4.
    """
    _check_dims("mask", mask, "(B, T)")
    check_tensor("truncated", truncated, tuple(mask.shape[:1]), mask.device)
    if truncated.dtype != torch.bool:
        raise ValueError(f"truncated must be bool, got {truncated.dtype}")
    return mask.masked_fill(truncated[:, None], 0)


def _group_labels(name, rewards, group_size, group_ids):
    """(B,) int64 in [0, B), equal within a group."""
    if (group_size is None) == (group_ids is None):
        got = "neither" if group_size is None else "both"
        raise ValueError(f"exactly one of group_size and group_ids must be given, got {got}")
    num_sequences = rewards.shape[0]
    if group_ids is None:
        if not isinstance(group_size, int) or group_size < 1:
            raise ValueError(f"group_size must be an integer >= 1, got {group_size!r}")
        if num_sequences % group_size != 0:
            raise ValueError(f"group_size {group_size} does not divide the {num_sequences} {name}")
        return torch.arange(num_sequences, device=rewards.device) // group_size
    check_tensor("group_ids", group_ids, (num_sequences,), rewards.device, integer=True)
    ids = group_ids.long()
    return torch.searchsorted(ids.sort().values, ids)  # first index of the id in sorted order


def _compare(values, labels, num_labels):
    """(values - mean of the group, unbiased std of the group, size of the group), each (N,).

    Groups are segments of the values sorted by label: O(N log N), without atomics and, unlike
    torch.unique, without a data-dependent shape.
    """
    order = labels.argsort(stable=True)
    offsets = torch.arange(num_labels + 1, device=labels.device)
    offsets = torch.searchsorted(labels[order], offsets)  # start of each segment

    def total(x):
        return torch.segment_reduce(x[order], "sum", offsets=offsets, unsafe=True)[labels]

    counts = offsets.diff()[labels]
    # Subtracting a member first gives exactly 0 for equal rewards; the rounded mean alone does not.
    centred = values - values[order][offsets[labels]]
    centred = centred - total(centred) / counts
    variance = total(centred.square()) / (counts - 1).clamp(min=1)
    return centred, variance.sqrt(), counts


def _suffix_scan(x, decay):
    """y_t = x_t + decay_t y_t+1 along dim 1, for x and decay (B, T), in log2(T) steps.

    It multiplies decays and never divides by them, so it neither overflows nor loses precision.
    With decay 1 it replaces torch.cumsum, which is not deterministic on CUDA.
    """
    step = 1
    while step < x.shape[1]:
        x = torch.cat((x[:, :-step] + decay[:, :-step] * x[:, step:], x[:, -step:]), 1)
        decay = torch.cat((decay[:, :-step] * decay[:, step:], decay[:, -step:]), 1)
        step *= 2
    return x


def _check_dims(name, tensor, layout):
    """Check the number of dimensions against a layout such as "(B,)" or "(B, T)"."""
    check_tensor(name, tensor)
    if tensor.dim() != sum(map(str.isalpha, layout)):
        raise ValueError(f"{name} must have shape {layout}, got {tuple(tensor.shape)}")
