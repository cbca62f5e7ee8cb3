"""What the tokens of a batch report: kept as sums, so that they add up exactly, shown as means.

`LossOutput.sums` is one float32 vector with, for every name of TERMS in order, the sum over active
tokens. All-reduce it (sum) over ranks and add it up over micro-batches: `means(sums)` are then the
exact means of the whole batch. A maximum is no sum: `ratio/max` wants a reduction of its own.
"""

# loss: weighted; tokens: 1 if active; clipped_*: 1 where that bound stopped the gradient.
TERMS = ("loss", "tokens", "kl", "entropy", "clipped_low", "clipped_high", "ratio")

MEANS = {
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio/low_mean": "clipped_low",
    "clip_ratio/high_mean": "clipped_high",
    "ratio/mean": "ratio",
}


def means(sums):
    """Means over the active tokens that sums (7,) add up: a dict of 0-d tensors, 0 without any.

    `kl` and `entropy` are 0 where the loss was called without ref_logps or compute_entropy.
    """
    mean = sums / sums[TERMS.index("tokens")].clamp(min=1)
    metrics = {name: mean[TERMS.index(term)] for name, term in MEANS.items()}
    metrics["clip_ratio/region_mean"] = (
        metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
    )
    return metrics


def metrics_of(terms, sums, *, has_ref, has_entropy):
    """Metrics of one call from terms (7, B, T) and their sums: the names of `means` that were
    computed, and `ratio/max`."""
    metrics = means(sums)
    if not has_ref:
        del metrics["kl"]
    if not has_entropy:
        del metrics["entropy"]
    ratios = terms[TERMS.index("ratio")]
    metrics["ratio/max"] = ratios.amax() if ratios.numel() else sums.new_zeros(())
    return metrics
