"""Advantages: rewards of sampled completions, made comparable within the group of one prompt.

Nothing here has a gradient or waits for a device (values are checked on CPU tensors only). The
arithmetic is float64; results round once, to float32.
"""

import torch
import torch.nn.functional as F

from grpo_fused.checks import check_choice, check_tensor

# Keeps a group of almost equal rewards from being blown up; the value is TRL's.
EPSILON = 1e-4
SCALES = ("group", "batch", "none")


@torch.no_grad()
def outcome_advantages(
    rewards, group_size=None, *, group_ids=None, scale="group", leave_one_out=False
):
    """Advantages of outcome supervision: one reward per completion, compared within its group.

        A_i = (r_i - b_i) / divisor
        b_i = mean(r_group)                       (the mean of the group)
            | mean(r_group without r_i)           (leave_one_out, RLOO)
        divisor = std(r_group) + 1e-4             (scale "group")
                | std(r_all) + 1e-4               (scale "batch")
                | 1                               (scale "none": Dr. GRPO; RLOO with leave_one_out)

    The standard deviation is the unbiased one (n - 1). Equal rewards in a group give exactly 0
    at every scale, and so does a group of one, which has nothing to be compared with. A NaN reward
    makes its group NaN (at scale "batch" all groups): give a completion that nobody judged a
    group of its own.

    Args:
        rewards: (B,) float, integer or bool.
        group_size: completions per prompt, at least 1; B is a multiple of it. The completions of
            one prompt are neighbours: rewards[0:group_size] is the first group.
        group_ids: (B,) integer, instead of group_size: completions with the same id are a group,
            wherever they stand and however many they are.
        scale: "group", "batch" or "none": what the centred rewards are divided by.
        leave_one_out: the baseline of a completion leaves its own reward out.

    Returns:
        (B,) float32, on the device of `rewards`.

    Raises:
        ValueError: rewards not (B,), not exactly one of group_size and group_ids, group_size
            below 1 or no divisor of B, group_ids not (B,) integers, unknown scale.

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
        centred = centred * counts / (counts - 1).clamp(min=1)  # r - mean of the others
    if scale == "group":
        centred = centred / (std + EPSILON)
    elif scale == "batch":
        variance = (rewards - rewards.mean()).square().sum() / max(num_rewards - 1, 1)
        centred = centred / (variance.sqrt() + EPSILON)
    return torch.where(counts > 1, centred, 0.0).float()


@torch.no_grad()
def process_advantages(
    step_rewards, step_ends, completion_length, group_size=None, *, group_ids=None, scale="group"
):
    """Advantages of process supervision: rewards of reasoning steps, summed over those to come.

        R_ij = (r_ij - mean(r_group)) / divisor    over the rewards of all steps of the group
        divisor = std(r_group) + 1e-4              (scale "group")
                | 1                                (scale "none")
        A_it = sum of R_ij over the steps j with step_ends_ij >= t

    with the unbiased std (n - 1). Equal rewards in a group give exactly 0, and so does a group with
    a single step. Tokens after the last step get 0.

    Args:
        step_rewards: (B, S) float, integer or bool; NaN and all else is ignored where no step is.
        step_ends: (B, S) integer: index of the last token of each step, in any order, several
            steps may end at one token. Negative = no step.
        completion_length: T, the width of the result.
        group_size, group_ids: as in outcome_advantages.
        scale: "group" or "none".

    Returns:
        (B, T) float32, on the device of `step_rewards`.

    Raises:
        ValueError: as outcome_advantages; a negative completion_length; on the CPU, a step that
            ends at or after completion_length (on a device it counts for all tokens).

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
    may_look = ends.device.type == "cpu" and not torch.compiler.is_compiling()
    if may_look and (ends >= completion_length).any():
        raise ValueError(f"step_ends must be < {completion_length}, got {int(ends.max())}")

    # What is no step is a group of its own, the last, and ends before the first token.
    num_sequences = ends.shape[0]
    labels = torch.where(ends >= 0, labels[:, None], num_sequences).flatten()
    centred, std, _ = _compare(step_rewards.double().flatten(), labels, num_sequences + 1)
    if scale == "group":
        centred = centred / (std + EPSILON)
    # Sorted by end, the steps that a token waits for are a suffix. No scatter, hence no atomics.
    ends, order = ends.sort(dim=1, stable=True)
    steps = centred.view_as(ends).gather(1, order)
    to_come = F.pad(_suffix_scan(steps, torch.ones_like(steps)), (0, 1))  # (B, S + 1)
    tokens = torch.arange(completion_length, device=device).repeat(num_sequences, 1)
    return to_come.gather(1, torch.searchsorted(ends, tokens)).float()


