"""The papers' formulas in float64 loops: the truth the tests compare with, imports nothing of ours.

One sequence, one token at a time; masked tokens are skipped by `if`, nothing under them is read.
Gradients come from torch autograd, results are on the CPU. Active targets need a finite logit.
"""

import math
from dataclasses import dataclass

import torch
from oracle_selections import chosen_of, influence

CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None}
GSPO = {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "delta": None}
CISPO = {"max_ratio": 5.0, "min_ratio": 0.0}
DPPO = {"epsilon_low": 0.2, "epsilon_high": 0.2, "max_ratio": 20.0}
FIPO = {"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": 10.0, "half_life": 32.0}
FIPO |= {"min_weight": 1.0, "max_weight": 1.2, "safety": 10.0}
CLIP_COV = {"epsilon_low": 0.2, "epsilon_high": 0.2, "share": 2e-4, "low": 1.0, "high": 5.0}
BAND = {"epsilon_low": 0.2, "epsilon_high": 0.2}
SAPO = {"temperature_pos": 1.0, "temperature_neg": 1.05}
VESPO = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}
ROWS = {  # loss_type -> (objective, knobs, ratio level, rule of the average); arXiv numbers
    "grpo": ("Clip", CLIP, "token", "seq-mean-token-mean"),  # DeepSeekMath 2402.03300 eq. 3
    "bnpo": ("Clip", CLIP, "token", "token-mean-local"),
    "dr_grpo": ("Clip", CLIP, "token", "seq-mean-token-sum-norm"),  # Dr. GRPO 2503.20783
    "ppo": ("Clip", CLIP, "token", "seq-mean-token-mean"),  # PPO 1707.06347 eq. 7
    "dapo": ("Clip", {**CLIP, "epsilon_high": 0.28}, "token", "token-mean"),  # 2503.14476 eq. 8
    "gspo": ("Clip", GSPO, "sequence", "seq-mean-token-mean"),  # GSPO 2507.18071
    "gspo_token": ("Clip", GSPO, "sequence_token", "seq-mean-token-mean"),  # same, GSPO-token
    "luspo": ("Clip", CLIP, "sequence", "seq-mean-token-sum"),  # LUSPO 2602.05261
    "cispo": ("Cispo", CISPO, "token", "token-mean"),  # MiniMax-M1 2506.13585
    "sapo": ("Sapo", SAPO, "token", "seq-mean-token-mean"),  # SAPO 2511.20347
    "vespo": ("Vespo", VESPO, "token", "token-mean"),  # VESPO 2602.10693
    "gmpo": ("Gmpo", {"epsilon": 0.4}, "sequence", "seq-mean-token-mean"),  # GMPO 2507.20673
    "gpg": ("PolicyGradient", {}, "token", "token-mean"),  # GPG 2504.02546
    "dppo_tv": ("DppoTv", DPPO, "token", "token-mean"),  # DPPO 2602.04879 eq. 13
    "dppo_kl": ("DppoKl", DPPO, "token", "token-mean"),  # DPPO 2602.04879 eq. 14
    "importance_sampling": ("ImportanceSampling", {}, "token", "token-sum"),  # Tinker
    "cross_entropy": ("PolicyGradient", {}, "token", "token-sum"),  # Tinker
    "reinforce": ("PolicyGradient", {}, "token", "seq-mean-token-sum"),  # Williams 1992
    "rollout_is": ("RolloutIs", BAND, "token", "token-mean"),  # GLM-5 2602.15763
    "dro": ("Dro", {"strength": 0.05}, "token", "seq-mean-token-sum"),  # Kimi k1.5 2501.12599
    "ipo": ("Ipo", {"epsilon": 0.1, "strength": 1e-3}, "token", "token-mean"),  # prime-rl
    "topr": ("Topr", {}, "token", "seq-mean-token-sum"),  # TOPR 2503.14286
    "fipo": ("Fipo", FIPO, "token", "token-mean"),  # FIPO 2603.19835 eq. 5 to 8
    "clip_cov": ("ClipCov", CLIP_COV, "token", "token-mean"),  # 2505.22617 eq. 10 to 12
    "kl_cov": ("KlCov", {"share": 2e-4, "strength": 1.0}, "token", "token-mean"),  # eq. 13, 14
    "m2po": ("M2po", {"threshold": 0.04}, "token", "token-mean"),  # M2PO 2510.01161 eq. 5
}
_EACH = "grpo cispo sapo vespo gmpo gpg dppo_tv dppo_kl importance_sampling rollout_is dro ipo"
_EACH += " topr fipo clip_cov kl_cov m2po"
DEFAULTS = {ROWS[row][0]: ROWS[row][1] for row in _EACH.split()}  # knobs
_ALL_LEVELS = ("token", "sequence", "sequence_sum", "sequence_token")
LEVELS = dict.fromkeys(DEFAULTS, _ALL_LEVELS)  # that have a meaning
TOKEN_LEVEL = "Vespo PolicyGradient DppoTv DppoKl RolloutIs Dro Ipo".split()
TOKEN_LEVEL += "Topr Fipo ClipCov KlCov M2po".split()
LEVELS.update(dict.fromkeys(TOKEN_LEVEL, ("token",)))
LEVELS.update(Gmpo=("sequence",))


