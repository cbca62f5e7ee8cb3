"""Advantages: rewards of sampled completions, made comparable within the group of one prompt."""

import torch

# Keeps a group of almost equal rewards from being blown up; the value is TRL's.
EPSILON = 1e-4
SCALES = ("group", "batch", "none")


def outcome_advantages(
    rewards: torch.Tensor, group_size: int, *, scale: str = "group"
) -> torch.Tensor:
    """Advantages of outcome supervision: one reward per completion, compared within its group.

        A_i = (r_i - mean(r_group)) / divisor
        divisor = std(r_group) + 1e-4   (scale "group")
                | std(r_all) + 1e-4     (scale "batch")
                | 1                     (scale "none", Dr. GRPO)

    The standard deviation is the unbiased one (n - 1). Equal rewards in a group give exactly 0
    at every scale, and so does a group of one, which has nothing to be compared with.

    Args:
        rewards: (B,) float, integer or bool. The completions of one prompt are neighbours:
            rewards[0:group_size] is the first group.
        group_size: completions per prompt, at least 1; B is a multiple of it.
        scale: "group", "batch" or "none": what the centred rewards are divided by.

    Returns:
        (B,) float32, on the device of `rewards`.

    Raises:
        ValueError: rewards not one-dimensional; group_size below 1 or no divisor of B; unknown
            scale.

    References:
        DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1.2 ("group").
        Understanding R1-Zero-Like Training (Dr. GRPO), https://arxiv.org/abs/2503.20783 ("none").
        Lite PPO, https://arxiv.org/abs/2508.08221 ("batch": mean of the group, std of the batch).
    """
    if rewards.ndim != 1:
        raise ValueError(f"rewards must have shape (B,), got {tuple(rewards.shape)}")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    num_rewards = rewards.shape[0]
    if num_rewards % group_size != 0:
        raise ValueError(f"group_size {group_size} does not divide the {num_rewards} rewards")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if group_size == 1 or num_rewards == 0:
        return torch.zeros_like(rewards, dtype=torch.float32)

    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    groups = rewards.reshape(num_rewards // group_size, group_size)  # (B / group_size, group_size)
    # Subtracting a member first makes equal rewards exactly 0: a rounded mean alone leaves 1e-8.
    centred = groups - groups[:, :1]
    centred = centred - centred.mean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (centred.std(dim=1, keepdim=True) + EPSILON)
    elif scale == "batch":
        centred = centred / (rewards.std() + EPSILON)
    return centred.flatten().float()
