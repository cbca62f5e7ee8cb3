"""The two autograd Functions: allocate, launch, save, return."""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from grpo_fused import reference
from grpo_fused.kernels.objective import HAS_TRITON
from grpo_fused.metrics import TERMS

LAUNCHERS = {"torch": reference}
if HAS_TRITON:
    import grpo_fused.kernels.launchers

    LAUNCHERS["triton"] = grpo_fused.kernels.launchers


class LossOptions(NamedTuple):
    """What the fused loss is called with besides tensors and scales."""

    objective: str
    knobs: list[float]
    compute_entropy: bool
    # float16 has so little range that a gradient made before the loss scale is known would flush
    # to zero: it is made in backward, from statistics.
    deferred: bool
    inplace: bool
    implementation: str


class LogProbOptions(NamedTuple):
    """What the log-probabilities are called with besides tensors and the temperature."""

    compute_entropy: bool
    inplace: bool
    implementation: str


def _gradient_memory(logits, options):
    if options.inplace:
        return logits
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _note_overwritten(logits, dlogits):
    """Tell autograd that a launcher wrote over the logits; the ops do so by themselves."""
    if dlogits is logits and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(logits)


def _spend(ctx, what):
    """Refuse to hand out, a second time, a gradient buffer that others may have written into."""
    if torch.compiler.is_compiling():
        return
    if ctx.spent:
        raise RuntimeError(
            f"second backward through {what}: its gradient lives in one buffer that the first "
            "backward gave away. Call the function again, or sum the losses before one backward."
        )
    ctx.spent = True


def _save(ctx, tensors, scales):
    """Save tensors, and scales that are numbers or tensors: a changed tensor is then noticed."""
    ctx.numbers = tuple(None if isinstance(s, torch.Tensor) else s for s in scales)
    ctx.save_for_backward(*tensors, *(s if isinstance(s, torch.Tensor) else None for s in scales))


def _saved(ctx):
    """(tensors, scales) as they were saved."""
    saved = ctx.saved_tensors  # once: checkpointing unpacks them once
    count = len(saved) - len(ctx.numbers)
    scales = zip(ctx.numbers, saved[count:], strict=True)
    return saved[:count], [tensor if number is None else number for number, tensor in scales]


def _outputs(ids):
    # Each of its own memory: views of one buffer, written by an op, come out wrong when compiled.
    return torch.empty(ids.shape, dtype=torch.float32, device=ids.device)


def run_fused_loss(logits, tokens, scales, options, dlogits=None):
    """Launch the fused loss: (terms (7, B, T), logps, entropies, statistics).

    Args:
        logits: (B, L, V).
        tokens: (ids, weights, advantages, old_logps, ref_logps), each (B, T), the last two or None.
        scales: (temperature, beta, grad_scale), floats or 0-d tensors.
        options: LossOptions.
        dlogits: (B, L, V) to write the gradient into, or None.
    """
    ids = tokens[0]
    terms = torch.empty(len(TERMS), *ids.shape, dtype=torch.float32, device=logits.device)
    logps = _outputs(ids)
    entropies = _outputs(ids) if options.compute_entropy else None
    statistics = [_outputs(ids) if options.deferred else None for _ in range(3)]
    LAUNCHERS[options.implementation].fused_loss(
        *(logits, *tokens, *scales, options.objective, options.knobs),
        *(terms, logps, entropies, *statistics, dlogits),
    )
    return terms, logps, entropies, statistics


def run_logprob(logits, tokens, temperature, options, gradient=False):
    """Launch the log-probabilities: (logps, entropies, maxima, totals), the last two or None."""
    wanted = (True, options.compute_entropy, gradient, gradient)
    outputs = [_outputs(tokens[0]) if want else None for want in wanted]
    LAUNCHERS[options.implementation].logprob_fwd(logits, *tokens, temperature, *outputs)
    return outputs


class FusedLoss(torch.autograd.Function):
    """Loss whose gradient in the logits is made in forward, or in backward if deferred."""

    @staticmethod
    def forward(ctx, logits, tokens, scales, options):
        dlogits = None if options.deferred else _gradient_memory(logits, options)
        terms, logps, entropies, statistics = run_fused_loss(
            logits, tokens, scales, options, dlogits
        )
        _note_overwritten(logits, dlogits)
        ctx.options, ctx.spent = options, False
        temperature, _, grad_scale = scales
        saved = (logits, *tokens[:2], logps, *statistics) if options.deferred else (dlogits,)
        _save(ctx, saved, (temperature, grad_scale))
        sums = terms.sum((1, 2))
        constants = (terms, sums, logps, entropies)
        ctx.mark_non_differentiable(*(t for t in constants if t is not None))
        return sums[0].clone(), terms, sums, logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, *_):
        _spend(ctx, "grpo_loss")
        launchers = LAUNCHERS[ctx.options.implementation]
        saved, (temperature, grad_scale) = _saved(ctx)
        if not ctx.options.deferred:
            dlogits = saved[0].detach()
            launchers.rescale(dlogits, grad_output, grad_scale)
            return dlogits, None, None, None
        logits, ids, weights, logps, maxima, totals, dlogps = saved
        dlogits = _gradient_memory(logits, ctx.options)
        launchers.logprob_bwd(
            *(logits, ids, weights, temperature, logps, None, maxima, totals),
            *(dlogps * (grad_output / grad_scale), None, dlogits),
        )
        _note_overwritten(logits, dlogits)
        return dlogits.detach(), None, None, None


class LogProb(torch.autograd.Function):
    """Log-probabilities and entropies, differentiable with any upstream gradients."""

    @staticmethod
    def forward(ctx, logits, tokens, temperature, options):
        logps, entropies, maxima, totals = run_logprob(logits, tokens, temperature, options, True)
        ctx.options, ctx.spent = options, False
        _save(ctx, (logits, *tokens, logps, entropies, maxima, totals), (temperature,))
        ctx.set_materialize_grads(False)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps, dentropies):
        options = ctx.options
        if options.inplace:
            _spend(ctx, "selective_log_softmax(inplace=True)")
        (logits, ids, active, logps, entropies, maxima, totals), (temperature,) = _saved(ctx)
        dlogps = torch.zeros_like(logps) if dlogps is None else dlogps.contiguous()
        dentropies = None if dentropies is None else dentropies.contiguous()
        dlogits = _gradient_memory(logits, options)
        LAUNCHERS[options.implementation].logprob_bwd(
            *(logits, ids, active, temperature, logps, entropies, maxima, totals),
            *(dlogps, dentropies, dlogits),
        )
        _note_overwritten(logits, dlogits)
        return dlogits.detach(), None, None, None