@dataclass(frozen=True)
class OracleResult:
    """What `grpo_loss` returns; the tensors are float64 on the CPU."""

    loss: float | torch.Tensor  # (B, T), 0 where masked, for reduction "none"
    dlogits: torch.Tensor  # shape of logits: d loss / d logits, of sum(upstream * loss) for "none"
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
        divisor = {
            "seq-mean-token-mean": max(sum(active[b]), 1) * num_sequences,
            "token-mean-local": max(num_active, 1),
            "token-mean": max(num_items, 1),
            "seq-mean-token-sum-norm": num_sequences * max_length,
            "seq-mean-token-sum": num_sequences,
            "token-sum": 1,
        }[rule]
        for t in range(T):
            if active[b][t]:
                weights[b, t] = 1 / divisor
    return weights


def _exp(x):
    return torch.exp(torch.clamp(x, -80, 80))  # derivative 0 outside


def _number(x):
    """`_exp` of a number."""
    return math.exp(min(max(x, -80.0), 80.0))


def _at(values, b, t):
    """The number at (b, t) of a number or a tensor (), (B,), (B, 1) or (B, T)."""
    if not isinstance(values, torch.Tensor) or values.ndim == 0:
        return float(values)
    return float(values[b] if values.ndim == 1 else values[b, min(t, values.shape[1] - 1)])


def _policy(logits, ids, mask, kept=None, temperature=1.0, logit_softcap=None, logit_scale=1.0):
    """Autograd leaf (V,) float64, log p(y) and H of every active token, as dicts by (b, t).

    Those are pairs: over the vocabulary, and over the columns that `kept` (B, T, V) has.
    """
    rows, logps, entropies, (B, T) = {}, ({}, {}), ({}, {}), ids.shape
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
            x = row * float(logit_scale)
            if logit_softcap is not None:
                x = float(logit_softcap) * torch.tanh(x / float(logit_softcap))
            x = x / _at(temperature, b, t)
            every = torch.ones_like(x, dtype=torch.bool)
            columns = every if kept is None else kept[b, t].cpu() != 0
            for k, of in enumerate((every, columns)):
                finite = x[of & (x != -math.inf)]  # p = 0 at -inf: nothing to add, no 0 * inf
                lse = torch.logsumexp(finite, dim=0)
                logps[k][b, t] = x[y] - lse
                entropies[k][b, t] = -(torch.exp(finite - lse) * (finite - lse)).sum()
    return rows, logps, entropies


def _mean(values):
    return sum(values) / max(len(values), 1)


def _table(values, shape):
    """float64 tensor of a dict by (b, t), 0 where it has none."""
    table = torch.zeros(shape, dtype=torch.float64)
    for (b, t), value in values.items():
        table[b, t] = value.detach()
    return table


def _dlogits(total, rows, logits):
    """Gradient of `total` with respect to the logits, whose row (b, t) is the leaf rows[b, t]."""
    if not total.requires_grad:  # no token has a part in it
        return _table({}, logits.shape)
    grads = torch.autograd.grad(total, list(rows.values()), materialize_grads=True)
    return _table(dict(zip(rows, grads, strict=True)), logits.shape)


