"""What the oracle selects among the tokens of a batch, and how FIPO scales those of a sequence.

On lists of Python floats, in loops.
"""

import math

import torch


def mean(values):
    return sum(values) / max(len(values), 1)


def chosen_of(name, knobs, logps, log_ratios, advantages):
    """Indices of the tokens of a batch that ClipCov and M2po leave out, and KlCov penalises."""
    n, gone = len(logps), []
    if name == "M2po":  # M2PO algorithm 1: trust-region tokens, the largest first
        pairs = list(enumerate(zip(log_ratios, advantages, strict=True)))
        region = [i for i, (d, A) in pairs if (A > 0 and d > 0) or (A < 0 and d < 0)]
        while region and mean([log_ratios[i] ** 2 for i in region]) > knobs["threshold"]:
            gone.append(max(region, key=lambda i: abs(log_ratios[i])))
            region.remove(gone[-1])
        return gone
    # In float32, sums of few values are exact: those of two tokens tie, and the first is chosen.
    logps = torch.tensor(logps, dtype=torch.float32).tolist()
    mean_l, mean_A = mean(logps), mean(advantages)
    cov = [(logp - mean_l) * (A - mean_A) for logp, A in zip(logps, advantages, strict=True)]
    candidates = list(range(n))
    if name == "ClipCov":
        low, high = 1 - knobs["epsilon_low"], 1 + knobs["epsilon_high"]
        for i, (d, A) in enumerate(zip(log_ratios, advantages, strict=True)):
            ratio = math.exp(min(max(d, -80.0), 80.0))
            clipped = (ratio < low and A < 0) or (ratio > high and A > 0)
            if clipped or not knobs["low"] < cov[i] < knobs["high"]:
                candidates.remove(i)
    return sorted(candidates, key=lambda i: -cov[i])[: max(math.floor(knobs["share"] * n), 1)]


def influence(knobs, log_ratios, ratios, advantages):
    """FIPO eq. 5 to 7: the factor of the advantage of every token of a sequence."""
    tokens = [
        (d.item(), r.item(), A) for d, r, A in zip(log_ratios, ratios, advantages, strict=True)
    ]
    half_life, factors = knobs["half_life"] or math.inf, []
    for t, (_, r, A) in enumerate(tokens):
        future = 0.0
        for k, (d, later, own) in enumerate(tokens[t:]):
            if not (own < 0 and later > knobs["delta"]):
                future += 2 ** (-k / half_life) * d
        factor = math.exp(min(max(future, -80.0), 80.0))
        factor = min(max(factor, knobs["min_weight"]), knobs["max_weight"])
        factors.append(1.0 if A < 0 and r > knobs["safety"] else factor)
    return factors
