"""Advantages of sampled completions, computed from rewards within the group of a prompt.

These functions track no gradient and never synchronise with the device: values are validated on
CPU tensors only. They compute in float64 and return float32.
"""

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_fused.checks import check_choice, check_dims, check_tensor, is_readable
from grpo_fused.groups import Groups, group_labels

EPSILON = 1e-4  # added to standard deviations, as in TRL (verl: 1e-6)
SCALES = ("group", "batch", "none", "centred", "mean")


@torch.no_grad()
def outcome_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    scale: str = "group",
    leave_one_out: bool = False,
    lengths: Tensor | None = None,
    epsilon: float = EPSILON,
) -> Tensor:
    """Group-relative advantages for outcome supervision, with one reward per completion.

        A_i = (r_i - b_i) / divisor
        b_i = mean(r_group)
            | mean(r_group without r_i)               (leave_one_out, RLOO)
            | sum(l_group r_group) / sum(l_group)     (lengths l, OPO)
        divisor = std(r_group) + epsilon        (scale "group")
                | std(r_all) + epsilon          (scale "batch")
                | std((r - b)_all) + epsilon    (scale "centred", REINFORCE++ with baseline)
                | mean(r_group)              (scale "mean", MaxRL)
                | 1                          (scale "none": Dr. GRPO, OPO; RLOO with leave_one_out)

    The standard deviation is unbiased (n - 1). Groups of equal rewards and groups of one completion
    have advantages of exactly 0. A NaN reward propagates to its group, with scales "batch" and
    "centred" to all groups; put completions without a reward in groups of their own.

    Scale "mean" is meant for rewards that are not negative, such as 0 and 1: groups whose mean is
    not positive have advantages of 0. It needs no epsilon; SkyRL adds 1e-6 to the mean.

    REINFORCE++ without a baseline is one group of all completions, group_size = B. With a KL
    penalty per token it is `whiten` of the returns that `gae_advantages` finds for `kl_rewards`,
    values of 0 and lam 1.

    Args:
        rewards: (B,) float, integer or bool.
        group_size: completions per prompt, at least 1, a divisor of B. The completions of a prompt
            are contiguous: rewards[0:group_size] is the first group.
        group_ids: (B,) integer, alternative to group_size: completions with equal ids form a
            group, of any size and in any order.
        scale: one of SCALES, the divisor of the centred rewards.
        leave_one_out: whether the baseline of a completion excludes its own reward.
        lengths: (B,) integer or float, at least 0, numbers of active tokens, for OPO. A group
            without tokens has its plain mean as baseline.
        epsilon: finite number > 0, added to standard deviations: bounds the advantages of groups
            with almost equal rewards. TRL has 1e-4, verl 1e-6.

    Returns:
        (B,) float32, on the device of `rewards`.

    Raises:
        ValueError: rewards not (B,); both or neither of group_size and group_ids; group_size
            below 1 or not a divisor of B; group_ids not (B,) integers; unknown scale; lengths not
            (B,), or with leave_one_out; on the CPU, a negative length; an epsilon that is not a
            finite number > 0.

    References:
        DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1.2 ("group").
        Understanding R1-Zero-Like Training (Dr. GRPO), https://arxiv.org/abs/2503.20783 ("none").
        Lite PPO, https://arxiv.org/abs/2508.08221 ("batch": mean of the group, std of the batch).
        REINFORCE++, https://arxiv.org/abs/2501.03262 ("centred"). The paper divides by the std of
            rewards minus the mean of their group, not by that of the rewards; verl takes it over
            tokens, which `whiten` of scale "none" does.
        MaxRL, https://arxiv.org/abs/2602.02710 ("mean").
        Back to Basics (RLOO), https://arxiv.org/abs/2402.14740 (leave_one_out).
        On-Policy RL with Optimal Reward Baseline (OPO), https://arxiv.org/abs/2505.23585 (lengths).
            verl gives the only completion of a group its reward as advantage, instead of 0.
    """
    check_dims("rewards", rewards, "(B,)")
    check_choice("scale", scale, SCALES)
    _check_epsilon(epsilon)
    if lengths is not None:
        check_tensor("lengths", lengths, tuple(rewards.shape), rewards.device)
        if leave_one_out:
            raise ValueError("leave_one_out must be False with lengths, got True")
        if is_readable(lengths.device) and (lengths < 0).any():
            raise ValueError(f"lengths must be >= 0, got {lengths.min().item()}")
    labels = group_labels("rewards", rewards, group_size, group_ids)
    rewards = rewards.double()
    groups = Groups(labels, rewards.shape[0])
    centred = groups.centre(rewards)
    advantages = centred
    if lengths is not None:
        advantages = groups.centre(rewards, lengths.double())
    elif leave_one_out:
        # n / (n - 1) (r - mean of the group) = r - mean of the others
        advantages = centred * groups.counts / (groups.counts - 1).clamp(min=1)
    if scale == "mean":
        means = rewards - centred
        # Not above what rounding leaves of rewards of both signs.
        nothing = means * groups.counts <= 1e-12 * groups.sum(rewards.abs())
        advantages = torch.where(nothing, 0.0, advantages / means)
    elif scale == "group":
        advantages = advantages / (groups.std(centred) + epsilon)
    elif scale != "none":
        advantages = advantages / (_std(rewards if scale == "batch" else advantages) + epsilon)
    return torch.where(groups.counts > 1, advantages, 0.0).float()