def _ratios(logps, log_ratios, level):
    """The importance ratio of every token, with its gradient."""
    if level == "token":  # DeepSeekMath eq. 3
        return [_exp(log_ratio) for log_ratio in log_ratios]
    mean = _mean(log_ratios)
    if level == "sequence":  # GSPO, the length-normalised likelihood ratio
        return [_exp(mean) for _ in logps]
    if level == "sequence_sum":  # RLOO: the likelihood ratio of the whole completion
        return [_exp(sum(log_ratios)) for _ in logps]
    return [_exp(logp - logp.detach() + mean.detach()) for logp in logps]  # GSPO-token


def _kl(d, estimator):
    """KL(policy || ref) from d = ref_logp - logp: Schulman, Approximating KL divergence.

    "+": that value with the gradient of k2, whose expectation is the gradient of the KL.
    """
    k2, k3 = d * d / 2, torch.expm1(torch.clamp(d, -80, 80)) - d
    if d > 80:  # no gradient where the exponential is cut: -d alone would push away from ref
        k3 = k3.detach()
    values = {"k1": -d, "k2": k2, "k3": k3, "abs": torch.abs(d)}
    if estimator in ("k1+", "k3+", "abs+"):
        return values[estimator[:-1]].detach() + (k2 - k2.detach())
    return values[estimator]


def kl_penalty(logp, ref, estimator, old=None, corrects=False, max_difference=None, max_kl=None):
    """The bounded KL of one token, 0-d float64; old = None is logp itself, without its gradient.

    verl's kl_penalty_forward and NeMo-RL's calculate_kl: both clamps stop gradients, that of the
    ratio too; verl's straight-through gradient of k2, which "+" has, is stopped by neither.
    """
    d = ref - logp
    held = d if max_difference is None else torch.clamp(d, -max_difference, max_difference)
    rho = _exp(logp - (logp.detach() if old is None else old)) if corrects else torch.ones_like(d)
    outside = bool(held != d)
    value = (rho.detach() if outside else rho) * _kl(held, estimator)
    if max_kl is not None:
        outside = outside or abs(value.item()) > max_kl
        value = torch.clamp(value, -max_kl, max_kl)
    if outside:
        value = value.detach()
        if estimator.endswith("+"):
            value = value + rho.detach() * (d * d - (d * d).detach()) / 2
    return value


def _objective(name, knobs, logps, log_ratios, ratios, advantages, W, sampling, chosen):
    """The objective of every active token of a sequence, to be minimised, as a list."""
    if name == "Gmpo":  # GMPO: geometric mean of the ratios, clipped one by one in log space
        z, e = [], knobs["epsilon"]
        for d, A in zip(log_ratios, advantages, strict=True):
            z.append((torch.minimum if A > 0 else torch.maximum)(d, torch.clamp(d, -e, e)))
        return [-_exp(_mean(z)) * A for A in advantages]
    if name == "Fipo":
        factors = influence(knobs, log_ratios, ratios, advantages)
        advantages = [f * A for f, A in zip(factors, advantages, strict=True)]
    trajectory = min(_number(sum(d.item() for d in log_ratios)), 1.0)  # TOPR
    S = W + sum(min(max(d.item(), -20.0), 20.0) for d in log_ratios)  # log of VESPO's ratio
    S, losses = min(max(S, math.log(1e-8)), 20.0), []
    tokens = zip(logps, log_ratios, ratios, advantages, sampling, chosen, strict=True)
    for logp, log_ratio, ratio, A, q, picked in tokens:
        if name in ("ClipCov", "M2po") and picked:
            losses.append(0.0)
        elif name == "Topr":  # no weight for gains, a truncated one of the trajectory for losses
            losses.append(-(1.0 if A > 0 else trajectory) * A * logp)
        elif name in ("Clip", "Fipo", "ClipCov"):
            # PPO eq. 7, two bounds: DAPO eq. 8, delta: dual clip 1912.09729
            delta = math.inf if knobs.get("delta") is None else float(knobs["delta"])
            clipped = torch.clamp(ratio, 1 - knobs["epsilon_low"], 1 + knobs["epsilon_high"])
            losses.append(-torch.minimum(torch.clamp(ratio, max=delta) * A, clipped * A))
        elif name == "Cispo":  # MiniMax-M1: the clipped ratio is a constant
            weight = min(max(ratio.item(), knobs["min_ratio"]), knobs["max_ratio"])
            losses.append(-weight * A * logp)
        elif name in ("DppoTv", "DppoKl"):  # no gradient where A pushes p on, out of its bound
            weight = min(ratio.item(), knobs["max_ratio"])
            if any(_outside(name, logp.item(), ratio.item(), A, knobs, q)):
                weight = 0.0
            losses.append(-weight * A * logp)
        elif name == "RolloutIs":  # GLM-5: a constant weight, 0 out of its band
            outside = any(_outside(name, logp.item(), ratio.item(), A, knobs, q))
            losses.append(-0.0 if outside else -_number(logp.item() - q) * A * logp)
        elif name == "Dro":
            losses.append(-A * logp + knobs["strength"] / 2 * log_ratio**2)
        elif name == "Ipo":  # prime-rl: no gain too far from the sampler, the penalty everywhere
            far = abs(math.exp(logp.item()) - _number(q)) > knobs["epsilon"]
            losses.append((0.0 if far else -ratio * A) + knobs["strength"] * log_ratio**2)
        elif name == "KlCov":
            losses.append(-ratio * A + picked * knobs["strength"] * torch.abs(log_ratio))
        elif name in ("ImportanceSampling", "M2po"):
            losses.append(-ratio * A)
        elif name == "Sapo":  # SAPO: soft gate, value 2 / tau and slope 1 at ratio 1
            tau = knobs["temperature_pos"] if A > 0 else knobs["temperature_neg"]
            losses.append(-4 / tau * torch.sigmoid(tau * (ratio - 1)) * A)
        elif name == "Vespo":  # VESPO: w^k exp(lam - lam w) of the sequence's ratio, a constant
            sign = "pos" if A >= 0 else "neg"
            k, lam = knobs[f"k_{sign}"], knobs[f"lambda_{sign}"]
            losses.append(-math.exp(lam + k * S - lam * math.exp(S)) * A * logp)
        else:  # PolicyGradient: REINFORCE, GPG
            losses.append(-A * logp)
    return losses


