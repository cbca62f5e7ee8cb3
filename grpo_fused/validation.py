"""Argument checks: a ValueError that names the argument, what came and what is wanted.

Nothing here reads a value on an accelerator: shapes, dtypes, devices and Python numbers are checked
everywhere, ids and 0-d tensors on the CPU only.
"""

import functools
import math
from numbers import Integral

import torch

from grpo_fused.checks import NUMBERS, check_choice, check_cu_seqlens
from grpo_fused.divergences import DIVERGENCES
from grpo_fused.kernels.objective import HAS_TRITON
from grpo_fused.objectives import LEVELS, Objective
from grpo_fused.weights import RULES

if HAS_TRITON:
    import grpo_fused.kernels.launch as launch

PER_SEQUENCE = ("importance_sampling_ratio", "policy_mask")
FLOATING = ("advantages", "old_logps", "ref_logps", "importance_sampling_ratio", "temperature")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("sum", "none")
IMPLEMENTATIONS = ("auto", "triton", "torch")


def check_layout(source, ids, ids_name, cu_seqlens):
    """The shape of ids, (B, T) or (N,), after a look at what decides between the two."""
    if not isinstance(ids, torch.Tensor):
        raise ValueError(f"{ids_name} must be a tensor, got {type(ids).__name__}")
    shape, found = tuple(ids.shape), tuple(source.tensor.shape)
    if cu_seqlens is None and ids_name != "ids" and len(found) == 2:
        raise ValueError(f"{source.name} {found}, packed, need cu_seqlens, got None")
    if cu_seqlens is None and len(found) != 2:
        if len(shape) != 2:
            raise ValueError(f"{ids_name} must be (B, T), got {shape}")
        return shape
    if len(found) != 2 or ids.dim() != 1 or found[0] != shape[0]:
        wanted = f"{source.name} (N, {source.columns}) need {ids_name} (N,)"
        raise ValueError(f"{wanted}, got {source.name} {found} and {ids_name} {shape}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, shape[0], source.tensor.device)
    return shape


def check_rows(source, ids, ids_name):
    """Shapes and dtypes of rows (B, T, ...) or (B, T + 1, ...) and ids (B, T)."""
    rows, name, columns = source.tensor, source.name, source.columns
    check_floats(name, rows)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{ids_name} must be integers, got {ids.dtype}")
    shape, wanted = tuple(rows.shape), tuple(ids.shape)
    fits = rows.dim() == 3 and ids.dim() == 2 and shape[0] == wanted[0]
    if not (fits and shape[1] in (wanted[1], wanted[1] + 1) and shape[2] > 0):
        raise ValueError(
            f"{name} must be (B, T, {columns}) or (B, T + 1, {columns}) for {ids_name} (B, T), "
            f"got {name} {shape} and {ids_name} {wanted}"
        )


def check_floats(name, tensor):
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def check_logits(logits, inplace):
    """What kernels need of logits, and who may lose their values."""
    if logits.stride(2) != 1 and logits.shape[2] > 1:
        raise ValueError(
            f"logits must be contiguous in the last dimension, got strides {logits.stride()}"
        )
    if inplace and logits.requires_grad and holds_values_of_a_leaf(logits):
        raise ValueError(
            "inplace=True on logits that are a leaf or a view of one: its values would be lost; "
            "pass the output of an operation, or inplace=False"
        )
    if inplace and any(
        n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True)
    ):
        raise ValueError("inplace=True on expanded logits: several rows share the same memory")


def holds_values_of_a_leaf(logits):
    """Whether values of a parameter, or of another leaf, would be lost with those of logits."""
    if logits.is_leaf or torch.compiler.is_compiling():
        return logits.is_leaf
    return logits._base is not None and logits._base.is_leaf


