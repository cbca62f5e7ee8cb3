"""TRL's metrics of a loss, from a few sums per rank: one gather instead of one or two a metric."""

import math

import torch

from grpo_fused.sequences import Padded


class Ranks:
    """Sums of every rank, on the host, as means.

    Args:
        names: n of them: of `grpo_fused.metrics.SUMS`, "with_bonus", the loss with its entropy
            bonus, and those of `extremes` or `sequence_weights`.
        gathered: (ranks, n), a list of lists.
        means_of_ranks: average the ranks' means, as TRL did before 1.12, not all of their tokens;
            its extremes then are those of the ranks' means, not of the sequences'.
    """

    def __init__(self, names, gathered, means_of_ranks):
        columns = torch.tensor(gathered, dtype=torch.float64).unbind(1)
        self.columns = dict(zip(names, columns, strict=True))
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
            lowest, highest = (self.columns[name] for name in ("low_min", "high_max"))
        return means | {"low_min": _known(lowest, min), "high_max": _known(highest, max)}


def extremes(objective, logps, old_logps, advantages, mask, *, sequence_level):
    """Of shares of ratios clipped in a sequence, the least below and the greatest above.

    Args:
        objective: `Clip`.
        logps, old_logps, mask: (B, T); old_logps None: on policy.
        advantages: (B,) or (B, T).

    Returns:
        {"low_min", "high_max"}: () tensors, NaN where no sequence has an active token.
    """
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    active, tokens = mask != 0, mask.sum(-1, keepdim=True)
    log_ratio = _log_ratio(logps, old_logps, active)
    if sequence_level:
        log_ratio = log_ratio.sum(-1, keepdim=True) / tokens.clamp(min=1)
    clipped = objective.evaluate(log_ratio, log_ratio, advantages)[2]

    def shares(hit):
        return hit.float() if hit.shape[1] == 1 else (hit & active).sum(-1) / tokens[:, 0]

    lowest, highest = shares(clipped < 0), shares(clipped > 0)
    lowest = torch.where(lowest.isnan(), math.inf, lowest).amin()
    highest = torch.where(highest.isnan(), -math.inf, highest).amax()
    of_batch = {"low_min": lowest, "high_max": highest}
    return {name: torch.where(x.isinf(), math.nan, x) for name, x in of_batch.items()}


@torch.no_grad()
def sequence_weights(objective, logps, old_logps, advantages, mask, ratio, *, everything):
    """The weights phi that VESPO gives, as TRL counts them: one a sequence, whatever its length.

    Args:
        objective: `Vespo`.
        logps, old_logps, mask: (B, T); old_logps None: on policy.
        advantages: (B,), or (B, T) for a weight per active token, of which only the sign matters.
        ratio: rollout weights (B, T) or (B, 1), or None.
        everything: count a weight per token of the masked ones too, as TRL did before 1.12.

    Returns:
        {"phi", "phis"}: () tensors, the sum of the weights and how many there are.
    """
    sequences = Padded(mask, mask)
    signs = torch.where(advantages >= 0, 1.0, -1.0)
    signs = sequences.spread(signs).expand_as(logps)
    if ratio is not None and ratio.shape != logps.shape:
        ratio = ratio[:, 0]
    log_ratio = _log_ratio(logps, old_logps, sequences.active)
    # The loss is -phi A logp: of log-probabilities and advantages of 1 that is phi.
    ones = torch.ones_like(logps)
    phi = objective.evaluate(ones, log_ratio, signs, ratio, sequences)[0].abs()
    phi = phi[:, :1] if advantages.dim() == 1 else phi
    if everything or advantages.dim() == 1:
        return {"phi": phi.sum(), "phis": phi.new_full((), phi.numel())}
    return {"phi": sequences.select(phi).sum(), "phis": sequences.total}


def _log_ratio(logps, old_logps, active):
    if old_logps is None:
        return torch.zeros_like(logps)
    return torch.where(active, logps - old_logps, 0.0)


def _known(values, choose):
    """The least or greatest value of all ranks that is not NaN; NaN if all are."""
    return choose((x for x in values.tolist() if not math.isnan(x)), default=math.nan)