def _outside(name, logp, ratio, A, knobs, q):
    """Whether a token is out of its bound below, and above: where it is, it has no gradient.

    DPPO: its divergence, below p_old where A < 0, above it where A > 0. RolloutIs: the ratio over
    the sampler. Ipo: the distance from the sampler.
    """
    if name in ("RolloutIs", "Ipo"):
        moved = _number(logp - q) - 1.0
        bounds = (knobs["epsilon_low"], knobs["epsilon_high"]) if name == "RolloutIs" else None
        if name == "Ipo":
            moved, bounds = math.exp(logp) - _number(q), [knobs["epsilon"]] * 2
        return moved < -bounds[0] and A != 0, moved > bounds[1] and A != 0
    p, old = math.exp(logp), math.exp(logp) / ratio
    divergence = abs(p - old)
    if name == "DppoKl":
        old = min(old, 1.0)
        others = (1 - old) * math.log((1 - old + 1e-8) / (1 - p + 1e-8))
        divergence = others - old * math.log(ratio)
    low = p < old and divergence > knobs["epsilon_low"]
    high = p > old and divergence > knobs["epsilon_high"]
    return low and A < 0, high and A > 0


def _clipped(name, ratio, log_ratio, A, knobs, logp, q, picked):
    """Whether the ratio is clipped at the low and at the high end."""
    if name in ("ClipCov", "M2po") and picked:
        return A < 0, A > 0
    if name in ("DppoTv", "DppoKl", "RolloutIs", "Ipo"):
        return _outside(name, logp, ratio, A, knobs, q)
    value, low, high = ratio, -math.inf, math.inf  # Sapo, Vespo, PolicyGradient: never
    if name in ("Clip", "Fipo", "ClipCov"):
        low, high = 1 - knobs["epsilon_low"], 1 + knobs["epsilon_high"]
    elif name == "Cispo":
        high = knobs["max_ratio"]
    elif name == "Gmpo":
        value, low, high = log_ratio, -knobs["epsilon"], knobs["epsilon"]
    return value < low and A < 0, value > high and A > 0


