"""The two autograd Functions: allocate, launch, save, return."""

import functools
from typing import NamedTuple

import torch

from grpo_fused import reference
from grpo_fused.kernels.objective import HAS_TRITON
from grpo_fused.kernels.pages import allocate
from grpo_fused.metrics import METRICS, SUMS

LAUNCHERS = {"torch": reference}
if HAS_TRITON:
    import grpo_fused.kernels.launchers

    LAUNCHERS["triton"] = grpo_fused.kernels.launchers


WASTE = 1.125  # memory that the strides of a gradient may take, over what it needs


class Tokens(NamedTuple):
    """What is known of every token; constants. Values per token are () or (B,) or (B, T)."""

    ids: torch.Tensor  # (B, T), contiguous as are active, old_logps and ref_logps
    active: torch.Tensor | None  # bool
    advantages: torch.Tensor  # (B,) or (B, T)
    old_logps: torch.Tensor | None
    ref_logps: torch.Tensor | None
    ratios: torch.Tensor | None  # (B,) or (B, T)
    policy_mask: torch.Tensor | None  # (B,) or (B, T)


class Weights(NamedTuple):
    """Of the policy term, of the KL penalty and of the entropy bonus, see `weights.Divisors`."""

    items: float | torch.Tensor
    divisor: float | torch.Tensor
    kl_items: float | torch.Tensor
    kl_divisor: float | torch.Tensor
    entropy_items: float | torch.Tensor | None
    entropy_coef: float | torch.Tensor | None


class Scales(NamedTuple):
    """How logits become log-probabilities; numbers or 0-d tensors, temperature also per token."""

    temperature: float | torch.Tensor
    logit_scale: float | torch.Tensor
    logit_softcap: float | torch.Tensor | None


class Formula(NamedTuple):
    """What the fused loss computes: names that the launchers resolve, and numbers."""

    beta: float | torch.Tensor
    grad_scale: float | torch.Tensor
    objective: str
    knobs: list[float]
    divergence: str
    bias_correction: bool


class Options(NamedTuple):
    """How it is computed, the loss or log-probabilities alone."""

    compute_entropy: bool
    implementation: str


def _gradient_memory(logits, inplace, implementation):
    if inplace:
        return logits
    if implementation == "torch":
        return allocate(logits.shape, logits.dtype, logits.device)
    return _memory_like(logits)


def _memory_like(logits):
    """Memory for the gradient, with the strides of logits (B, L, V) where these waste little.

    Its rows then start as far from whole vectors as theirs: stores are as wide as loads, also
    where V is odd and the logits are padded, or some of the positions of a tensor. The gradient of
    a leaf would only be copied by autograd, which wants that contiguous.
    """
    sequences, positions, V = logits.shape
    strides = of_sequence, of_position, _ = logits.stride()
    row_ends = (positions - 1) * of_position + V
    apart = of_position >= V and (of_sequence >= row_ends or sequences == 1)
    little = (sequences - 1) * of_sequence + row_ends <= WASTE * logits.numel()
    if logits.is_leaf or not (apart and little):
        strides = (positions * V, V, 1)
    return torch.empty_strided(logits.shape, strides, dtype=logits.dtype, device=logits.device)


def _note_overwritten(logits, dlogits):
    """Tell autograd that a launcher wrote over the logits; the ops do so by themselves."""
    if dlogits is logits and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(logits)


def spend(ctx, what):
    """Refuse to hand out, a second time, a gradient buffer that others may have written into."""
    if torch.compiler.is_compiling():
        return
    if ctx.spent:
        raise RuntimeError(
            f"second backward through {what}: its gradient lives in one buffer that the first "
            "backward gave away. Call the function again, or sum the losses before one backward."
        )
    ctx.spent = True


def first_order(backward):
    """A backward that refuses to be differentiated: autograd would take its gradient for constant.

    `once_differentiable` refuses only when the upstream gradient itself wants a gradient.
    """

    @functools.wraps(backward)
    def refuse(ctx, *upstream):
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        if not torch.compiler.is_compiling():
            raise RuntimeError("there is no second derivative here: create_graph must be False")
        with torch.no_grad():
            return backward(ctx, *upstream)

    return refuse


def save(ctx, tensors, scales):
    """Save tensors, and scales that are numbers or tensors: a changed tensor is then noticed."""
    ctx.numbers = tuple(None if isinstance(s, torch.Tensor) else (s,) for s in scales)
    ctx.save_for_backward(*tensors, *(s if isinstance(s, torch.Tensor) else None for s in scales))


