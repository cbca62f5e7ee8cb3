"""The autograd Functions over hidden states and an LM head."""

import torch

from grpo_fused.autograd.common import (
    first_order,
    flat,
    make_derivatives,
    make_statistics,
    nested,
    save,
    saved,
    spend,
)
from grpo_fused.bundles import Gradients, Head, Scales, Statistics, Tokens
from grpo_fused.head.chunks import chunk_limit, logits_memory
from grpo_fused.ops import BACKENDS
from grpo_fused.parallel import exchange_statistics, merge, reduce_hidden_grad
from grpo_fused.torch_backend.pages import allocate


def in_dtype(head, chunking):
    """The head as launchers take it: a weight of higher precision than the logits is cast, as under
    autocast; one of lower precision they cast in blocks."""
    weight = head.weight
    if chunking.dtype.itemsize < weight.dtype.itemsize:
        weight = weight.to(chunking.dtype)
    return head._replace(weight=weight)


def num_rows(tokens, chunking):
    """How many rows of logits there are; under torch.compile the most there can be."""
    if chunking.counts is None or torch.compiler.is_compiling():
        return tokens.ids.numel()
    return int(chunking.counts[1])


def make_gradients(head, chunking, tokens, wanted, exact=False):
    """`Gradients` to write into: float32 where chunks add up, or if the sum must be exact."""
    hidden, weight, bias = head
    dhidden, dweight, dbias = None, None, None
    if wanted[0]:
        dhidden = allocate(hidden.shape, hidden.dtype, hidden.device)
    if wanted[1]:
        single_chunk = num_rows(tokens, chunking) <= chunk_limit(len(weight), chunking)
        rounded = single_chunk and not exact and weight.dtype == chunking.dtype
        dweight = allocate(weight.shape, weight.dtype if rounded else torch.float32, weight.device)
    if wanted[2]:
        dbias = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
    return Gradients(dhidden, dweight, dbias)


def cast_gradients(gradients, head, exact=False):
    """Gradients in the dtypes of their parameters; the weight's stays float32 if it is exact."""
    dhidden, dweight, dbias = gradients
    weight, bias = head.weight, head.bias
    if not (dweight is None or exact or dweight.dtype == weight.dtype):
        dweight = allocate(weight.shape, weight.dtype, weight.device).copy_(dweight)
    return Gradients(dhidden, dweight, None if dbias is None else dbias.to(bias.dtype))


class LinearLoss(torch.autograd.Function):
    """LossResults of a loss whose gradients in hidden states and head are computed in forward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, main_grad, losses):
        head, exact = Head(hidden, weight, bias), main_grad is not None
        wanted = ctx.needs_input_grad
        gradients = make_gradients(head, losses.chunking, losses.tokens, wanted, exact)
        results = losses.run(head, gradients)
        ctx.backend, ctx.main_grad, ctx.spent = losses.backend, main_grad, False
        save(ctx, cast_gradients(gradients, head, exact), (losses.upstream,))
        ctx.mark_non_differentiable(*(t for t in results[1:] if t is not None))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @first_order
    def backward(ctx, grad_output, *_):
        spend(ctx, "linear_grpo_loss")
        gradients, (grad_scale,) = saved(ctx)
        dhidden, dweight, dbias = (None if t is None else t.detach() for t in gradients)
        if ctx.main_grad is not None:
            ctx.main_grad.addcmul_(dweight, grad_output / grad_scale)
            dweight = None
        for gradient in (dhidden, dweight, dbias):
            if gradient is not None:
                rows = gradient[(None,) * (3 - gradient.dim())]
                BACKENDS[ctx.backend].rescale(rows, grad_output, grad_scale)
        return dhidden, dweight, dbias, None, None


def run_linear_logprob(
    head, tokens, scales, chunking, wanted, backend, save_logits, shards=None, gradient=False
):
    """(`Statistics`, logits (n, V) or None) of hidden states."""
    sharded = shards is not None
    statistics = make_statistics(tokens.ids.shape, wanted, gradient or sharded, head.hidden)
    logits = None
    if save_logits and gradient:
        rows, V = num_rows(tokens, chunking), len(head.weight)
        logits = logits_memory(rows, V, chunking.logits_dtype, head.hidden.device)
    BACKENDS[backend].linear_logprob_fwd(
        in_dtype(head, chunking), chunking, tokens, scales, statistics, logits, sharded
    )
    if sharded:
        exchange = exchange_statistics(shards, statistics)
        statistics = merge(exchange, statistics, tokens, scales, backend)
    return statistics, logits


class LinearLogProb(torch.autograd.Function):
    """`LogProbs` of hidden states, differentiable with any upstream gradients."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        main_grad,
        tokens,
        scales,
        chunking,
        wanted,
        backend,
        save_logits,
        shards,
    ):
        head = Head(hidden, weight, bias)
        statistics, logits = run_linear_logprob(
            head, tokens, scales, chunking, wanted, backend, save_logits, shards, gradient=True
        )
        ctx.chunking, ctx.backend, ctx.main_grad = chunking._replace(order=None), backend, main_grad
        ctx.save_logits, ctx.shards, ctx.spent = save_logits, shards, False
        support = flat(tokens.support)
        tensors = (*head, chunking.order, tokens.ids, *support, logits, *statistics)
        save(ctx, tensors, (tokens.temperature, *scales))
        ctx.set_materialize_grads(False)
        return tuple(statistics.logprobs())

    @staticmethod
    @first_order
    def backward(ctx, *upstream):
        if ctx.save_logits and ctx.chunking.dtype == ctx.chunking.logits_dtype:
            spend(ctx, "log-probabilities with save_logits=True")
        (hidden, weight, bias, order, ids, *tensors), (temperature, *scales) = saved(ctx)
        support, logits, statistics = tensors[:3], tensors[3], Statistics(*tensors[4:])
        head, scales = Head(hidden, weight, bias), Scales(*scales)
        tokens = Tokens(ids, None, temperature, support=nested(*support))
        chunking, main_grad = ctx.chunking._replace(order=order), ctx.main_grad
        wanted, accumulate = ctx.needs_input_grad, main_grad is not None
        if logits is None or wanted[0]:
            _check_not_freed(head.weight)
        derivatives = make_derivatives(statistics, upstream)
        wanted = (wanted[0], wanted[1] and not accumulate, wanted[2])
        gradients = make_gradients(head, chunking, tokens, wanted)
        if accumulate:
            gradients = gradients._replace(weight=main_grad)
        BACKENDS[ctx.backend].linear_logprob_bwd(
            in_dtype(head, chunking),
            chunking,
            tokens,
            scales,
            statistics,
            derivatives,
            logits,
            accumulate,
            gradients,
        )
        if accumulate:
            gradients = gradients._replace(weight=None)
        if gradients.hidden is not None and ctx.shards is not None:
            reduce_hidden_grad(ctx.shards, gradients.hidden)
        return *cast_gradients(gradients, head), *(None,) * 8


def _check_not_freed(weight):
    if not torch.compiler.is_compiling() and weight.untyped_storage().nbytes() == 0:
        raise RuntimeError(
            "the weight's memory was freed between forward and backward, as FSDP and ZeRO-3 do "
            "outside of the module that owns it: call the function inside of its forward"
        )
