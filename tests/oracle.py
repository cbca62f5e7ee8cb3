"""The papers' formulas in float64 loops: the truth the tests compare with, imports nothing of ours.

One sequence, one token at a time; masked tokens are skipped by `if`, nothing under them is read.
Gradients come from torch autograd, results are on the CPU. Active targets need a finite logit.
"""

import math
from dataclasses import dataclass

import torch

RULES = {  # loss_type -> how the token losses are averaged
    "grpo": "seq-mean-token-mean",  # DeepSeekMath, arXiv 2402.03300, eq. 3
    "bnpo": "token-mean-local",
    "dapo": "token-mean",  # DAPO, arXiv 2503.14476, eq. 8
    "dr_grpo": "seq-mean-token-sum-norm",  # Dr. GRPO, arXiv 2503.20783
}


@dataclass(frozen=True)
class OracleResult:
    """What `grpo_loss` returns; the tensors are float64 on the CPU."""

    loss: float
    dlogits: torch.Tensor  # shape of logits: d loss / d logits
    logps: torch.Tensor  # (B, T), 0 where masked
    entropies: torch.Tensor  # (B, T), 0 where masked
    metrics: dict[str, float]


def token_weights(
    mask, rule, *, num_items_in_batch=None, num_sequences_in_batch=None, max_completion_length=None
):
    """Weight of every token in the loss, (B, T) float64; `mask` (B, T), nonzero = active."""
    active = (mask != 0).tolist()
    B, T = mask.shape
    num_active = sum(sum(sequence) for sequence in active)
    num_items = num_active if num_items_in_batch is None else float(num_items_in_batch)
    num_sequences = B if num_sequences_in_batch is None else float(num_sequences_in_batch)
    max_length = T if max_completion_length is None else float(max_completion_length)
    weights = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            if not active[b][t]:
                continue
            if rule == "seq-mean-token-mean":
                weights[b, t] = 1 / max(sum(active[b]), 1) / num_sequences
            elif rule == "token-mean-local":
                weights[b, t] = 1 / max(num_active, 1)
            elif rule == "token-mean":
                weights[b, t] = 1 / max(num_items, 1)
            elif rule == "seq-mean-token-sum-norm":
                weights[b, t] = 1 / (num_sequences * max_length)
            elif rule == "seq-mean-token-sum":
                weights[b, t] = 1 / num_sequences
            elif rule == "token-sum":
                weights[b, t] = 1
            else:
                raise ValueError(f"rule {rule!r} is unknown")
    return weights


def _exp(x):
    return torch.exp(torch.clamp(x, -80, 80))  # derivative 0 outside


def _policy(logits, ids, mask, temperature):
    """Autograd leaf (V,) float64, log p(y) and H of every active token, as dicts by (b, t)."""
    rows, logps, entropies = {}, {}, {}
    B, T = ids.shape
    if logits.shape[0] != B or logits.shape[1] not in (T, T + 1) or mask.shape != ids.shape:
        raise ValueError(f"logits {logits.shape}, ids {ids.shape}, mask {mask.shape} do not agree")
    for b in range(B):
        for t in range(T):
            if mask[b, t] == 0:
                continue
            row, y = logits[b, t].detach().to("cpu", torch.float64, copy=True), ids[b, t].item()
            if not 0 <= y < len(row):
                raise ValueError(f"active id {y} at {(b, t)} is outside [0, {len(row)})")
            rows[b, t] = row.requires_grad_()
            x = row / temperature
            finite = x[x != -math.inf]  # p = 0 at -inf: nothing to add, and no 0 * inf
            lse = torch.logsumexp(finite, dim=0)
            logps[b, t] = x[y] - lse
            entropies[b, t] = -(torch.exp(finite - lse) * (finite - lse)).sum()
    return rows, logps, entropies


def _table(values, shape):
    """float64 tensor of a dict by (b, t), 0 where it has none."""
    table = torch.zeros(shape, dtype=torch.float64)
    for (b, t), value in values.items():
        table[b, t] = value.detach()
    return table


def _dlogits(total, rows, logits):
    """Gradient of `total` with respect to the logits, whose row (b, t) is the leaf rows[b, t]."""
    grads = torch.autograd.grad(total, list(rows.values())) if rows else ()
    return _table(dict(zip(rows, grads, strict=True)), logits.shape)