def check_head(source):
    """What a head needs of its weight, bias and main_grad: `sources.Hidden`."""
    weight, bias, main_grad = source.weight, source.bias, source.main_grad
    check_floats("weight", weight)
    _check_not_sharded("weight", weight)
    H = source.tensor.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != H or weight.shape[0] == 0:
        raise ValueError(
            f"weight must be (V, {H}) for hidden (..., {H}), got {tuple(weight.shape)}"
        )
    size = source.chunk_bytes
    if size is not None and (isinstance(size, bool) or not isinstance(size, Integral) or size < 1):
        raise ValueError(f"chunk_bytes must be a positive integer or None, got {size!r}")
    V = weight.shape[0]
    wanted = {"weight": (weight, (V, H)), "bias": (bias, (V,)), "main_grad": (main_grad, (V, H))}
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        check_floats(name, tensor)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
        check_device(name, tensor, source)
        if name != "main_grad" and not source.converts and tensor.dtype != source.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}, hidden is {source.dtype}: convert one, use autocast, "
                "or upcast=True for logits in float32"
            )
    if main_grad is None:
        return
    if main_grad.dtype != torch.float32 or main_grad.requires_grad:
        raise ValueError(
            f"main_grad must be float32 that requires no gradient, got {main_grad.dtype}"
        )
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError("main_grad is given, but weight requires no gradient to add to it")


def _check_not_sharded(name, tensor):
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        raise ValueError(
            f"{name} is a DTensor, sharded over ranks: call the function inside of the forward of "
            "the module that owns it, where FSDP has gathered it, or pass full_tensor() with "
            'grad_placements=[Partial("avg")]'
        )


def check_tokens(source, shape, number, tensors):
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
        if tensor.shape not in wanted:
            choice, found = " or ".join(map(str, wanted)), tuple(tensor.shape)
            raise ValueError(f"{name} must have shape {choice} for ids {shape}, got {found}")
        if name in FLOATING and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        check_device(name, tensor, source)


def check_device(name, tensor, source):
    """A tensor is where the logits, or what makes them, are."""
    device = source.tensor.device
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, {source.name} are on {device}")


def check_ids(source, ids, ids_name, mask):
    """Active ids lie in the vocabulary; checked on the CPU only, where reading them is free."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    V = source.vocabulary
    if ids.numel() == 0:
        return
    least, most = ids.aminmax()  # of all: as a rule one pass tells that none is outside
    if least.item() >= 0 and most.item() < V:
        return
    outside = (ids < 0) | (ids >= V)
    if mask is not None:
        outside &= mask != 0
    if outside.any():
        found = ids[outside][0].item()
        raise ValueError(f"{ids_name} must lie in [0, {V}) where the mask is nonzero, got {found}")


def check_scale(name, value, source, positive=False, nonzero=False):
    """A number, returned as a float, or a 0-d tensor on the device of the logits."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got {tuple(value.shape)}")
        check_device(name, value, source)
        value = value.detach()
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return value
    elif not isinstance(value, NUMBERS):
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {value!r}")
    number = float(value)
    if not abs(number) < math.inf or (positive and number <= 0) or (nonzero and number == 0):
        bound = " > 0" if positive else " != 0" if nonzero else ""
        raise ValueError(f"{name} must be a finite number{bound}, got {number}")
    return value if isinstance(value, torch.Tensor) else number


def check_temperature(temperature, source, shape, sequences):
    """As `check_scale`, or one temperature per sequence or token; masked ones may be anything."""
    if not isinstance(temperature, torch.Tensor) or temperature.dim() == 0:
        return check_scale("temperature", temperature, source, positive=True)
    check_tokens(source, shape, sequences.number, {"temperature": temperature})
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


def choose_implementation(implementation, device):
    """Resolve "auto"; refuse "triton" where it cannot serve."""
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    serves = triton_serves(device.type)
    if implementation == "auto":
        return "triton" if serves else "torch"
    if implementation == "triton" and not serves:
        if not HAS_TRITON:
            raise ValueError('implementation="triton", but Triton is not installed')
        if not launch.INTERPRETED:
            raise ValueError(
                f'implementation="triton" needs a device with a Triton driver, got logits on '
                f'{device}; use "torch", or set TRITON_INTERPRET=1 before the first import'
            )
    return implementation
