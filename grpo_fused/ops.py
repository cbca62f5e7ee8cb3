"""The launchers of both backends: plain calls in eager mode, torch.library ops under torch.compile.

A launcher writes into outputs that its caller allocated and returns nothing. The op boundary keeps
Inductor out of the kernels (it would type Python floats as float64 and retrace per value). Eager
calls skip it, because the dispatcher costs more than the smaller kernels take. Only this module
flattens bundles.
"""

import functools
import inspect
import types
from string import ascii_lowercase
from typing import NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from grpo_fused import bundles
from grpo_fused.head import launchers as head_launchers
from grpo_fused.kernels.objective import HAS_TRITON
from grpo_fused.torch_backend import launchers as torch_launchers

# Of every launcher: its parameters, and the names of those, or of their fields, that it writes.
LOGITS = {"logits": Tensor, "tokens": bundles.Tokens, "scales": bundles.Scales}
HEAD = {"head": bundles.Head, "chunking": bundles.Chunking}
HEAD |= {"tokens": bundles.Tokens, "scales": bundles.Scales}
STATISTICS = {"statistics": bundles.Statistics}
LAUNCHERS = {
    "fused_loss": (
        LOGITS | {"formula": bundles.Formula, "outputs": bundles.Outputs},
        {"outputs"},
    ),
    "logprob_fwd": (LOGITS | STATISTICS | {"shard": bool}, {"statistics"}),
    "logprob_bwd": (
        LOGITS | STATISTICS | {"derivatives": bundles.Derivatives},
        {"derivatives_dlogits"},
    ),
    "linear_loss": (
        HEAD
        | {"formula": bundles.Formula, "outputs": bundles.Outputs}
        | {"gradients": bundles.Gradients},
        {"outputs", "gradients"},
    ),
    "linear_logprob_fwd": (
        HEAD | STATISTICS | {"logits": Tensor | None, "shard": bool},
        {"statistics", "logits"},
    ),
    "linear_logprob_bwd": (
        HEAD
        | STATISTICS
        | {"derivatives": bundles.Derivatives, "logits": Tensor | None, "accumulate": bool}
        | {"gradients": bundles.Gradients},
        {"logits", "gradients"},
    ),
    "token_weights": (
        {
            "values": bundles.TokenValues,
            "index": Tensor | None,
            "outputs": bundles.TokenWeights,
        },
        {"outputs"},
    ),
    "locate": (
        {"cu_seqlens": Tensor, "active": Tensor | None, "index": Tensor, "counts": Tensor},
        {"index", "counts"},
    ),
    "reduce": (
        {"outputs": bundles.Outputs, "active": Tensor | None}
        | {"loss": Tensor, "sums": Tensor, "metrics": Tensor},
        {"loss", "sums", "metrics"},
    ),
    "rescale": (
        {"dlogits": Tensor, "grad_output": Tensor, "grad_scale": bundles.Number},
        {"dlogits"},
    ),
}
TYPES = {str: "str", bool: "bool", int: "int", list[float]: "float[]", torch.dtype: "ScalarType"}


