"""PPO in float64 loops, one token at a time, and batches for it: imports nothing of ours."""

import math

import torch

LENGTHS = [37, 0, 20, 1, 33]


def hidden(mask, *tensors):
    """Tensors with NaN where masked."""
    return [tensor.masked_fill(~mask, math.nan) for tensor in tensors]


def ppo_batch(B=5, T=37, seed=0):
    """Odd lengths with holes, one empty and one of a single token; NaN under the mask.

    Returns mask, scores (B,), values, old values, returns, log-probabilities and reference ones.
    Values are halfway from the old ones to the returns: PPO clips about a third of them.
    """
    generator = torch.Generator().manual_seed(seed)
    values, old, returns, logps, ref = torch.randn(5, B, T, generator=generator)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    mask &= torch.rand(B, T, generator=generator) < 0.85
    mask[3, 0] = True
    scores = torch.randn(B, generator=generator)
    returns = old + 0.7 * returns
    values = old + 0.5 * (returns - old) + 0.2 * values
    tensors = (values, old, returns, logps - 2, logps + 0.2 * ref - 2)
    return mask, scores, *hidden(mask, *tensors)


KL = {
    "k1": lambda d: -d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(d) - d - 1,
    "abs": abs,
    "k3+": lambda d: math.exp(d) - d - 1,
}


def kl_rewards_equation(rewards, logps, ref_logps, mask, beta, kl_estimator):
    """DeepSeekMath's equation 2, one token at a time."""
    result = torch.zeros(mask.shape, dtype=torch.float64)
    for b, row in enumerate(mask.tolist()):
        active = [t for t, on in enumerate(row) if on]
        for t in active:
            per_token = rewards[b, t].item() if rewards.ndim == 2 else 0.0
            d = ref_logps[b, t].item() - logps[b, t].item()
            result[b, t] = per_token - beta * KL[kl_estimator](d)
        if active and rewards.ndim == 1:
            result[b, active[-1]] += rewards[b].item()
    return result


def gae_equation(rewards, values, mask, gamma, lam):
    """The docstring's recursion, from the last active token."""
    advantages, returns = torch.zeros(2, *mask.shape, dtype=torch.float64)
    for b in range(mask.shape[0]):
        advantage = value = 0.0
        for t in reversed(range(mask.shape[1])):
            if mask[b, t]:
                delta = rewards[b, t].item() + gamma * value - values[b, t].item()
                advantage = delta + gamma * lam * advantage
                value = values[b, t].item()
                advantages[b, t], returns[b, t] = advantage, advantage + value
    return advantages.tolist(), returns.tolist()


def token_batch(B=4, T=37, seed=0):
    """Rewards, values and a mask with prefixes, holes and an empty row; NaN where masked."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, B, T, generator=generator)
    lengths = torch.randint(T // 2, T + 1, (B, 1), generator=generator)
    mask = (torch.arange(T) < lengths) & (torch.rand(B, T, generator=generator) < 0.8)
    mask[-1] = False
    return rewards.masked_fill(~mask, math.nan), values.masked_fill(~mask, math.nan), mask


def weight_equation(mask, normalizer, items=None, number=None, length=None):
    """(B, T) float64 weights of a normalizer."""
    weights = torch.zeros(mask.shape, dtype=torch.float64)
    B, T = mask.shape
    total, number, length = mask.sum().item(), number or B, length or T
    for b in range(B):
        divisor = {
            "seq-mean-token-mean": max(mask[b].sum().item(), 1) * number,
            "token-mean-local": max(total, 1),
            "token-mean": max(total if items is None else items, 1),
            "seq-mean-token-sum-norm": number * length,
            "seq-mean-token-sum": number,
            "token-sum": 1,
        }[normalizer]
        weights[b, mask[b]] = 1 / divisor
    return weights


def value_loss_equation(values, returns, mask, old_values, cliprange, weights):
    """(losses, gradients, metrics) one token at a time; losses are not weighted."""
    losses, gradients = torch.zeros(2, *mask.shape, dtype=torch.float64)
    clipped, told, targets = [], [], []
    for b, t in mask.nonzero().tolist():
        v, target = values[b, t].item(), returns[b, t].item()
        loss, gradient = (v - target) ** 2 / 2, v - target
        if old_values is not None:
            old = old_values[b, t].item()
            held = (min(max(v, old - cliprange), old + cliprange) - target) ** 2 / 2
            clipped.append(held > loss)
            if held > loss:
                loss, gradient = held, 0.0
        losses[b, t], gradients[b, t] = loss, gradient * weights[b, t].item()
        told.append(v)
        targets.append(target)

    def mean(values):
        return sum(values) / max(len(values), 1)

    def variance(values):
        return mean([(x - mean(values)) ** 2 for x in values])

    errors = [target - v for target, v in zip(targets, told, strict=True)]
    metrics = {
        "value/mean": mean(told),
        "value/clip_ratio": mean(clipped),
        "value/explained_variance": 1 - variance(errors) / variance(targets),
    }
    return losses, gradients, metrics


def ppo_equation(logits, ids, mask, scores, old_logps, ref_logps, old_values, values, beta):
    """DeepSeekMath's PPO, section 4.1.1, with a clipped value loss: one token at a time.

    Returns the gradients, in logits and values, of the loss of the policy plus 0.1 value losses.
    """
    logits = logits.double().requires_grad_()
    values = values.double().requires_grad_()
    kept = [(b, t) for b, t in mask.nonzero().tolist()]
    rewards = kl_rewards_equation(scores, old_logps, ref_logps, mask, beta, "k1")
    advantages, returns = gae_equation(rewards, old_values, mask, 1.0, 0.95)
    flat = [advantages[b][t] for b, t in kept]
    center = sum(flat) / len(flat)
    spread = math.sqrt(sum((a - center) ** 2 for a in flat) / (len(flat) - 1) + 1e-8)
    policy = value = torch.zeros((), dtype=torch.float64)
    for b, t in kept:
        A = (advantages[b][t] - center) / spread
        logp = logits[b, t].log_softmax(-1)[ids[b, t]]
        ratio = (logp - old_logps[b, t].double()).exp()
        weight = 1 / (mask[b].sum().item() * len(mask))
        policy = policy - weight * torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A)
        v, old, target = values[b, t], old_values[b, t].double(), returns[b][t]
        held = torch.max(torch.min(v, old + 0.2), old - 0.2)
        errors = (v - target) ** 2, (held - target) ** 2
        value = value + weight / 2 * torch.max(*errors)
    (policy + 0.1 * value).backward()
    return logits.grad, values.grad
