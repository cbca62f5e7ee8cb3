"""TRL's metrics of a loss, from a few sums per rank: one gather instead of one or two a metric."""

import math

import torch

from grpo_fused.metrics import SUMS

EXTREMES = ("low_min", "high_max")


class Ranks:
    """Sums of every rank, on the host, as means.

    Args:
        gathered: (ranks, n): `LossOutput.sums`, the loss, and the EXTREMES if there are any.
        means_of_ranks: average the ranks' means, as TRL did before 1.12, not all of their tokens;
            its extremes then are those of the ranks' means, not of the sequences'.
    """

    def __init__(self, gathered, means_of_ranks):
        columns = torch.tensor(gathered, dtype=torch.float64).unbind(1)
        names = (*SUMS, "with_bonus", *EXTREMES)
        self.columns = dict(zip(names, columns, strict=False))
        self.means_of_ranks = means_of_ranks

    def mean(self, *names, count):
        """Mean of a sum, or of several together, over what `count` counts."""
        total = sum(self.columns[name] for name in names)
        if self.means_of_ranks:
            return (total / self.columns[count].clamp(min=1)).mean().item()
        return (total.sum() / self.columns[count].sum().clamp(min=1)).item()

    def policy_loss(self, entropy_coef, scale):
        """Mean over ranks of the loss without its entropy bonus, times `scale`."""
        entropy = self.columns["entropy"] / self.columns["tokens"].clamp(min=1)
        return ((self.columns["with_bonus"] + entropy_coef * entropy) * scale).nanmean().item()

    def clip_ratios(self):
        """{name behind "clip_ratio/": value}."""
        means = {
            "low_mean": self.mean("clipped_low", count="ratios"),
            "high_mean": self.mean("clipped_high", count="ratios"),
            "region_mean": self.mean("clipped_low", "clipped_high", count="ratios"),
        }
        if self.means_of_ranks:
            ratios = self.columns["ratios"].clamp(min=1)
            lowest, highest = (self.columns[f"clipped_{side}"] / ratios for side in ("low", "high"))
        else:
            lowest, highest = (self.columns[name] for name in EXTREMES)
        return means | {"low_min": _known(lowest, min), "high_max": _known(highest, max)}


def extremes(objective, logps, old_logps, advantages, mask, *, sequence_level):
    """Of shares of ratios clipped in a sequence, the least below and the greatest above.

    Args:
        objective: `Clip`.
        logps, old_logps, mask: (B, T); old_logps None: on policy.
        advantages: (B,) or (B, T).

    Returns:
        EXTREMES, as two () tensors: NaN where no sequence has an active token.
    """
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    active, tokens = mask != 0, mask.sum(-1, keepdim=True)
    log_ratio = torch.zeros_like(logps)
    if old_logps is not None:
        log_ratio = torch.where(active, logps - old_logps, 0.0)
    if sequence_level:
        log_ratio = log_ratio.sum(-1, keepdim=True) / tokens.clamp(min=1)
    clipped = objective.evaluate(log_ratio, log_ratio, advantages)[2]

    def shares(hit):
        return hit.float() if hit.shape[1] == 1 else (hit & active).sum(-1) / tokens[:, 0]

    lowest, highest = shares(clipped < 0), shares(clipped > 0)
    lowest = torch.where(lowest.isnan(), math.inf, lowest).amin()
    highest = torch.where(highest.isnan(), -math.inf, highest).amax()
    return [torch.where(x.isinf(), math.nan, x) for x in (lowest, highest)]


def _known(values, choose):
    """The least or greatest value of all ranks that is not NaN; NaN if all are."""
    return choose((x for x in values.tolist() if not math.isnan(x)), default=math.nan)