def _is_bundle(hint):
    return inspect.isclass(hint) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def _without_none(hint):
    """(hint without None, whether None is allowed)."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    members = [member for member in get_args(hint) if member is not type(None)]
    optional = len(members) < len(get_args(hint))
    tensor = Tensor in members  # a number travels as a 0-d tensor
    return Tensor if tensor else members[0], optional


def _arguments(name, hint, optional=False):
    """Yield (name, type of torch.library) of everything that a parameter is flattened into."""
    hint, none = _without_none(hint)
    optional |= none
    if _is_bundle(hint):
        for field, field_hint in get_type_hints(hint).items():
            yield from _arguments(f"{name}_{field}", field_hint, optional)
    else:
        yield name, TYPES.get(hint, "Tensor") + "?" * optional


def _nesting(hint):
    """None for a value, a tuple of nestings for the fields of a bundle."""
    hint, _ = _without_none(hint)
    if not _is_bundle(hint):
        return None
    return tuple(_nesting(field) for field in get_type_hints(hint).values())


def _flatten(value, nesting):
    """The fields of a bundle, and of bundles in it, as a list; None for all fields of None."""
    if nesting is None:
        return [value]
    flat = []
    for i, inner in enumerate(nesting):
        flat += _flatten(None if value is None else value[i], inner)
    return flat


def _unflatten(values, hint):
    """The inverse of `_flatten`, from an iterator."""
    hint, optional = _without_none(hint)
    if not _is_bundle(hint):
        return next(values)
    fields = [_unflatten(values, field_hint) for field_hint in get_type_hints(hint).values()]
    return None if optional and all(field is None for field in fields) else hint(*fields)


def launcher(function, name, suffix):
    """Register a launcher as the op `grpo_fused::<name><suffix>`.

    Floats become 0-d tensors on the way into the op: a new value is new data and not a new graph.
    """
    parameters, written = LAUNCHERS[name]
    hints = list(parameters.values())
    arguments = [pair for item in parameters.items() for pair in _arguments(*item)]
    outputs = [n for n, _ in arguments if n in written or n.split("_")[0] in written]
    marks = dict(zip(outputs, ascii_lowercase, strict=False))
    assert len(marks) == len(outputs)
    schema = ", ".join(
        f"{kind.replace('Tensor', f'Tensor({marks[n]}!)') if n in marks else kind} {n}"
        for n, kind in arguments
    )

    def run(*flat):
        values = iter(flat)
        function(*(_unflatten(values, hint) for hint in hints))

    op = torch.library.custom_op(
        f"grpo_fused::{name}{suffix}", run, mutates_args=outputs, schema=f"({schema}) -> ()"
    )
    op.register_fake(lambda *args: None)
    is_tensor = [kind.startswith("Tensor") for _, kind in arguments]

    nestings = [_nesting(hint) for hint in hints]

    def flatten(*args):
        flat = _flatten(args, nestings)
        device = next(value.device for value in flat if isinstance(value, Tensor))
        return [
            torch.full((), value, dtype=torch.float32, device=device)
            if tensor and isinstance(value, (int, float))
            else value
            for value, tensor in zip(flat, is_tensor, strict=True)
        ]

    @functools.wraps(function)
    def call(*args):
        if not torch.compiler.is_compiling():
            return function(*args)
        return op(*flatten(*args))

    call.op, call.flatten = op, flatten
    return call


class Rows(NamedTuple):
    """Launchers over logits of one backend, for those over a head."""

    fused_loss: object
    logprob_fwd: object
    logprob_bwd: object


def _backend(functions, suffix):
    """A namespace of launchers, from functions over logits and those over a head."""
    rows = Rows(*(functions[name] for name in Rows._fields))
    for name in ("linear_loss", "linear_logprob_fwd", "linear_logprob_bwd"):
        function = getattr(head_launchers, name)
        functions[name] = functools.wraps(function)(functools.partial(function, rows))
    launchers = {name: launcher(functions[name], name, suffix) for name in functions}
    return types.SimpleNamespace(**launchers)


NAMES = ("fused_loss", "logprob_fwd", "logprob_bwd", "locate", "reduce", "rescale")
BACKENDS = {"torch": _backend({n: getattr(torch_launchers, n) for n in NAMES}, "_torch")}
if HAS_TRITON:
    from grpo_fused.kernels import fused_loss, logprob, reduce, token_weights

    BACKENDS["triton"] = _backend(
        {
            "fused_loss": fused_loss.fused_loss,
            "logprob_fwd": logprob.logprob_fwd,
            "logprob_bwd": logprob.logprob_bwd,
            "token_weights": token_weights.token_weights,
            "locate": reduce.locate,
            "reduce": reduce.reduce,
            "rescale": reduce.rescale,
        },
        "",
    )
