"""Helpers of the autograd Functions: outputs, saved scalars, errors of a second backward."""

import functools

import torch

from grpo_fused.bundles import Derivatives, LossResults, Outputs, Statistics, Support
from grpo_fused.losses.metrics import METRICS, SUMS


def output(*shape, like):
    # Each has its own memory: views of one buffer, written by an op, come out wrong when compiled.
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def make_outputs(shape, entropy, like, dlogits=None):
    """`Outputs` of a token-level loss: (B, T), and the gradient as it is given."""
    loss = output(*shape, like=like)
    kl, clipped, ratio, logps = (torch.empty_like(loss) for _ in range(4))
    entropies = torch.empty_like(loss) if entropy else None
    return Outputs(loss, kl, clipped, ratio, logps, entropies, dlogits)


def make_statistics(shape, wanted, gradient, like):
    """`Statistics` (B, T); those that only a gradient needs are None without one.

    Args:
        wanted: `LogProbs` of flags.
    """
    fields = []
    for logps, entropies in (wanted.over(False), wanted.over(True)):
        fields += (logps, entropies, logps and gradient, logps and gradient)
    return Statistics(*(output(*shape, like=like) if want else None for want in fields))


def make_derivatives(like, upstream):
    """`Derivatives` from the upstream gradients of `LogProbs`, of which any may be None.

    Those of log-probabilities are zeros where they are needed all the same.
    """
    dlogps, dentropies, kept_dlogps, kept_dentropies = (
        None if d is None else d.contiguous() for d in upstream
    )
    kept = like.kept_logps is not None
    if dlogps is None and (dentropies is not None or not kept):
        dlogps = torch.zeros_like(like.logps)
    if kept_dlogps is None and kept:
        kept_dlogps = torch.zeros_like(like.kept_logps)
    return Derivatives(dlogps, dentropies, None, kept_dlogps, kept_dentropies)


def reduce(backend, outputs, active):
    """LossResults from the outputs of every token."""
    like = outputs.logps
    loss, sums = output(like=like), output(len(SUMS), like=like)
    metrics = output(len(METRICS), like=like)
    backend.reduce(outputs._replace(dlogits=None), active, loss, sums, metrics)
    return LossResults(loss, sums, metrics, outputs.logps, outputs.entropies)


def save(ctx, tensors, scalars):
    """Save tensors, and numbers that may be 0-d tensors: autograd then notices changed tensors."""
    ctx.numbers = tuple(None if isinstance(s, torch.Tensor) else (s,) for s in scalars)
    ctx.save_for_backward(*tensors, *(s if isinstance(s, torch.Tensor) else None for s in scalars))


def flat(support):
    """The tensors of a `Support`, or as many None."""
    return (None,) * 3 if support is None else tuple(support)


def nested(starts, stops, ids):
    """The inverse of `flat`."""
    return None if starts is None else Support(starts, stops, ids)


def saved(ctx):
    """(tensors, scalars) as they were saved."""
    saved = ctx.saved_tensors  # read once: checkpointing unpacks them once
    count = len(saved) - len(ctx.numbers)
    scalars = zip(ctx.numbers, saved[count:], strict=True)
    return saved[:count], [tensor if number is None else number[0] for number, tensor in scalars]


def spend(ctx, what):
    """Refuse a second backward: the first one has returned its only gradient buffer."""
    if torch.compiler.is_compiling():
        return
    if ctx.spent:
        raise RuntimeError(
            f"second backward through {what}: its gradient lives in one buffer that the first "
            "backward gave away. Call the function again, or sum the losses before one backward."
        )
    ctx.spent = True


def first_order(backward):
    """A backward that refuses to be differentiated: autograd would treat its gradient as constant.

    `once_differentiable` refuses only if the upstream gradient itself requires a gradient.
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
