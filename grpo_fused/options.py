"""Keywords that the public functions share, each declared once: name, type and default.

Functions take them as `**options: Unpack[...]`, so type checkers and editors know them, and
`with_options` shows them in `help()` and `inspect.signature`. `grpo_loss` documents them.
"""

import functools
import inspect
from collections import namedtuple
from collections.abc import Callable
from typing import Annotated, TypeVar, get_type_hints

import torch
from torch import Tensor
from typing_extensions import TypedDict

from grpo_fused import agreement
from grpo_fused.bundles import Number
from grpo_fused.checks import nearest
from grpo_fused.losses.objectives import Objective

F = TypeVar("F", bound=Callable)


class FamilyOptions(TypedDict, total=False):
    """Keywords of every loss."""

    old_logps: Annotated[Tensor | None, None]
    ref_logps: Annotated[Tensor | None, None]
    sampling_logps: Annotated[Tensor | None, None]
    importance_sampling_ratio: Annotated[Tensor | None, None]
    policy_mask: Annotated[Tensor | None, None]
    loss_type: Annotated[str, "dapo"]
    objective: Annotated[Objective | None, None]
    importance_sampling_level: Annotated[str | None, None]
    normalizer: Annotated[str | None, None]
    kl_normalizer: Annotated[str | None, None]
    reduction: Annotated[str, "sum"]
    beta: Annotated[Number, 0.0]
    kl_estimator: Annotated[str, "k3"]
    use_bias_correction_kl: Annotated[bool, False]
    entropy_coef: Annotated[Number, 0.0]
    num_items_in_batch: Annotated[Number | None, None]
    num_entropy_items_in_batch: Annotated[Number | None, None]
    num_sequences_in_batch: Annotated[Number | None, None]
    max_completion_length: Annotated[Number | None, None]
    cu_seqlens: Annotated[Tensor | None, None]
    sequence_group: Annotated["torch.distributed.ProcessGroup | None", None]


class SoftmaxOptions(TypedDict, total=False):
    """Keywords of every function that computes log-probabilities."""

    temperature: Annotated[Number, 1.0]
    logit_softcap: Annotated[Number | None, None]
    logit_scale: Annotated[Number, 1.0]
    compute_entropy: Annotated[bool, False]
    support: Annotated[tuple[Tensor, Tensor] | None, None]
    entropy_over: Annotated[str, "support"]
    vocab_parallel_group: Annotated["torch.distributed.ProcessGroup | None", None]
    vocab_start: Annotated[int | None, None]
    implementation: Annotated[str, "auto"]


class LossOptions(FamilyOptions, SoftmaxOptions, total=False):
    """Keywords of the losses over logits and over a head."""

    policy_over: Annotated[str, "support"]
    kl_over: Annotated[str, "vocabulary"]
    grad_scale: Annotated[Number, 1.0]


def _defaults(declared):
    hints = get_type_hints(declared, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def _resolved(declared):
    """A NamedTuple of all keywords with their defaults."""
    defaults = _defaults(declared)
    return namedtuple(declared.__name__, defaults, defaults=defaults.values())


def resolve(resolved, function, options):
    """All keywords with their values or defaults.

    Raises:
        TypeError: a keyword that the function of that name does not have.
    """
    unknown = options.keys() - resolved._field_defaults.keys()
    if unknown:
        name = min(unknown)
        near = nearest(name, resolved._fields)
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{near}")
    return resolved(**options)


ResolvedLossOptions = _resolved(LossOptions)
ResolvedFamilyOptions = _resolved(FamilyOptions)
ResolvedSoftmaxOptions = _resolved(SoftmaxOptions)


def with_options(declared: type) -> Callable[[F], F]:
    """Decorator of public functions.

    Shows the declared keywords in the signature in the place of `**options`, and lets ranks compare
    their arguments where `agreement` is enabled.
    """
    hints, defaults = get_type_hints(declared), _defaults(declared)
    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        for (name, default), hint in zip(defaults.items(), hints.values(), strict=True)
    ]

    def decorate(function):
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        signature = signature.replace(parameters=[*own, *keywords])

        @functools.wraps(function)
        def call(*args, **kwargs):
            if agreement.ENABLED and not torch.compiler.is_compiling():
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                agreement.check_agreement(function.__name__, bound.arguments)
            return function(*args, **kwargs)

        call.__signature__ = signature
        return call

    return decorate
