"""The autograd Functions over logits."""

import torch

from grpo_fused.autograd.common import (
    first_order,
    flat,
    make_derivatives,
    make_outputs,
    make_statistics,
    nested,
    reduce,
    save,
    saved,
    spend,
)
from grpo_fused.bundles import Scales, Statistics, Tokens
from grpo_fused.ops import BACKENDS
from grpo_fused.parallel import exchange_statistics, merge
from grpo_fused.torch_backend.pages import allocate


def _gradient_memory(logits, inplace, backend):
    if inplace:
        return logits
    if backend == "torch":
        return allocate(logits.shape, logits.dtype, logits.device)
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _note_overwritten(logits, dlogits):
    """Tell autograd that a launcher wrote over the logits; the ops do so by themselves."""
    if dlogits is logits and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(logits)


def run_fused_loss(logits, tokens, scales, formula, entropy, backend, dlogits=None):
    """LossResults of a token-level loss; writes the gradient into dlogits (B, L, V) or None."""
    launchers = BACKENDS[backend]
    outputs = make_outputs(tokens.ids.shape, entropy, logits, dlogits)
    launchers.fused_loss(logits, tokens, scales, formula, outputs)
    return reduce(launchers, outputs, tokens.active)


def run_logprob(logits, tokens, scales, wanted, backend, shards=None, gradient=False):
    """`Statistics` of the logits; those that only a gradient needs are None without one."""
    sharded = shards is not None
    statistics = make_statistics(tokens.ids.shape, wanted, gradient or sharded, logits)
    BACKENDS[backend].logprob_fwd(logits, tokens, scales, statistics, sharded)
    if sharded:
        exchange = exchange_statistics(shards, statistics)
        statistics = merge(exchange, statistics, tokens, scales, backend)
    return statistics


class FusedLoss(torch.autograd.Function):
    """LossResults of a token-level loss, whose gradient in the logits is computed in forward."""

    @staticmethod
    def forward(ctx, logits, tokens, scales, formula, entropy, backend, inplace):
        dlogits = _gradient_memory(logits, inplace, backend)
        results = run_fused_loss(logits, tokens, scales, formula, entropy, backend, dlogits)
        _note_overwritten(logits, dlogits)
        ctx.backend, ctx.spent = backend, False
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
        BACKENDS[ctx.backend].rescale(dlogits, grad_output, grad_scale)
        return dlogits, None, None, None, None, None, None


class LogProb(torch.autograd.Function):
    """`LogProbs`, differentiable with any upstream gradients."""

    @staticmethod
    def forward(ctx, logits, tokens, scales, wanted, backend, shards, inplace):
        statistics = run_logprob(logits, tokens, scales, wanted, backend, shards, gradient=True)
        ctx.backend, ctx.inplace, ctx.spent = backend, inplace, False
        tensors = (logits, tokens.ids, tokens.active, *flat(tokens.support), *statistics)
        save(ctx, tensors, (tokens.temperature, *scales))
        ctx.set_materialize_grads(False)
        return tuple(statistics.logprobs())

    @staticmethod
    @first_order
    def backward(ctx, *upstream):
        if ctx.inplace:
            spend(ctx, "logits with inplace=True")
        (logits, ids, active, *tensors), (temperature, *scales) = saved(ctx)
        tokens = Tokens(ids, active, temperature, support=nested(*tensors[:3]))
        statistics = Statistics(*tensors[3:])
        derivatives = make_derivatives(statistics, upstream)
        dlogits = _gradient_memory(logits, ctx.inplace, ctx.backend)
        BACKENDS[ctx.backend].logprob_bwd(
            logits, tokens, Scales(*scales), statistics, derivatives._replace(dlogits=dlogits)
        )
        _note_overwritten(logits, dlogits)
        return dlogits.detach(), None, None, None, None, None, None