@torch.no_grad()
def process_advantages(
    step_rewards: Tensor,
    step_ends: Tensor,
    completion_length: int,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    scale: str = "group",
    epsilon: float = EPSILON,
) -> Tensor:
    """Group-relative advantages for process supervision: normalised rewards of later steps, summed.

        R_ij = (r_ij - mean(r_group)) / divisor    over the rewards of all steps of the group
        divisor = std(r_group) + epsilon           (scale "group")
                | 1                                (scale "none")
        A_it = sum of R_ij over the steps j with step_ends_ij >= t

    with the unbiased standard deviation (n - 1). Groups of equal rewards and groups with a single
    step have advantages of exactly 0, and so have tokens after the last step.

    Args:
        step_rewards: (B, S) float, integer or bool; ignored, NaN included, where step_ends < 0.
        step_ends: (B, S) integer, index of the last token of each step, in any order and possibly
            equal; negative = no step.
        completion_length: T, the width of the result.
        group_size, group_ids, epsilon: as in outcome_advantages.
        scale: "group" or "none".

    Returns:
        (B, T) float32, on the device of `step_rewards`.

    Raises:
        ValueError: as outcome_advantages; a negative completion_length; on the CPU, a step that
            ends at or after completion_length (on other devices it counts for all tokens).

    References:
        DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1.3.
    """
    check_dims("step_rewards", step_rewards, "(B, S)")
    device = step_rewards.device
    check_tensor("step_ends", step_ends, tuple(step_rewards.shape), device, integer=True)
    if not isinstance(completion_length, int) or completion_length < 0:
        raise ValueError(f"completion_length must be an integer >= 0, got {completion_length!r}")
    check_choice("scale", scale, ("group", "none"))
    _check_epsilon(epsilon)
    labels = group_labels("step_rewards", step_rewards, group_size, group_ids)
    ends = step_ends.long()
    if is_readable(ends.device) and (ends >= completion_length).any():
        raise ValueError(f"step_ends must be < {completion_length}, got {int(ends.max())}")

    # Missing steps form a group of their own, the last one, and end before the first token.
    num_sequences = ends.shape[0]
    labels = torch.where(ends >= 0, labels[:, None], num_sequences).flatten()
    groups = Groups(labels, num_sequences + 1)
    centred = groups.centre(step_rewards.double().flatten())
    if scale == "group":
        centred = centred / (groups.std(centred) + epsilon)
    # After sorting by end, the later steps of a token are a suffix. Avoids atomics of a scatter.
    ends, order = ends.sort(dim=1, stable=True)
    steps = centred.view_as(ends).gather(1, order)
    later = F.pad(suffix_scan(steps, torch.ones_like(steps)), (0, 1))  # (B, S + 1)
    tokens = torch.arange(completion_length, device=device).repeat(num_sequences, 1)
    return later.gather(1, torch.searchsorted(ends, tokens)).float()


@torch.no_grad()
def multi_reward_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    weights: Tensor | None = None,
    epsilon: float = EPSILON,
) -> Tensor:
    """Group-relative advantages of several rewards, each normalised on its own (GDPO).

        A_ik = (r_ik - mean(r_group,k)) / (std(r_group,k) + epsilon)
        S_i = sum_k w_k A_ik
        A_i = S_i / (std(S_all) + epsilon)

    with the unbiased standard deviation (n - 1). The mean of S over the batch, which the paper
    subtracts, is 0. A reward that is NaN was not given: it adds 0, and does not count in its group,
    as in TRL; a completion without any reward does not count in std(S_all) and has advantage 0.
    Completions that equal their group in all rewards, and groups of one, have exactly 0.

    Args:
        rewards: (B, K) float, integer or bool, K rewards per completion; NaN = not given.
        group_size, group_ids, epsilon: as in outcome_advantages.
        weights: (K,) float or integer; None = all 1.

    Returns:
        (B,) float32, on the device of `rewards`.

    Raises:
        ValueError: rewards not (B, K); weights not (K,); groups as in outcome_advantages.

    References:
        GDPO, https://arxiv.org/abs/2601.05242. TRL's multi_objective_aggregation
            "normalize_then_sum". verl and the authors' code normalise over the tokens of the batch:
            `whiten` of these advantages, one per token, does that.
    """
    check_dims("rewards", rewards, "(B, K)")
    _check_epsilon(epsilon)
    B, K = rewards.shape
    device = rewards.device
    if weights is None:
        weights = torch.ones(K, device=device)
    check_tensor("weights", weights, (K,), device)
    labels = group_labels("rewards", rewards, group_size, group_ids)
    rewards = rewards.double()
    missing = rewards.isnan()
    # A group per prompt and reward; the last one holds the missing rewards.
    labels = labels[:, None] * K + torch.arange(K, device=device)
    groups = Groups(labels.masked_fill(missing, B * K).flatten(), B * K + 1)
    centred = groups.centre(rewards.flatten())
    normalised = (centred / (groups.std(centred) + epsilon)).view(B, K)
    sums = (weights.double() * normalised.masked_fill(missing, 0.0)).sum(1)
    scored = K - missing.sum(1) > 0
    variance = sums.square().sum() / (scored.sum() - 1).clamp(min=1)
    return (sums / (variance.sqrt() + epsilon)).float()


