"""Soft overlong punishment: completions lose reward as they come near to the length limit."""

from dataclasses import replace

import torch

from grpo_fused.trainer.rewards.results import NO_SCORE, weighted_steps
from grpo_fused.trainer.rewards.weighted import RewardScores

NAME = "overlong_punishment"  # among the rewards of a RewardScores


def soft_overlong_punishment(lengths: torch.Tensor, limit: int, cache: int) -> torch.Tensor:
    """Returns 0 up to `limit - cache` tokens, and a line from there down to -1 at `limit` tokens.

        max(-1, min(0, (limit - cache - length) / cache))

    Args:
        lengths: (B,) numbers of tokens.
        limit: max_completion_length.
        cache: tokens before it in which the line falls, at least 1.

    Returns:
        (B,) float32.

    References:
        DAPO, https://arxiv.org/abs/2503.14476, eq. 13.
    """
    return ((limit - cache - lengths.float()) / cache).clamp(-1, 0)


def punish_overlong(
    scores: RewardScores, completion_ids: list[list[int]], limit: int, cache: int | None
) -> RewardScores:
    """Adds the punishment to the rewards as one more function of weight 1.

    As of any function, it becomes a step that ends with the completion where others score steps.
    Unlike theirs, it is no score of its own: a completion without any stays without. All tokens of
    a completion count, those of tools too.

    Args:
        scores: of B completions.
        completion_ids: B lists of tokens.
        limit: max_completion_length.
        cache: soft_punish_cache, or None: the scores are returned as they are.

    Raises:
        ValueError: a reward function has the name of the punishment.
    """
    if cache is None:
        return scores
    if NAME in scores.each:
        raise ValueError(
            f"rewards must not have the name {NAME} with soft_punish_cache, which adds a reward of "
            "that name; rename the function or set soft_punish_cache to none"
        )
    lengths = torch.tensor([len(ids) for ids in completion_ids])
    total = scores.total.float().cpu()
    punishment = soft_overlong_punishment(lengths, limit, cache)
    punishment = punishment.masked_fill(total.isnan(), NO_SCORE)
    steps = scores.steps
    if steps is not None:
        rows = zip(steps, punishment.tolist(), completion_ids, strict=True)
        steps = [row + weighted_steps([value], [1.0], len(ids)) for row, value, ids in rows]
    return replace(
        scores,
        total=total + punishment,
        each=scores.each | {NAME: punishment},
        steps=steps,
        weights=[*scores.weights, 1.0] if scores.weights else scores.weights,
    )
