"""Argument checks: a ValueError that names the argument, what came and what is wanted.

Nothing here reads a value on an accelerator: shapes, dtypes, devices and Python numbers are checked
everywhere, ids and 0-d tensors on the CPU only.
"""

import functools
import math
from numbers import Real

import torch

from grpo_fused.checks import check_choice, check_cu_seqlens
from grpo_fused.divergences import DIVERGENCES
from grpo_fused.kernels.objective import HAS_TRITON
from grpo_fused.objectives import LEVELS, Objective
from grpo_fused.weights import RULES

PER_SEQUENCE = ("importance_sampling_ratio", "policy_mask")
FLOATING = ("advantages", "old_logps", "ref_logps", "importance_sampling_ratio", "temperature")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("sum", "none")
IMPLEMENTATIONS = ("auto", "triton", "torch")


def check_layout(logits, ids, ids_name, cu_seqlens):
    """The shape of ids, (B, T) or (N,), after a look at what decides between the two."""
    for name, tensor in (("logits", logits), (ids_name, ids)):
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    shape = tuple(ids.shape)
    if cu_seqlens is None and ids_name != "ids" and logits.dim() == 2:
        raise ValueError(f"logits {tuple(logits.shape)}, packed, need cu_seqlens, got None")
    if cu_seqlens is None and logits.dim() != 2:
        if len(shape) != 2:
            raise ValueError(f"{ids_name} must be (B, T), got {shape}")
        return shape
    if logits.dim() != 2 or ids.dim() != 1 or len(logits) != len(ids):
        found = f"logits {tuple(logits.shape)} and {ids_name} {shape}"
        raise ValueError(f"logits (N, V) need {ids_name} (N,), got {found}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, len(logits), logits.device)
    return shape


def check_logits(logits, ids, ids_name, inplace):
    """Shapes and dtypes of logits (B, T, V) or (B, T + 1, V) and ids (B, T)."""
    if logits.dtype not in FLOATS:
        raise ValueError(f"logits must be float32, bfloat16 or float16, got {logits.dtype}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{ids_name} must be integers, got {ids.dtype}")
    shape, wanted = tuple(logits.shape), tuple(ids.shape)
    fits = logits.dim() == 3 and ids.dim() == 2 and shape[0] == wanted[0]
    if not (fits and shape[1] in (wanted[1], wanted[1] + 1) and shape[2] > 0):
        raise ValueError(
            f"logits must be (B, T, V) or (B, T + 1, V) for {ids_name} (B, T), "
            f"got logits {shape} and {ids_name} {wanted}"
        )
    if logits.stride(2) != 1 and logits.shape[2] > 1:
        raise ValueError(
            f"logits must be contiguous in the last dimension, got strides {logits.stride()}"
        )
    if inplace and logits.requires_grad and _holds_values_of_a_leaf(logits):
        raise ValueError(
            "inplace=True on logits that are a leaf or a view of one: its values would be lost; "
            "pass the output of an operation, or inplace=False"
        )
    if inplace and any(
        n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True)
    ):
        raise ValueError("inplace=True on expanded logits: several rows share the same memory")


def _holds_values_of_a_leaf(logits):
    if logits.is_leaf or torch.compiler.is_compiling():
        return logits.is_leaf
    return logits._base is not None and logits._base.is_leaf


def check_tokens(logits, shape, number, tensors):
    """Tensors that go with ids of a shape, (B, T) or (N,), in a number of sequences."""
    for name, tensor in tensors.items():
        if tensor is None and name != "advantages":
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {tensor!r}")
        wanted = [shape]
        if name in PER_SEQUENCE:
            wanted = [(number,), (number, 1), shape]
        elif name in ("advantages", "temperature"):
            wanted = [(number,), shape]
        found = tuple(tensor.shape)
        if found not in wanted:
            choice = " or ".join(map(str, wanted))
            raise ValueError(f"{name} must have shape {choice} for ids {shape}, got {found}")
        if name in FLOATING and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device}, logits are on {logits.device}")