@torch.no_grad()
def pass_at_k_advantages(
    rewards: Tensor,
    k: int,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
) -> Tensor:
    """Advantages for pass@k: those of all subsets of k completions, averaged, in closed form.

        fail = C(m, k) / C(n, k)                 share of the subsets in which nothing passes
        others = C(m - 1, k - 1) / C(n - 1, k - 1)
        sigma = sqrt(fail (1 - fail))
        A_i = fail / sigma                       (r_i = 1)
            | (fail - others) / sigma            (r_i = 0)

    for a group of n completions, of which m have the reward 0. A subset has the reward 1 if one of
    its completions has; a completion gets the mean advantage of the subsets that it is in. With
    k = 1 these are the advantages of GRPO, with the biased standard deviation and no epsilon.

    Groups in which every subset passes (m < k), or none does, have advantages of exactly 0, and so
    have groups of at most k completions. A NaN reward propagates to its group.

    Args:
        rewards: (B,) float, integer or bool, 0 or 1. Other rewards have no pass@k: they raise an
            error on the CPU, and count as NaN on other devices.
        k: completions per subset, at least 1.
        group_size, group_ids: as in outcome_advantages.

    Returns:
        (B,) float32, on the device of `rewards`.

    Raises:
        ValueError: rewards not (B,) or, on the CPU, not 0 or 1; k below 1 or above group_size;
            groups as in outcome_advantages.

    References:
        Pass@k Training, https://arxiv.org/abs/2508.10751, analytical derivation. The authors' code
            adds 1e-6 to sigma. verl's grpo_passk is another estimator (arXiv 2503.19595): it
            rewards the best completion of a group alone.
    """
    check_dims("rewards", rewards, "(B,)")
    labels = group_labels("rewards", rewards, group_size, group_ids)
    if not isinstance(k, int) or k < 1 or (group_size is not None and k > group_size):
        bound = ">= 1" if group_size is None else f"in [1, group_size = {group_size}]"
        raise ValueError(f"k must be an integer {bound}, got {k!r}")
    rewards = rewards.double()
    odd = ~((rewards == 0) | (rewards == 1) | rewards.isnan())
    if is_readable(rewards.device) and odd.any():
        raise ValueError(f"rewards must be 0 or 1 for pass@k, got {rewards[odd][0].item()}")
    rewards = rewards.masked_fill(odd, math.nan)
    groups = Groups(labels, rewards.shape[0])
    failed = groups.sum(1 - rewards)
    # C(m - 1, k - 1) / C(n - 1, k - 1), one factor (m - i) / (n - i) for each of i = 1 ... k - 1.
    drawn = torch.arange(1, k, device=rewards.device)
    left = (failed[:, None] - drawn).clamp(min=0)
    others = (left / (groups.counts[:, None] - drawn).clamp(min=1)).prod(1)
    fail = failed / groups.counts * others
    variance = fail * (1 - fail)
    advantages = (fail - (1 - rewards) * others) / variance.sqrt()
    return torch.where(variance <= 0, 0.0, advantages).float()


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
    check_dims("mask", mask, "(B, T)")
    check_tensor("truncated", truncated, tuple(mask.shape[:1]), mask.device)
    if truncated.dtype != torch.bool:
        raise ValueError(f"truncated must be bool, got {truncated.dtype}")
    return mask.masked_fill(truncated[:, None], 0)


def _check_epsilon(epsilon):
    if not (isinstance(epsilon, Real) and 0 < epsilon < math.inf):
        raise ValueError(f"epsilon must be a finite number > 0, got {epsilon!r}")


def _std(values):
    """Unbiased standard deviation of (B,) values, 0 of a single one."""
    return ((values - values.mean()).square().sum() / max(len(values) - 1, 1)).sqrt()


def suffix_scan(x, decay):
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
