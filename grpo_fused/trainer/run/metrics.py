"""Metrics of a rollout and of an optimizer step, combined over all ranks."""

import torch

from grpo_fused.losses import metrics
from grpo_fused.trainer.ranks import Ranks
from grpo_fused.trainer.reference import full_tensor
from grpo_fused.trainer.rewards import RewardScores
from grpo_fused.trainer.rollouts.rollout import Rollout


def rollout_metrics(
    ranks: Ranks, rollout: Rollout, scores: RewardScores, group_size: int
) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """Combines rewards and lengths of all ranks, in one exchange of tensors.

    Args:
        ranks: of the run.
        rollout: completions of this rank.
        scores: their rewards.
        group_size: completions per prompt.

    Returns:
        (metrics, rewards, each): dict of floats; total rewards (B,) and those of the K functions
        (B, K) of all ranks, float32 on the CPU.
    """
    names = list(scores.each)
    lengths = torch.tensor([float(len(ids)) for ids in rollout.completion_ids])
    prompts = torch.tensor([float(len(ids)) for ids in rollout.prompt_ids])
    truncated = torch.tensor(rollout.truncated, dtype=torch.float32)
    columns = [scores.total, lengths, prompts, truncated, *(scores.each[name] for name in names)]
    columns = torch.stack([column.detach().float().cpu() for column in columns], dim=1)
    columns = ranks.gather(columns.to(ranks.accelerator.device)).cpu()
    rewards, lengths, prompts, truncated, *_ = columns.unbind(1)
    each = columns[:, 4:]

    groups = rewards.view(-1, group_size)
    missing = groups.isnan()
    given = (~missing).sum(1)
    squares = (groups - groups.nanmean(1, keepdim=True)).square().nansum(1)
    stds = (squares / (given - 1).clamp(min=1)).sqrt()
    lowest = groups.masked_fill(missing, float("inf")).amin(1)
    highest = groups.masked_fill(missing, -float("inf")).amax(1)
    combined = {
        "reward": rewards.nanmean(),
        "reward_std": stds[given > 0].sum() / (given > 0).sum().clamp(min=1),
        # Groups with equal rewards, or without any, contribute no gradient.
        "frac_reward_zero_std": (highest <= lowest).float().mean(),
        "frac_reward_none": (given == 0).float().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": truncated.mean(),
        "prompts/mean_length": prompts.mean(),
    }
    for name, values in zip(names, each.unbind(1), strict=True):
        combined[f"rewards/{name}"] = values.nanmean()
    logged = {}
    for of_rank in ranks.gather_objects(scores.metrics):
        for name, values in of_rank.items():
            logged[name] = [*logged.get(name, ()), *values]
    combined |= {name: sum(values) / len(values) for name, values in logged.items()}
    return {name: float(value) for name, value in combined.items()}, rewards, each


def step_metrics(
    ranks: Ranks,
    sums: torch.Tensor,
    max_ratio: torch.Tensor,
    grad_norm: torch.Tensor | float,
    signal: int,
    has_reference: bool,
) -> tuple[dict[str, float], int | None]:
    """Combines the metrics of an optimizer step over all ranks, in one exchange and one wait.

    Args:
        ranks: of the run.
        sums: (8,) `LossOutput.sums`, added up over micro-batches.
        max_ratio: () largest importance ratio.
        grad_norm: gradient norm; a DTensor for sharded models.
        signal: number of the signal that this rank received, or 0.
        has_reference: whether there is a KL to report.

    Returns:
        (metrics, signal): dict of floats; the signal of any rank, or None.
    """
    grad_norm = full_tensor(torch.as_tensor(grad_norm)).to(max_ratio)
    own = torch.stack([max_ratio, max_ratio.new_tensor(signal), grad_norm])
    every_rank = ranks.accelerator.gather(torch.cat([sums, own])[None]).cpu()
    sums = every_rank[:: ranks.tensor_size, : len(metrics.SUMS)].sum(0)
    max_ratios, signals, grad_norms = every_rank[:, len(metrics.SUMS) :].unbind(1)
    combined = {"loss": float(sums[0]), "grad_norm": float(grad_norms[0])}
    combined |= {name: float(value) for name, value in metrics.means(sums).items()}
    combined |= {"ratio/max": float(max_ratios.max()), "num_tokens": float(sums[1])}
    if not has_reference:
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
