"""The autograd Functions over hidden states and a head: allocate, launch, save, return."""

from typing import NamedTuple

import torch

from grpo_fused.autograd import (
    LAUNCHERS,
    Formula,
    LossResults,
    Options,
    Scales,
    Tokens,
    Weights,
    first_order,
    output,
    save,
    saved,
    spend,
)
from grpo_fused.kernels.linear import chunk_limit, logits_memory
from grpo_fused.kernels.pages import allocate
from grpo_fused.metrics import METRICS, SUMS
from grpo_fused.ordering import Order


class Gradients(NamedTuple):
    """Memory for the gradients that are wanted, the others None."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


NONE = Gradients(None, None, None)


class Projection(NamedTuple):
    """How hidden states become logits: whose dtype, which tokens, how many rows at a time."""

    dtype: torch.dtype
    order: Order
    chunk_bytes: int

    def inputs(self, hidden, weight, bias):
        """What a launcher takes. The weight in a lower precision, as autocast has it, is a copy;
        in a higher one it is made in blocks."""
        if self.dtype.itemsize < weight.dtype.itemsize:
            weight = weight.to(self.dtype)
        return hidden, weight, bias, self.dtype, *self.order

    def rows(self, ids):
        """How many rows of logits there are, or at most."""
        if self.order.counts is None or torch.compiler.is_compiling():
            return ids.numel()
        return int(self.order.counts[1])

    def gradients(self, hidden, weight, bias, ids, wanted, exact=False):
        """Gradients to write into; what several chunks add up in, or is `exact`, is float32."""
        dhidden, dweight, dbias = None, None, None
        if wanted[0]:
            dhidden = allocate(hidden.shape, hidden.dtype, hidden.device)
        if wanted[1]:
            one_chunk = self.rows(ids) <= chunk_limit(len(weight), self.dtype, self.chunk_bytes)
            rounded = one_chunk and not exact and weight.dtype == self.dtype
            dtype = weight.dtype if rounded else torch.float32
            dweight = allocate(weight.shape, dtype, weight.device)
        if wanted[2]:
            dbias = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
        return Gradients(dhidden, dweight, dbias)


def as_parameters(gradients, weight, bias, exact=False):
    """Gradients in the dtypes of what they belong to; that of an `exact` weight stays float32."""
    dhidden, dweight, dbias = gradients
    if not (dweight is None or exact or dweight.dtype == weight.dtype):
        dweight = allocate(weight.shape, weight.dtype, weight.device).copy_(dweight)
    return dhidden, dweight, None if dbias is None else dbias.to(bias.dtype)


class TokenLosses(NamedTuple):
    """A loss that knows of one token at a time: one launch a chunk."""

    tokens: Tokens
    weights: Weights
    scales: Scales
    formula: Formula
    options: Options
    projection: Projection

    @property
    def grad_scale(self):
        return self.formula.grad_scale

    def run(self, hidden, weight, bias, gradients):
        """LossResults; writes into Gradients."""
        ids, active, *constants = self.tokens
        launchers = LAUNCHERS[self.options.implementation]
        terms, logps = output(4, *ids.shape, like=hidden), output(*ids.shape, like=hidden)
        entropies = output(*ids.shape, like=hidden) if self.options.compute_entropy else None
        launchers.linear_loss(
            *(*self.projection.inputs(hidden, weight, bias), ids, *constants),
            *(*self.weights, *self.scales, *self.formula, self.projection.chunk_bytes),
            *(terms, logps, entropies, *gradients),
        )
        loss, sums = output(like=hidden), output(len(SUMS), like=hidden)
        metrics = output(len(METRICS), like=hidden)
        launchers.reduce(terms, active, entropies, loss, sums, metrics)
        return LossResults(loss, sums, metrics, logps, entropies)


class LinearLoss(torch.autograd.Function):
    """Loss whose gradients in hidden states and head are made in forward: LossResults."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, main_grad, losses):
        wanted, exact = ctx.needs_input_grad, main_grad is not None
        inputs = (hidden, weight, bias, losses.tokens.ids)
        gradients = losses.projection.gradients(*inputs, wanted, exact)
        results = losses.run(hidden, weight, bias, gradients)
        ctx.launchers, ctx.spent = LAUNCHERS[losses.options.implementation], False
        ctx.main_grad = main_grad
        gradients = as_parameters(gradients, weight, bias, exact)
        save(ctx, gradients, (losses.grad_scale,))
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
                ctx.launchers.rescale(rows, grad_output, grad_scale)
        return dhidden, dweight, dbias, None, None


class LogProbOptions(NamedTuple):
    """How log-probabilities are made of hidden states."""

    scales: Scales
    options: Options
    projection: Projection
    save_logits: bool


def run_linear_logprob(hidden, weight, bias, ids, how, gradient=False):
    """(logps, entropies, maxima, totals, logits), what is not wanted None."""
    wanted = (True, how.options.compute_entropy, gradient, gradient)
    outputs = [output(*ids.shape, like=hidden) if want else None for want in wanted]
    logits, projection = None, how.projection
    if how.save_logits and gradient:
        rows = projection.rows(ids)
        logits = logits_memory(rows, len(weight), projection.dtype, hidden.device)
    LAUNCHERS[how.options.implementation].linear_logprob_fwd(
        *(*projection.inputs(hidden, weight, bias), ids, *how.scales),
        *(projection.chunk_bytes, *outputs, logits),
    )
    return *outputs, logits


class LinearLogProb(torch.autograd.Function):
    """Log-probabilities and entropies of hidden states, with any upstream gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, main_grad, ids, how):
        *statistics, logits = run_linear_logprob(hidden, weight, bias, ids, how, True)
        ctx.how, ctx.main_grad, ctx.spent = how, main_grad, False
        order = how.projection.order.tokens
        saved_tensors = (hidden, weight, bias, order, ids, *statistics, logits)
        save(ctx, saved_tensors, how.scales)
        ctx.set_materialize_grads(False)
        return tuple(statistics[:2])

    @staticmethod
    @first_order
    def backward(ctx, dlogps, dentropies):
        how, main_grad = ctx.how, ctx.main_grad
        if how.save_logits:
            spend(ctx, "log-probabilities with save_logits=True")
        (hidden, weight, bias, tokens, ids, *statistics, logits), scales = saved(ctx)
        wanted, accumulate = ctx.needs_input_grad, main_grad is not None
        if logits is None or wanted[0]:
            _check_not_freed(weight)
        dlogps = torch.zeros_like(statistics[0]) if dlogps is None else dlogps.contiguous()
        dentropies = None if dentropies is None else dentropies.contiguous()
        order = Order(tokens, how.projection.order.counts)
        projection = how.projection._replace(order=order)
        wanted = (wanted[0], wanted[1] and not accumulate, wanted[2])
        gradients = projection.gradients(hidden, weight, bias, ids, wanted)
        if accumulate:
            gradients = gradients._replace(weight=main_grad)
        LAUNCHERS[how.options.implementation].linear_logprob_bwd(
            *(*projection.inputs(hidden, weight, bias), ids, *scales, projection.chunk_bytes),
            *(*statistics, dlogps, dentropies, accumulate, logits, *gradients),
        )
        if accumulate:
            gradients = gradients._replace(weight=None)
        return *as_parameters(gradients, weight, bias), None, None, None


def _check_not_freed(weight):
    if not torch.compiler.is_compiling() and weight.untyped_storage().nbytes() == 0:
        raise RuntimeError(
            "the weight's memory was freed between forward and backward, as FSDP and ZeRO-3 do "
            "outside of the module that owns it: call the function inside of its forward"
        )
