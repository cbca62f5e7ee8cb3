"""Losses and log-probabilities over logits that are timed, and their float64 reference.

A loss is `(logits, ids, mask, advantages, old_logps, *, level, entropy_coef) -> ()`, differentiable
in the logits: GRPO's, the ratio of tokens or whole sequences clipped to 1 +- 0.2, averaged over the
tokens of a sequence, then over sequences, less an entropy bonus. Shapes are (B, T, V), (B, T),
(B, T) int64, (B,) and (B, T) float32; old_logps may be None: on policy. Log-probabilities are
`(logits, ids, mask, entropy) -> (logps, entropies or None)`.

`eager` is the path of TRL 1.16 without its kernels, at temperature 1, at which it does not divide
the logits: `selective_log_softmax` and `entropy_from_logits` of `trl/trainer/utils.py`, the loss of
`GRPOTrainer._compute_loss`. `float32` is the formula over float32 logits, `compiled` the same under
`torch.compile`. The others are in `peers`.
"""

import contextlib
import functools

import torch
import torch._dynamo
import torch.nn.functional as F

from grpo_fused import Clip, grpo_loss, selective_log_softmax

EPSILON = 0.2


class NotSupported(Exception):
    """Why a provider does not run a case."""


def need(condition, reason):
    if not condition:
        raise NotSupported(reason)


def fused(
    logits, ids, mask, advantages, old_logps, *, level="token", entropy_coef=0.0, **implementation
):
    return grpo_loss(
        *(logits, ids, mask, advantages),
        old_logps=old_logps,
        loss_type="grpo" if level == "token" else "gspo",
        objective=Clip(EPSILON, EPSILON),
        entropy_coef=entropy_coef,
        **implementation,
    ).loss


class Output(torch.autograd.Function):
    """Turns a leaf into the output of an operation, as of a model, with the same memory."""

    @staticmethod
    def forward(ctx, leaf):
        return leaf.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def fused_inplace(logits, *tokens, **formula):
    """As `fused`, the gradient written over the logits and given to the leaf without a copy."""
    return fused(Output.apply(logits), *tokens, inplace=True, **formula)


def fused_torch(logits, *tokens, **formula):
    """The torch backend, the default on a CPU."""
    need(logits.is_cuda, "the same as `fused` on a CPU")
    return fused(logits, *tokens, implementation="torch", **formula)


def surrogate(
    logps, mask, advantages, old_logps, entropies=None, *, level="token", entropy_coef=0.0
):
    """The loss from log-probabilities (B, T) and, with an entropy bonus, entropies (B, T)."""
    counts = mask.sum(-1).clamp(min=1.0)
    log_ratio = logps - (logps.detach() if old_logps is None else old_logps)
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / counts)[:, None]
    ratio = torch.exp(log_ratio)
    bounded = torch.clamp(ratio, 1 - EPSILON, 1 + EPSILON)
    advantages = advantages[:, None]
    losses = -torch.min(ratio * advantages, bounded * advantages)
    loss = ((losses * mask).sum(-1) / counts).mean()
    if entropy_coef:
        loss = loss - entropy_coef * (entropies * mask).sum() / mask.sum().clamp(min=1.0)
    return loss


def eager(logits, ids, *tokens, entropy_coef=0.0, **formula):
    logps = _eager_logps(logits, ids)
    entropies = _eager_entropies(logits) if entropy_coef else None
    return surrogate(logps, *tokens, entropies, entropy_coef=entropy_coef, **formula)


def float32(logits, ids, *tokens, entropy_coef=0.0, **formula):
    log_p = F.log_softmax(logits.float(), dim=-1)
    logps = log_p.gather(-1, ids[..., None])[..., 0]
    entropies = -(log_p.exp() * log_p).sum(-1) if entropy_coef else None
    return surrogate(logps, *tokens, entropies, entropy_coef=entropy_coef, **formula)


def compiled(*batch, **formula):
    """`float32`, fused for these shapes."""
    return compile_whole(float32)(*batch, **formula)


@functools.cache
def compile_whole(function):
    """`function` compiled for the shapes of each call, or an error: it never runs eagerly."""
    return torch.compile(function, dynamic=False, fullgraph=True)


@contextlib.contextmanager
def fresh_compiler():
    """Forget the graphs of earlier cases: from the ninth on a function would not be compiled."""
    torch._dynamo.reset()
    compile_whole.cache_clear()
    try:
        yield
    finally:
        torch._dynamo.reset()


def fused_logps(logits, ids, mask, entropy, **implementation):
    return selective_log_softmax(logits, ids, mask, compute_entropy=entropy, **implementation)


def fused_torch_logps(*batch):
    need(batch[0].is_cuda, "the same as `fused` on a CPU")
    return fused_logps(*batch, implementation="torch")


def eager_logps(logits, ids, mask, entropy):
    return _eager_logps(logits, ids), _eager_entropies(logits) if entropy else None


def float32_logps(logits, ids, mask, entropy):
    log_p = F.log_softmax(logits.float(), dim=-1)
    logps = log_p.gather(-1, ids[..., None])[..., 0]
    return logps, -(log_p.exp() * log_p).sum(-1) if entropy else None


def compiled_logps(*batch):
    return compile_whole(float32_logps)(*batch)


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
    pairs = [_exact(x.detach().double(), i) for x, i in zip(logits, ids, strict=True)]
    return [torch.stack(values) for values in zip(*pairs, strict=True)]


def _exact(x, ids):
    log_p = F.log_softmax(x, dim=-1)
    return log_p.gather(-1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def exact_gradients(sequences, ids, tokens, loss, exact):
    """Yield the gradient (T, V) in every sequence of logits (T, V) in float64.

    Args:
        sequences: the logits, one sequence at a time.
        tokens: (mask, advantages, old_logps), the arguments of `loss` after log-probabilities.
        loss: as `surrogate`.
        exact: (logps, entropies) of all of them.
    """
    leaves = [values.requires_grad_() for values in exact]
    value = loss(leaves[0], *(t if t is None else t.double() for t in tokens), leaves[1])
    upstream = torch.autograd.grad(value, leaves, allow_unused=True)
    for b, x in enumerate(sequences):
        x = x.detach().double().requires_grad_()
        values = _exact(x, ids[b])
        terms = [(v * u[b]).sum() for v, u in zip(values, upstream, strict=True) if u is not None]
        yield torch.autograd.grad(sum(terms), x)[0]