@torch.no_grad()
def gae_advantages(rewards, values, mask=None, *, gamma=1.0, lam=0.95):
    """Generalised advantage estimation, for PPO with a value model (loss_type "ppo").

        delta_t = r_t + gamma V_t+1 - V_t
        A_t = delta_t + gamma lam A_t+1 = sum_k (gamma lam)^k delta_t+k
        returns_t = A_t + V_t

    where t + 1 is the next active token (masked ones are skipped, also in the middle: a tool's
    output), and V and A after the last active token are 0. log2(T) steps, stable for any T.

    Args:
        rewards: (B, T) float, integer or bool; NaN and all else is ignored under the mask.
        values: (B, T) float: the value model's, before each token; ignored under the mask too.
        mask: (B, T) bool, integer or float, nonzero = active; None = all active.
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1]: 0 is one step of bootstrap, 1 the discounted return minus V.

    Returns:
        (advantages, returns): (B, T) float32, exactly 0 where the mask is 0; not whitened.

    Raises:
        ValueError: shapes or devices that do not agree; gamma or lam outside [0, 1].

    References:
        High-Dimensional Continuous Control Using GAE, https://arxiv.org/abs/1506.02438, eq. 16.
    """
    _check_dims("rewards", rewards, "(B, T)")
    check_tensor("values", values, tuple(rewards.shape), rewards.device)
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")

    active = _active(mask, rewards)
    values = torch.where(active, values.double(), 0.0)
    # First active token at or after each, T where none is left; the T-th counts as active.
    tokens = torch.arange(active.shape[1] + 1, device=active.device)
    tokens = torch.where(F.pad(active, (0, 1), value=True), tokens, active.shape[1])
    following = tokens.flip(1).cummin(1).values.flip(1)[:, 1:]
    delta = rewards.double() + gamma * F.pad(values, (0, 1)).gather(1, following) - values
    # A masked token hands on what comes after it: nothing of its own, factor 1.
    decay = torch.full_like(delta, gamma * lam).masked_fill(~active, 1.0)
    advantages = _suffix_scan(torch.where(active, delta, 0.0), decay)
    advantages = torch.where(active, advantages, 0.0)
    return advantages.float(), (advantages + values).float()