def grpo_loss(
    logits, completion_ids, completion_mask, advantages, *, old_logps=None, ref_logps=None,
    sampling_logps=None, loss_type="dapo", objective=None, knobs=None,
    importance_sampling_level=None, normalizer=None, kl_normalizer=None,
    importance_sampling_ratio=None, policy_mask=None, beta=0.0,
    kl_estimator="k3", use_bias_correction_kl=False, temperature=1.0, logit_softcap=None,
    logit_scale=1.0, entropy_coef=0.0, reduction="sum", upstream=None,
    num_entropy_items_in_batch=None, kept=None, policy_over="support", kl_over="vocabulary",
    entropy_over="support", **divisors,
):  # fmt: skip
    """Loss of a row of ROWS, or of one put together from its four choices.

        policy[b,t] = importance_sampling_ratio * objective where policy_mask != 0, else 0
        sum:  sum_bt (w policy + w_kl beta kl)[b,t] - entropy_coef * mean of H over active tokens,
              or sum of H / num_entropy_items_in_batch
        none: (policy + beta kl - entropy_coef H)[b,t], with the gradient of sum(upstream * loss)

    Args:
        logits: (B, T, V) or (B, T+1, V), raw; the last of T+1 positions is ignored.
        completion_ids, completion_mask: (B, T), nonzero = active; mask None: all active.
        advantages: (B,) or (B, T).
        old_logps: (B, T), or None: on policy, ratio = exp(logp - sg(logp)).
        ref_logps: (B, T), or None: no penalty and no metric `kl`.
        sampling_logps: (B, T), or None: old_logps.
        objective: a name of DEFAULTS, with those knobs; None: the row's, with the row's knobs.
            The dict `knobs` replaces some of them.
        importance_sampling_level, normalizer, kl_normalizer: replace the row's; w_kl's is w's.
        importance_sampling_ratio, policy_mask, temperature: (B,), (B, 1) or (B, T).
        kept: (B, T, V), nonzero where the sampler kept a column; None: all are.
        policy_over, kl_over, entropy_over: "support" or "vocabulary", the softmax of a term.
        divisors: num_items_in_batch, num_sequences_in_batch, max_completion_length of the weights.
    """
    row_objective, row_knobs, row_level, row_rule = ROWS[loss_type]
    name, level = objective or row_objective, importance_sampling_level or row_level
    if set(knobs or {}) - set(DEFAULTS[name]) or level not in LEVELS[name]:
        raise ValueError(f"{name} has no knobs {knobs} or no level {level!r}")
    if (beta != 0 and ref_logps is None) or (reduction == "none" and upstream is None):
        raise ValueError("beta != 0 needs ref_logps, reduction='none' needs upstream")
    knobs = {**(DEFAULTS[name] if objective else row_knobs), **(knobs or {})}
    beta, entropy_coef, rollout = float(beta), float(entropy_coef), importance_sampling_ratio
    B, T = completion_ids.shape
    mask = torch.ones(B, T) if completion_mask is None else completion_mask
    transform = temperature, logit_softcap, logit_scale
    rows, logps, entropies = _policy(logits, completion_ids, mask, kept, *transform)
    logps, kl_logps = logps[policy_over == "support"], logps[kl_over == "support"]
    entropies = entropies[entropy_over == "support"]
    policies, kls, units = {}, {}, []

    def old_at(b, t):
        return logps[b, t].item() if old_logps is None else _at(old_logps, b, t)

    on = [
        (b, t)
        for b, t in rows
        if (policy_mask is None or _at(policy_mask, b, t))
        and (rollout is None or _at(rollout, b, t))
    ]
    picked = set()
    if name in ("ClipCov", "KlCov", "M2po"):  # among all tokens of the batch that are on
        columns = [logps[at].item() for at in on], [logps[at].item() - old_at(*at) for at in on]
        columns += ([_at(advantages, *at) for at in on],)
        picked = {on[i] for i in chosen_of(name, knobs, *columns)}
    for b in range(B):
        active = [t for t in range(T) if (b, t) in rows]
        own, A = [logps[b, t] for t in active], [_at(advantages, b, t) for t in active]
        old, chosen = [old_at(b, t) for t in active], [(b, t) in picked for t in active]
        log_ratios = [logp - o for logp, o in zip(own, old, strict=True)]
        ratios, W = _ratios(own, log_ratios, level), 0.0
        if name == "Vespo" and rollout is not None:  # a weight of the whole sequence counts once
            for t in active[:1] if rollout.ndim == 1 or rollout.shape[1] == 1 else active:
                W += math.log(min(max(_at(rollout, b, t), 1e-8), math.exp(20)))
        q = old if sampling_logps is None else [_at(sampling_logps, b, t) for t in active]
        losses = _objective(name, knobs, own, log_ratios, ratios, A, W, q, chosen)
        for t, loss, ratio in zip(active, losses, ratios, strict=True):
            if policy_mask is None or _at(policy_mask, b, t) != 0:
                factor = 1.0 if rollout is None or name == "Vespo" else _at(rollout, b, t)
                policies[b, t] = factor * loss
            if ref_logps is not None:
                kl = _kl(_at(ref_logps, b, t) - kl_logps[b, t], kl_estimator)
                kls[b, t] = kl * ratio if use_bias_correction_kl else kl
        told = _ratios(own, log_ratios, "token") if name == "Gmpo" else ratios
        told = [
            (r.item(), d.item(), a, knobs, logp.item(), s, c)
            for r, d, a, logp, s, c in zip(told, log_ratios, A, own, q, chosen, strict=True)
        ]
        if level in ("sequence", "sequence_sum") and name != "Gmpo" and advantages.ndim == 1:
            # One unit per sequence, the masked ones too.
            told = told[:1] or [(1.0, 0.0, 0.0, knobs, 0.0, 0.0, False)]
        units += [(token[0], *_clipped(name, *token)) for token in told]
    if reduction == "none":
        weights = kl_weights = entropy_weights = upstream
    else:
        weights = token_weights(mask, normalizer or row_rule, **divisors)
        kl_weights = token_weights(mask, kl_normalizer or normalizer or row_rule, **divisors)
        items = num_entropy_items_in_batch
        entropy_weights = token_weights(mask, "token-mean", num_items_in_batch=items)
    total, table = torch.zeros((), dtype=torch.float64), {}
    for b, t in rows:
        policy, kl = policies.get((b, t), 0.0), beta * kls.get((b, t), 0.0)
        bonus = -entropy_coef * entropies[b, t]
        table[b, t] = policy + kl + bonus
        total = total + float(weights[b, t]) * policy + float(kl_weights[b, t]) * kl
        total = total + float(entropy_weights[b, t]) * bonus
    ratios, lows, highs = zip(*units, strict=True) if units else ((), (), ())
    metrics = {
        "entropy": _mean([entropy.item() for entropy in entropies.values()]),
        "clip_ratio/low_mean": _mean(lows),
        "clip_ratio/high_mean": _mean(highs),
        "clip_ratio/region_mean": _mean([low or high for _, low, high in units]),
        "ratio/mean": _mean(ratios),
        "ratio/max": max(ratios, default=0.0),
    }
    if ref_logps is not None:
        metrics["kl"] = _mean([kl.item() for kl in kls.values()])
    loss = _table(table, (B, T)) if reduction == "none" else total.item()
    tables = _table(logps, (B, T)), _table(entropies, (B, T))
    return OracleResult(loss, _dlogits(total, rows, logits), *tables, metrics)