def saved(ctx):
    """(tensors, scales) as they were saved."""
    saved = ctx.saved_tensors  # once: checkpointing unpacks them once
    count = len(saved) - len(ctx.numbers)
    scales = zip(ctx.numbers, saved[count:], strict=True)
    return saved[:count], [tensor if number is None else number[0] for number, tensor in scales]


def output(*shape, like):
    # Each of its own memory: views of one buffer, written by an op, come out wrong when compiled.
    return torch.empty(shape, dtype=torch.float32, device=like.device)


class LossResults(NamedTuple):
    """What the fused loss writes; entropies may be None."""

    loss: torch.Tensor  # ()
    sums: torch.Tensor  # (8,)
    metrics: torch.Tensor  # (7,)
    logps: torch.Tensor  # (B, T)
    entropies: torch.Tensor | None  # (B, T)


def run_fused_loss(logits, tokens, weights, scales, formula, options, dlogits=None):
    """Launch the fused loss and the reduction of what its tokens report.

    Args:
        logits: (B, L, V).
        tokens, weights, scales, formula, options: Tokens, Weights, Scales, Formula, Options.
        dlogits: (B, L, V) to write the gradient into, or None.
    """
    shape = tokens.ids.shape
    terms, logps = output(4, *shape, like=logits), output(*shape, like=logits)
    entropies = output(*shape, like=logits) if options.compute_entropy else None
    launchers = LAUNCHERS[options.implementation]
    launchers.fused_loss(
        *(logits, *tokens, *weights, *scales, *formula), terms, logps, entropies, dlogits
    )
    loss, sums = output(like=logits), output(len(SUMS), like=logits)
    metrics = output(len(METRICS), like=logits)
    launchers.reduce(terms, tokens.active, entropies, loss, sums, metrics)
    return LossResults(loss, sums, metrics, logps, entropies)


def run_logprob(logits, ids, active, scales, options, gradient=False):
    """Launch the log-probabilities: (logps, entropies, maxima, totals), the last two or None."""
    wanted = (True, options.compute_entropy, gradient, gradient)
    outputs = [output(*ids.shape, like=logits) if want else None for want in wanted]
    LAUNCHERS[options.implementation].logprob_fwd(logits, ids, active, *scales, *outputs)
    return outputs


class FusedLoss(torch.autograd.Function):
    """Loss whose gradient in the logits is made in forward: LossResults."""

    @staticmethod
    def forward(ctx, logits, tokens, weights, scales, formula, options, inplace):
        dlogits = _gradient_memory(logits, inplace, options.implementation)
        results = run_fused_loss(logits, tokens, weights, scales, formula, options, dlogits)
        _note_overwritten(logits, dlogits)
        ctx.launchers, ctx.spent = LAUNCHERS[options.implementation], False
        save(ctx, (dlogits,), (formula.grad_scale,))
        ctx.mark_non_differentiable(*(t for t in results[1:] if t is not None))
        ctx.set_materialize_grads(False)  # zeros for all of these would be launches
        return tuple(results)

    @staticmethod
    @first_order
    def backward(ctx, grad_output, *_):
        spend(ctx, "grpo_loss")
        (dlogits,), (grad_scale,) = saved(ctx)
        dlogits = dlogits.detach()
        ctx.launchers.rescale(dlogits, grad_output, grad_scale)
        return dlogits, None, None, None, None, None, None


class LogProb(torch.autograd.Function):
    """Log-probabilities and entropies, differentiable with any upstream gradients."""

    @staticmethod
    def forward(ctx, logits, ids, active, scales, options, inplace):
        logps, entropies, maxima, totals = run_logprob(logits, ids, active, scales, options, True)
        ctx.implementation, ctx.inplace, ctx.spent = options.implementation, inplace, False
        save(ctx, (logits, ids, active, logps, entropies, maxima, totals), scales)
        ctx.set_materialize_grads(False)
        return logps, entropies

    @staticmethod
    @first_order
    def backward(ctx, dlogps, dentropies):
        if ctx.inplace:
            spend(ctx, "logits with inplace=True")
        (logits, ids, active, *statistics), scales = saved(ctx)
        dlogps = torch.zeros_like(statistics[0]) if dlogps is None else dlogps.contiguous()
        dentropies = None if dentropies is None else dentropies.contiguous()
        dlogits = _gradient_memory(logits, ctx.inplace, ctx.implementation)
        LAUNCHERS[ctx.implementation].logprob_bwd(
            *(logits, ids, active, *scales, *statistics, dlogps, dentropies, dlogits)
        )
        _note_overwritten(logits, dlogits)
        return dlogits.detach(), None, None, None, None, None