def grpo_loss(
    logits, completion_ids, completion_mask, advantages, *, old_logps=None, ref_logps=None,
    loss_type="dapo", epsilon_low=0.2, epsilon_high=0.2, delta=None, beta=0.0, temperature=1.0,
    **divisors,
):  # fmt: skip
    """Clipped policy loss with a k3 penalty, token level, for the rows of RULES.

        loss = sum_bt w[b,t] * (beta * k3[b,t]
            - min(min(ratio, delta) A, clamp(ratio, 1 - epsilon_low, 1 + epsilon_high) A)[b,t])

    Args:
        logits: (B, T, V) or (B, T+1, V), raw; the last of T+1 positions is ignored.
        completion_ids: (B, T) int.
        completion_mask: (B, T), nonzero = active, or None: all active.
        advantages: (B,) or (B, T).
        old_logps: (B, T), or None: on policy, ratio = exp(logp - sg(logp)).
        ref_logps: (B, T), or None: no penalty and no metric `kl`.
        divisors: num_items_in_batch, num_sequences_in_batch, max_completion_length of the weights.
    Returns:
        OracleResult.
    """
    if beta != 0 and ref_logps is None:
        raise ValueError("beta != 0 needs ref_logps")
    mask = torch.ones(completion_ids.shape) if completion_mask is None else completion_mask
    rows, logps, entropies = _policy(logits, completion_ids, mask, temperature)
    weights = token_weights(mask, RULES[loss_type], **divisors)
    loss, kls, ratios, lows, highs = torch.zeros((), dtype=torch.float64), [], [], [], []
    for (b, t), logp in logps.items():
        old_logp = logp.item() if old_logps is None else old_logps[b, t].item()
        advantage = (advantages[b] if advantages.ndim == 1 else advantages[b, t]).item()
        ratio = _exp(logp - old_logp)
        # DeepSeekMath eq. 3, with the higher upper bound of DAPO; delta: dual clip, 1912.09729
        free = ratio if delta is None else torch.clamp(ratio, max=delta)
        clipped = torch.clamp(ratio, 1 - epsilon_low, 1 + epsilon_high)
        token_loss = -torch.minimum(free * advantage, clipped * advantage)
        if ref_logps is not None:
            d = ref_logps[b, t].item() - logp
            kl = _exp(d) - d - 1  # k3: DeepSeekMath eq. 4; Schulman, Approximating KL divergence
            token_loss = token_loss + beta * kl
            kls.append(kl.item())
        loss = loss + weights[b, t] * token_loss
        ratios.append(ratio.item())
        lows.append(ratio.item() < 1 - epsilon_low and advantage < 0)
        highs.append(ratio.item() > 1 + epsilon_high and advantage > 0)
    n = max(len(ratios), 1)
    metrics = {
        "entropy": sum(entropy.item() for entropy in entropies.values()) / n,
        "clip_ratio/low_mean": sum(lows) / n,
        "clip_ratio/high_mean": sum(highs) / n,
        "clip_ratio/region_mean": (sum(lows) + sum(highs)) / n,  # never both: the signs differ
        "ratio/mean": sum(ratios) / n,
        "ratio/max": max(ratios, default=0.0),
    }
    if ref_logps is not None:
        metrics["kl"] = sum(kls) / n
    tables = _table(logps, mask.shape), _table(entropies, mask.shape)
    return OracleResult(loss.item(), _dlogits(loss, rows, logits), *tables, metrics)


def selective_log_softmax(logits, ids, mask=None, *, temperature=1.0, dlogps=None, dentropies=None):
    """Log-probability and entropy of every active token, and the gradient for given upstream ones.

    Args:
        logits, ids, mask: as in `grpo_loss`.
        dlogps, dentropies: (B, T) upstream gradients, None = zero.
    Returns:
        logps and entropies (B, T), 0 where masked, and dlogits, the gradient of
        sum(dlogps * logps + dentropies * entropies) over the active tokens.
    """
    mask = torch.ones(ids.shape) if mask is None else mask
    rows, logps, entropies = _policy(logits, ids, mask, temperature)
    total = torch.zeros((), dtype=torch.float64)
    for b, t in rows:
        dlogp = 0.0 if dlogps is None else dlogps[b, t].item()
        dentropy = 0.0 if dentropies is None else dentropies[b, t].item()
        total = total + dlogp * logps[b, t] + dentropy * entropies[b, t]
    return _table(logps, ids.shape), _table(entropies, ids.shape), _dlogits(total, rows, logits)