def selective_log_softmax(
    logits, ids, mask=None, *, temperature=1.0, logit_softcap=None, logit_scale=1.0, dlogps=None,
    dentropies=None, kept=None, dvocabulary_logps=None,
):  # fmt: skip
    """Log-probability and entropy of every active token, and the gradient for given upstream ones.

    With `kept` (B, T, V) both are over the columns that it has; dvocabulary_logps is the upstream
    gradient of the log-probabilities over all columns.

    Args:
        logits, ids, mask, temperature, logit_softcap, logit_scale: as in `grpo_loss`.
        dlogps, dentropies: (B, T) upstream gradients, None = zero.
    Returns:
        logps and entropies (B, T), 0 where masked, and dlogits, the gradient of
        sum(dlogps * logps + dentropies * entropies) over the active tokens.
    """
    mask = torch.ones(ids.shape) if mask is None else mask
    transform = temperature, logit_softcap, logit_scale
    rows, (all_logps, logps), (_, entropies) = _policy(logits, ids, mask, kept, *transform)
    total = torch.zeros((), dtype=torch.float64)
    for b, t in rows:
        dlogp = 0.0 if dlogps is None else dlogps[b, t].item()
        dentropy = 0.0 if dentropies is None else dentropies[b, t].item()
        total = total + dlogp * logps[b, t] + dentropy * entropies[b, t]
        if dvocabulary_logps is not None:
            total = total + dvocabulary_logps[b, t].item() * all_logps[b, t]
    return _table(logps, ids.shape), _table(entropies, ids.shape), _dlogits(total, rows, logits)