def check_ids(logits, ids, ids_name, mask):
    """Active ids lie in the vocabulary; checked on the CPU only, where reading them is free."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    V = logits.shape[2]
    outside = (ids < 0) | (ids >= V)
    if mask is not None:
        outside &= mask != 0
    if outside.any():
        found = ids[outside][0].item()
        raise ValueError(f"{ids_name} must lie in [0, {V}) where the mask is nonzero, got {found}")


def check_scale(name, value, logits, positive=False, nonzero=False):
    """A number, returned as a float, or a 0-d tensor on the device of the logits."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got {tuple(value.shape)}")
        if value.device != logits.device:
            raise ValueError(f"{name} is on {value.device}, logits are on {logits.device}")
        value = value.detach()
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return value
    elif not isinstance(value, Real):
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {value!r}")
    number = float(value)
    if not abs(number) < math.inf or (positive and number <= 0) or (nonzero and number == 0):
        bound = " > 0" if positive else " != 0" if nonzero else ""
        raise ValueError(f"{name} must be a finite number{bound}, got {number}")
    return value if isinstance(value, torch.Tensor) else number


def check_temperature(temperature, logits, shape, sequences):
    """As `check_scale`, or one temperature per sequence or token; masked ones may be anything."""
    if not isinstance(temperature, torch.Tensor) or temperature.dim() == 0:
        return check_scale("temperature", temperature, logits, positive=True)
    check_tokens(logits, shape, sequences.number, {"temperature": temperature})
    temperature = temperature.detach()
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        per_sequence = temperature.shape == (sequences.number,)
        of_tokens = sequences.spread(temperature) if per_sequence else temperature
        wrong = ~((of_tokens > 0) & (of_tokens < math.inf))
        wrong = wrong if sequences.active is None else wrong & sequences.active
        if wrong.any():
            found = of_tokens.expand_as(wrong)[wrong][0].item()
            raise ValueError(f"temperature must be finite and > 0 on active tokens, got {found}")
    return temperature


def check_objective(objective, level):
    """An Objective, at a level at which it has a meaning."""
    if not isinstance(objective, Objective):
        raise ValueError(f"objective must be an Objective such as Clip(), got {objective!r}")
    check_choice("importance_sampling_level", level, LEVELS)
    if level not in objective.levels:
        raise ValueError(
            f"importance_sampling_level {level!r} has no meaning for {type(objective).__name__}: "
            f"it must be {' or '.join(objective.levels)}"
        )


def check_choices(reduction, kl_estimator, normalizer, kl_normalizer):
    """Arguments that are one of a few words, and those that do not go together."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("kl_estimator", kl_estimator, DIVERGENCES)
    for name, rule in (("normalizer", normalizer), ("kl_normalizer", kl_normalizer)):
        if rule is None:
            continue
        check_choice(name, rule, RULES)
        if reduction == "none":
            raise ValueError(f'{name}={rule!r} has no meaning with reduction="none": leave it None')


@torch.compiler.assume_constant_result
def triton_serves(device_type):
    """Whether Triton has a driver for devices of this type."""
    return _has_driver(device_type)


@functools.cache
def _has_driver(device_type):
    if not HAS_TRITON or device_type == "cpu":
        return False
    from triton.backends import backends
    from triton.runtime import driver

    if not any(backend.driver.is_active() for backend in backends.values()):
        return False
    return driver.active.get_active_torch_device().type == device_type


def choose_implementation(implementation, logits):
    """Resolve "auto"; refuse "triton" where it cannot serve."""
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    serves = triton_serves(logits.device.type)
    if implementation == "auto":
        return "triton" if serves else "torch"
    if implementation == "triton" and not serves:
        if not HAS_TRITON:
            raise ValueError('implementation="triton", but Triton is not installed')
        from grpo_fused.kernels.launch import INTERPRETED

        if not INTERPRETED:
            raise ValueError(
                f'implementation="triton" needs a device with a Triton driver, got logits on '
                f'{logits.device}; use "torch", or set TRITON_INTERPRET=1 before the first import'
            )
    return implementation
