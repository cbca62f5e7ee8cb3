"""What is timed: losses of one signature and their float64 truth; log-probabilities likewise.

A loss is `(logits, ids, mask, advantages, old_logps) -> ()`, differentiable in the logits: GRPO's,
the ratio clipped to 1 +- 0.2, averaged over the tokens of a sequence, then over sequences. Shapes
are (B, T, V), (B, T), (B, T) int64, (B,) and (B, T) float32.

`eager` is what TRL 1.16 runs where none of its kernels serve, at temperature 1, at which it does
not divide the logits: `selective_log_softmax` and `entropy_from_logits` of `trl/trainer/utils.py`,
the loss of `GRPOTrainer._compute_loss`.
"""

import functools

import torch
import torch.nn.functional as F

from grpo_fused import grpo_loss, selective_log_softmax

EPSILON = 0.2


def fused(logits, ids, mask, advantages, old_logps):
    return grpo_loss(logits, ids, mask, advantages, old_logps=old_logps, loss_type="grpo").loss


class Output(torch.autograd.Function):
    """Makes of a leaf what a model puts out: the same memory, but no leaf."""

    @staticmethod
    def forward(ctx, leaf):
        return leaf.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def fused_inplace(logits, ids, mask, advantages, old_logps):
    """As `fused`, the gradient written over the logits and handed to the leaf without a copy."""
    output = Output.apply(logits)
    return grpo_loss(
        output, ids, mask, advantages, old_logps=old_logps, loss_type="grpo", inplace=True
    ).loss


def surrogate(logps, mask, advantages, old_logps):
    """The loss from log-probabilities (B, T)."""
    ratio = torch.exp(logps - old_logps)
    bounded = torch.clamp(ratio, 1 - EPSILON, 1 + EPSILON)
    advantages = advantages[:, None]
    losses = -torch.min(ratio * advantages, bounded * advantages)
    return ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


def eager(logits, ids, mask, advantages, old_logps):
    return surrogate(_eager_logps(logits, ids), mask, advantages, old_logps)


def compiled(logits, ids, mask, advantages, old_logps):
    """The formula over a float32 log-softmax, as `torch.compile` fuses it for these shapes."""
    return _compiled_formula()(logits, ids, mask, advantages, old_logps)


@functools.cache
def _compiled_formula():
    return torch.compile(_float32_formula, dynamic=False)


def _float32_formula(logits, ids, mask, advantages, old_logps):
    logps = F.log_softmax(logits.float(), dim=-1).gather(-1, ids[..., None])[..., 0]
    return surrogate(logps, mask, advantages, old_logps)


def fused_logps(logits, ids, mask, entropy):
    """(logps, entropies), the latter None without `entropy`."""
    return selective_log_softmax(logits, ids, mask, compute_entropy=entropy)


def eager_logps(logits, ids, mask, entropy):
    return _eager_logps(logits, ids), _eager_entropies(logits) if entropy else None


def _eager_logps(logits, ids):
    ids = ids[..., None]
    if logits.dtype == torch.float32:
        chosen = logits.gather(-1, ids)
        totals = torch.stack([torch.logsumexp(sequence, dim=-1) for sequence in logits])
        return (chosen - totals[..., None])[..., 0]
    sequences = zip(logits, ids, strict=True)
    return torch.stack([F.log_softmax(x, dim=-1).gather(-1, i) for x, i in sequences])[..., 0]


def _eager_entropies(logits, rows=128):
    entropies = []
    for block in logits.reshape(-1, logits.shape[-1]).split(rows):
        logps = F.log_softmax(block, dim=-1)
        entropies.append(-(torch.exp(logps) * logps).sum(-1))
    return torch.cat(entropies).view(logits.shape[:-1])


def exact_logps(logits, ids):
    """(logps, entropies) in float64, one sequence at a time."""
    logps, entropies = [], []
    for x, i in zip(logits.detach(), ids, strict=True):
        log_p = F.log_softmax(x.double(), dim=-1)
        logps.append(log_p.gather(-1, i[:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return torch.stack(logps), torch.stack(entropies)


def exact_gradients(logits, ids, mask, advantages, old_logps, loss=surrogate):
    """Yield the gradient (T, V) of every sequence in float64; `loss` as `surrogate`."""
    for b in range(len(logits)):
        x = logits[b].detach().double().requires_grad_()
        logps = F.log_softmax(x, dim=-1).gather(-1, ids[b, :, None]).T
        rest = (t[b : b + 1] for t in (mask, advantages.double(), old_logps.double()))
        (gradient,) = torch.autograd.grad(loss(logps, *rest), x)
        yield gradient / len(logits)
