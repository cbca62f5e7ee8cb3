"""What the tokens of a batch report: kept as sums, so that they add up exactly, shown as means.

`LossOutput.sums` is one float32 vector with an entry for every name of SUMS. All-reduce it (sum)
over ranks and add it up over micro-batches: `means(sums)` are then the exact means of the whole
batch. A maximum is no sum: `ratio/max` wants a reduction of its own.
"""

import torch

# loss: with its weights, or without any for reduction="none"; tokens: how many are active; ratios:
# how many ratios there are, tokens or, at sequence level, all sequences; clipped_*: how many of
# them that bound acted on.
SUMS = ("loss", "tokens", "kl", "entropy", "ratios", "clipped_low", "clipped_high", "ratio")

# The vector that one call writes next to its sums.
METRICS = (
    "kl",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "ratio/mean",
    "ratio/max",
)


def means(sums):
    """Means that sums (8,) add up to: a dict of 0-d tensors, 0 where there is nothing to average.

    `kl` and `entropy` are 0 where the loss was called without ref_logps or compute_entropy.
    """
    return dict(zip(METRICS, _means(sums), strict=False))


def _means(sums):
    _, tokens, kl, entropy, ratios, low, high, ratio = sums
    of_tokens = torch.stack([kl, entropy]) / tokens.clamp(min=1)
    of_ratios = torch.stack([low, high, low + high, ratio]) / ratios.clamp(min=1)
    return torch.cat([of_tokens, of_ratios])


def total(loss, kl, entropy, clipped, ratio, tokens, ratios):
    """(sums (8,), metrics (7,)) of values that are 0 where nothing is active.

    Args:
        loss, kl, entropy: of tokens, any shape; entropy may be None.
        clipped, ratio: of ratios, tokens or sequences.
        tokens, ratios: () float32, how many of them are active.
    """
    sums = torch.stack(
        [
            loss.sum(),
            tokens,
            kl.sum(),
            loss.new_zeros(()) if entropy is None else entropy.sum(),
            ratios,
            (clipped < 0).sum().float(),
            (clipped > 0).sum().float(),
            ratio.sum(),
        ]
    )
    highest = ratio.amax() if ratio.numel() else ratio.new_zeros(())
    return sums, torch.cat([_means(sums), highest[None]])


def as_dict(metrics, *, has_ref, has_entropy):
    """Metrics (7,) by name, those that were computed."""
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    if not has_ref:
        del named["kl"]
    if not has_entropy:
        del named["entropy"]
    return named