@torch.no_grad()
def whiten(advantages, mask=None):
    """Advantages of mean 0 and variance 1 over the active tokens, as PPO trains on.

        (A - mean(A)) / sqrt(var(A) + 1e-8)        mean and unbiased variance over active tokens

    advantages: float, any shape; under the mask anything, NaN included. mask: the same shape,
    nonzero = active; None = all active. Returns float32, exactly 0 where the mask is 0. Call it
    before micro-batches are cut; TRL's and verl's PPO call it masked_whiten.
    """
    check_tensor("advantages", advantages)
    active = _active(mask, advantages)
    count = active.sum()
    values = torch.where(active, advantages.double(), 0.0)
    centred = torch.where(active, values - values.sum() / count.clamp(min=1), 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return (centred / (variance + 1e-8).sqrt()).float()


@torch.no_grad()
def mask_truncated(mask, truncated):
    """The mask without the completions that were cut off at the length limit (DAPO, section 3.4).

    Rules that divide by the number of sequences still count their rows (B is the number of rows of
    the mask); num_items_in_batch must count what is left: sum the result, not the argument.

    Args:
        mask: (B, T) bool, integer or float, nonzero = active.
        truncated: (B,) bool, True = cut off before its end token.

    Returns:
        (B, T), a new tensor of the dtype of `mask`.

    References:
        DAPO, https://arxiv.org/abs/2503.14476, section 3.4 (overlong filtering).
    """
    _check_dims("mask", mask, "(B, T)")
    check_tensor("truncated", truncated, tuple(mask.shape[:1]), mask.device)
    if truncated.dtype != torch.bool:
        raise ValueError(f"truncated must be bool, got {truncated.dtype}")
    return mask.masked_fill(truncated[:, None], 0)


def _group_labels(name, rewards, group_size, group_ids):
    """(B,) int64 in [0, B), equal for the completions of one group."""
    if (group_size is None) == (group_ids is None):
        got = "neither" if group_size is None else "both"
        raise ValueError(f"exactly one of group_size and group_ids is wanted, got {got}")
    num_sequences = rewards.shape[0]
    if group_ids is None:
        if not isinstance(group_size, int) or group_size < 1:
            raise ValueError(f"group_size must be an integer >= 1, got {group_size!r}")
        if num_sequences % group_size != 0:
            raise ValueError(f"group_size {group_size} does not divide the {num_sequences} {name}")
        return torch.arange(num_sequences, device=rewards.device) // group_size
    check_tensor("group_ids", group_ids, (num_sequences,), rewards.device, integer=True)
    ids = group_ids.long()
    return torch.searchsorted(ids.sort().values, ids)  # the place of the first of its kind


def _compare(values, labels, num_labels):
    """Values minus the mean of their group, its unbiased std and its size, all (N,).

    Sorted by label, groups are segments: O(N log N) where a comparison of all with all needs N^2,
    one thread per segment and no atomics, and (unlike torch.unique) no size to wait for.
    """
    order = labels.argsort(stable=True)
    offsets = torch.arange(num_labels + 1, device=labels.device)
    offsets = torch.searchsorted(labels[order], offsets)  # where each label begins

    def total(x):
        return torch.segment_reduce(x[order], "sum", offsets=offsets, unsafe=True)[labels]

    counts = offsets.diff()[labels]
    # Subtracting a member first makes equal rewards exactly 0: a rounded mean alone leaves 1e-17.
    centred = values - values[order][offsets[labels]]
    centred = centred - total(centred) / counts
    variance = total(centred.square()) / (counts - 1).clamp(min=1)
    return centred, variance.sqrt(), counts


def _suffix_scan(x, decay):
    """y_t = x_t + decay_t y_t+1 along dim 1, both (B, T): products of decays, never quotients.

    For decay 1 it is a cumsum, which torch does not promise to repeat bit for bit on CUDA.
    """
    step = 1
    while step < x.shape[1]:
        x = torch.cat((x[:, :-step] + decay[:, :-step] * x[:, step:], x[:, -step:]), 1)
        decay = torch.cat((decay[:, :-step] * decay[:, step:], decay[:, -step:]), 1)
        step *= 2
    return x


def _active(mask, tensor):
    if mask is None:
        return torch.ones_like(tensor, dtype=torch.bool)
    check_tensor("mask", mask, tuple(tensor.shape), tensor.device)
    return mask != 0


def _check_dims(name, tensor, layout):
    """A tensor of as many dimensions as its layout, "(B,)" or "(B, T)", has letters."""
    check_tensor(name, tensor)
    if tensor.dim() != sum(map(str.isalpha, layout)):
        raise ValueError(f"{name} must have shape {layout}, got {tuple(tensor.shape)}")
