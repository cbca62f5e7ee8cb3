"""TRL's loss metrics, computed from a few sums per rank that one collective call gathers."""

import math
from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch

from grpo_fused import Clip, Vespo
from grpo_fused.integrations.trl_versions import METRICS_OVER_RANKS
from grpo_fused.losses.objectives import clamped_exp
from grpo_fused.sequences import Padded


class RankSums:
    """Sums of every rank, on the host, and the means that TRL logs.

    Args:
        names: names of the n sums: those of `grpo_fused.losses.metrics.SUMS`, the keys of
            `clip_counts` or `vespo_weights`, and values of a rank, of which `average` is the mean.
        gathered: (ranks, n) as a list of lists.
        average_ranks: average the means of ranks, as TRL does before 1.9, instead of dividing the
            total of all ranks by their count. Extremes are then those of the ranks' means instead
            of those of sequences.
    """

    def __init__(self, names: Iterable[str], gathered: list[list[float]], average_ranks: bool):
        columns = torch.tensor(gathered, dtype=torch.float64).unbind(1)
        self.columns = dict(zip(names, columns, strict=True))
        self.average_ranks = average_ranks

    @classmethod
    def gather(cls, accelerator: Any, sums: dict[str, torch.Tensor]) -> "RankSums":
        """Exchange the sums () of every rank, with one collective call and one device sync."""
        values = torch.stack([value.float() for value in sums.values()])
        return cls(sums, accelerator.gather(values[None]).tolist(), not METRICS_OVER_RANKS)

    def mean(self, *names: str, count: str) -> float:
        """Divide a sum, or the sum of several sums, by the count of that name."""
        total = reduce(torch.add, [self.columns[name] for name in names])
        if self.average_ranks:
            return (total / self.columns[count].clamp(min=1)).mean().item()
        return (total.sum() / self.columns[count].sum().clamp(min=1)).item()

    def average(self, name: str) -> float:
        """Average a value over the ranks that have one."""
        return self.columns[name].nanmean().item()

    def log_clip_ratios(self, log: dict[str, list[float]]) -> None:
        """Append TRL's metrics "clip_ratio/*" to its lists."""
        means = {
            "low_mean": self.mean("clipped_low", count="ratios"),
            "high_mean": self.mean("clipped_high", count="ratios"),
            "region_mean": self.mean("clipped_low", "clipped_high", count="ratios"),
        }
        if self.average_ranks:
            ratios = self.columns["ratios"].clamp(min=1)
            lowest, highest = (self.columns[f"clipped_{side}"] / ratios for side in ("low", "high"))
        else:
            lowest, highest = (self.columns[name] for name in ("low_min", "high_max"))
        means |= {"low_min": _ignore_nan(min, lowest), "high_max": _ignore_nan(max, highest)}
        for name, value in means.items():
            log[f"clip_ratio/{name}"].append(value)


@torch.no_grad()
def clip_counts(
    objective: Clip,
    logps: torch.Tensor,
    old_logps: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    level: str,
) -> dict[str, torch.Tensor]:
    """Count the ratios that are clipped, as TRL does: after the cap at delta.

    Args:
        objective: supplies the bounds.
        logps: (B, T) float32.
        old_logps: (B, T) float32; None on policy.
        advantages: (B,) or (B, T).
        mask: (B, T), nonzero = active.
        level: of the ratios, "token", "sequence" or "sequence_sum".

    Returns:
        () tensors: "clipped_low" and "clipped_high", and of the shares of the sequences "low_min",
        the smallest below, and "high_max", the largest above; NaN if no sequence has an active
        token.
    """
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    active, lengths = mask != 0, mask.sum(-1)
    log_ratio = _log_ratio(logps, old_logps, active)
    if level != "token":
        log_ratio = log_ratio.sum(-1, keepdim=True)
    if level == "sequence":
        log_ratio = log_ratio / lengths[:, None].clamp(min=1)
    ratio = clamped_exp(log_ratio)[0]
    ratio = ratio if objective.delta is None else ratio.clamp(max=objective.delta)
    low = (ratio < 1 - objective.epsilon_low) & (advantages < 0)
    high = (ratio > 1 + objective.epsilon_high) & (advantages > 0)

    def shares(hits):  # (B, 1) or (B, T) -> (B,)
        return hits[:, 0].float() if hits.shape[1] == 1 else (hits & active).sum(-1) / lengths

    def count(hits):
        return hits.sum() if hits.shape[1] == 1 else (hits & active).sum()

    low_min = torch.where(shares(low).isnan(), math.inf, shares(low)).amin()
    high_max = torch.where(shares(high).isnan(), -math.inf, shares(high)).amax()
    extremes = {"low_min": low_min, "high_max": high_max}
    extremes = {name: torch.where(x.isinf(), math.nan, x) for name, x in extremes.items()}
    return {"clipped_low": count(low), "clipped_high": count(high)} | extremes


@torch.no_grad()
def vespo_weights(
    objective: Vespo,
    logps: torch.Tensor,
    old_logps: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    ratio: torch.Tensor | None,
    *,
    include_masked: bool,
) -> dict[str, torch.Tensor]:
    """Sum VESPO's weights phi: one per sequence, or one per token for advantages per token.

    Args:
        objective: supplies the parameters of phi.
        logps: (B, T) float32.
        old_logps: (B, T) float32; None on policy.
        advantages: (B,) or (B, T); only their signs matter.
        mask: (B, T), nonzero = active.
        ratio: rollout correction (B, T) or (B, 1), or None.
        include_masked: include masked tokens in the sum over tokens, as TRL does before 1.9.

    Returns:
        {"phi": sum of the weights, "phis": their number}, () tensors.
    """
    sequences = Padded(mask.shape, mask)
    signs = torch.where(advantages >= 0, 1.0, -1.0)
    signs = sequences.spread(signs).expand_as(logps)
    if ratio is not None and ratio.shape != logps.shape:
        ratio = ratio[:, 0]
    log_ratio = _log_ratio(logps, old_logps, sequences.active)
    # The loss is -phi A logp, so its absolute value is phi where logp = 1 and A = +-1.
    ones = torch.ones_like(logps)
    phi = objective.evaluate(ones, log_ratio, signs, ratio, sequences)[0].abs()
    phi = phi[:, :1] if advantages.dim() == 1 else phi
    if include_masked or advantages.dim() == 1:
        return {"phi": phi.sum(), "phis": phi.new_full((), phi.numel())}
    return {"phi": sequences.select(phi).sum(), "phis": sequences.total}


def _log_ratio(logps, old_logps, active):
    if old_logps is None:
        return torch.zeros_like(logps)
    return torch.where(active, logps - old_logps, 0.0)


def _ignore_nan(reduction, values):
    """Apply `min` or `max` to the values of ranks that are not NaN; NaN if all are."""
    return reduction((x for x in values.tolist() if not math.isnan(x)), default=math.nan)
