"""Metrics of a rollout and of an optimizer step, combined over all ranks."""

from collections.abc import Iterable, Sequence

import torch

from grpo_fused.losses import metrics
from grpo_fused.ppo import VALUE_SUMS, value_metrics
from grpo_fused.trainer.ranks import Ranks
from grpo_fused.trainer.reference import full_tensor
from grpo_fused.trainer.rewards import RewardScores
from grpo_fused.trainer.rollouts.rollout import Rollout


def find_equal_groups(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Returns which groups have equal rewards, or none at all, (B / group_size,) bool.

    Args:
        rewards: (B,) float32, NaN = none; groups are neighbours.
        group_size: completions per prompt.
    """
    groups = rewards.view(-1, group_size)
    lowest = groups.masked_fill(groups.isnan(), float("inf")).amin(1)
    highest = groups.masked_fill(groups.isnan(), -float("inf")).amax(1)
    return highest <= lowest


def rollout_metrics(
    ranks: Ranks, rounds: Sequence[tuple[Rollout, RewardScores]], group_size: int
) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """Combines rewards and lengths of all ranks, in one exchange of tensors.

    Args:
        ranks: of the run.
        rounds: completions of this rank and their rewards; of dynamic sampling several.
        group_size: completions per prompt.

    Returns:
        (metrics, rewards, each): dict of floats, over all completions; total rewards (B,) and those
        of the K functions (B, K) of all ranks, round after round, float32 on the CPU.
    """
    names = list(rounds[0][1].each)
    table = torch.stack([_columns(*one, names) for one in rounds], dim=1)  # (B, rounds, 4 + K)
    table = ranks.gather(table.to(ranks.accelerator.device)).cpu()
    table = table.transpose(0, 1).flatten(0, 1)
    rewards, lengths, prompts, truncated, *_ = table.unbind(1)
    each = table[:, 4:]

    groups = rewards.view(-1, group_size)
    given = (~groups.isnan()).sum(1)
    squares = (groups - groups.nanmean(1, keepdim=True)).square().nansum(1)
    stds = (squares / (given - 1).clamp(min=1)).sqrt()
    combined = {
        "reward": rewards.nanmean(),
        "reward_std": stds[given > 0].sum() / (given > 0).sum().clamp(min=1),
        # Groups with equal rewards, or without any, contribute no gradient.
        "frac_reward_zero_std": find_equal_groups(rewards, group_size).float().mean(),
        "frac_reward_none": (given == 0).float().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": truncated.mean(),
        "prompts/mean_length": prompts.mean(),
    }
    for name, values in zip(names, each.unbind(1), strict=True):
        combined[f"rewards/{name}"] = values.nanmean()
    combined |= mean_metrics(ranks.gather_objects([scores.metrics for _, scores in rounds]))
    return {name: float(value) for name, value in combined.items()}, rewards, each


def mean_metrics(logged: Iterable[Iterable[dict[str, list[float]]]]) -> dict[str, float]:
    """Returns the means of numbers by name, over dicts of every rank."""
    joined: dict[str, list[float]] = {}
    for of_rank in logged:
        for of_round in of_rank:
            for name, values in of_round.items():
                joined.setdefault(name, []).extend(values)
    return {name: sum(values) / len(values) for name, values in joined.items()}


def _columns(rollout, scores, names):
    lengths = torch.tensor([float(len(ids)) for ids in rollout.completion_ids])
    prompts = torch.tensor([float(len(ids)) for ids in rollout.prompt_ids])
    truncated = torch.tensor(rollout.truncated, dtype=torch.float32)
    columns = [scores.total, lengths, prompts, truncated, *(scores.each[name] for name in names)]
    return torch.stack([column.detach().float().cpu() for column in columns], dim=1)


def step_metrics(
    ranks: Ranks,
    sums: torch.Tensor,
    max_ratio: torch.Tensor,
    grad_norm: torch.Tensor | float,
    signal: int,
    *,
    has_kl: bool,
    value_sums: torch.Tensor | float = 0.0,
    critic_norm: torch.Tensor | float = 0.0,
) -> tuple[dict[str, float], int | None]:
    """Combines the metrics of an optimizer step over all ranks, in one exchange and one wait.

    Args:
        ranks: of the run.
        sums: (8,) `LossOutput.sums`, added up over micro-batches.
        max_ratio: () largest importance ratio.
        grad_norm: gradient norm; a DTensor for sharded models.
        signal: number of the signal that this rank received, or 0.
        has_kl: whether the loss has a KL to report.
        value_sums: (8,) `ValueLossOutput.sums`, added up over micro-batches; 0 without a critic.
        critic_norm: gradient norm of a critic of its own.

    Returns:
        (metrics, signal): dict of floats; the signal of any rank, or None.
    """
    has_values = isinstance(value_sums, torch.Tensor)
    values = value_sums if has_values else sums.new_zeros(len(VALUE_SUMS))
    norms = [full_tensor(torch.as_tensor(norm)).to(max_ratio) for norm in (grad_norm, critic_norm)]
    own = torch.stack([max_ratio, max_ratio.new_tensor(signal), *norms])
    every_rank = ranks.accelerator.gather(torch.cat([sums, values, own])[None]).cpu()
    parts = every_rank.split([len(metrics.SUMS), len(VALUE_SUMS), len(own)], dim=1)
    sums, values = (part[:: ranks.tensor_size].sum(0) for part in parts[:2])
    max_ratios, signals, grad_norms, critic_norms = parts[2].unbind(1)
    combined = {"loss": float(sums[0]), "grad_norm": float(grad_norms[0])}
    combined |= {name: float(value) for name, value in metrics.means(sums).items()}
    combined |= {"ratio/max": float(max_ratios.max()), "num_tokens": float(sums[1])}
    if has_values:
        combined |= {"value/loss": float(values[0]), "value/grad_norm": float(critic_norms[0])}
        combined |= {name: float(value) for name, value in value_metrics(values).items()}
    if not has_kl:
        del combined["kl"]
    return combined, int(signals.max()) or None


def completions_table(
    rollout: Rollout, texts: list[str], scores: RewardScores
) -> list[dict[str, object]]:
    """Makes a table row, with prompt, completion and rewards, for each of the first `texts`."""
    rows = []
    for i, text in enumerate(texts):
        row = {"prompt": rollout.prompts[i], "completion": text, "reward": float(scores.total[i])}
        row |= {name: float(values[i]) for name, values in scores.each.items()}
        rows.append(row | {name: values[i] for name, values in scores.extra.items()})
    return rows


def progress_summary(values: dict[str, float]) -> str:
    """Formats metrics for a progress bar, the most important first: terminals cut the others."""
    shown = {"reward": "reward {:.2f}", "completions/mean_length": "length {:.0f}"}
    shown |= {"completions/clipped_ratio": "truncated {:.0%}", "entropy": "entropy {:.2f}"}
    shown |= {"kl": "KL {:.3f}", "clip_ratio/region_mean": "ratios clipped {:.1%}"}
    shown |= {"loss": "loss {:+.3f}"}
    return ", ".join(text.format(values[name]) for name, text in shown.items() if name in values)
