"""The figures of a rollout and of a step: over all ranks, in one exchange and one wait each."""

import torch
from accelerate.utils import gather_object

from grpo_fused import metrics
from grpo_fused.trainer.policy import whole


def rollout_figures(accelerator, rollout, scores, group_size):
    """(figures, rewards): dict of floats, and (B,) float32 on the CPU, both of all ranks.

    Args:
        rollout: Rollout of this rank.
        scores: of its completions.
        group_size: completions per prompt.
    """
    names = list(scores.each or {})
    lengths = torch.tensor([float(len(ids)) for ids in rollout.completion_ids])
    prompts = torch.tensor([float(len(ids)) for ids in rollout.prompt_ids])
    truncated = torch.tensor(rollout.truncated, dtype=torch.float32)
    columns = [scores.total, lengths, prompts, truncated, *(scores.each[name] for name in names)]
    columns = torch.stack([column.detach().float().cpu() for column in columns], dim=1)
    columns = accelerator.gather(columns.to(accelerator.device)).cpu()
    rewards, lengths, prompts, truncated, *each = columns.unbind(1)

    groups = rewards.view(-1, group_size)
    stds = groups.std(1) if group_size > 1 else groups.new_zeros(len(groups))
    unjudged = groups.isnan()
    lowest = groups.masked_fill(unjudged, float("inf")).amin(1)
    highest = groups.masked_fill(unjudged, -float("inf")).amax(1)
    figures = {
        "reward": rewards.nanmean(),
        "reward_std": stds.nanmean(),
        # Groups whose rewards are all the same, or none, teach nothing.
        "frac_reward_zero_std": (highest <= lowest).float().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": truncated.mean(),
        "prompts/mean_length": prompts.mean(),
    }
    for name, values in zip(names, each, strict=True):
        figures[f"rewards/{name}"] = values.nanmean()
    logged = {}
    for of_rank in gather_object([scores.metrics]):
        for name, values in of_rank.items():
            logged[name] = [*logged.get(name, ()), *values]
    figures |= {name: sum(values) / len(values) for name, values in logged.items()}
    return {name: float(value) for name, value in figures.items()}, rewards


def step_figures(accelerator, sums, highest, grad_norm, signal, has_ref):
    """(figures, signal) of an optimizer step: dict of floats; the signal of any rank, or None.

    Args:
        sums: (8,) of `LossOutput`, added up over micro-batches.
        highest: () largest ratio.
        grad_norm: number or () tensor, a DTensor too.
        signal: number of a signal that this rank received, or 0.
    """
    grad_norm = whole(torch.as_tensor(grad_norm)).to(highest)
    own = torch.stack([highest, highest.new_tensor(signal), grad_norm])
    every_rank = accelerator.gather(torch.cat([sums, own])[None]).cpu()
    sums = every_rank[:, : len(metrics.SUMS)].sum(0)
    highest, signals, grad_norms = every_rank[:, len(metrics.SUMS) :].unbind(1)
    figures = {"loss": float(sums[0]), "grad_norm": float(grad_norms[0])}
    figures |= {name: float(value) for name, value in metrics.means(sums).items()}
    figures |= {"ratio/max": float(highest.max()), "num_tokens": float(sums[1])}
    if not has_ref:
        del figures["kl"]
    return figures, int(signals.max()) or None


def table(rollout, scores, sampler, num_rows):
    """The first completions of a rollout, as dicts of prompt, completion and rewards."""
    texts = sampler.texts(rollout.completion_ids[:num_rows])
    rows = []
    for i, text in enumerate(texts):
        each = {name: float(values[i]) for name, values in (scores.each or {}).items()}
        row = {"prompt": rollout.prompts[i], "completion": text, "reward": float(scores.total[i])}
        rows.append(row | each | {name: values[i] for name, values in scores.extra.items()})
    return rows


def summary(figures):
    """The figures that matter, for a progress bar."""
    shown = {"reward": "reward {:.2f}", "loss": "loss {:+.3f}", "kl": "KL {:.3f}"}
    shown |= {"entropy": "entropy {:.2f}", "clip_ratio/region_mean": "clipped {:.1%}"}
    shown |= {"completions/mean_length": "length {:.0f}"}
    return ", ".join(text.format(figures[name]) for name, text in shown.items() if name in figures)
