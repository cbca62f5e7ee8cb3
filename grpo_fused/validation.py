"""Argument checks of the public functions.

Shapes, dtypes, devices and Python numbers are checked everywhere; ids and 0-d tensors on the CPU
only, because reading them would synchronise with other devices.
"""

import functools
import math
from numbers import Integral

import torch

from grpo_fused import checks
from grpo_fused.checks import NUMBERS, check_choice, check_cu_seqlens
from grpo_fused.kernels.objective import HAS_TRITON
from grpo_fused.losses.kl import KL_ESTIMATORS
from grpo_fused.losses.objectives import LEVELS, Objective
from grpo_fused.losses.weights import RULES
from grpo_fused.parallel import is_dtensor

if HAS_TRITON:
    import grpo_fused.kernels.launch as launch

PER_SEQUENCE = ("importance_sampling_ratio", "policy_mask")
FLOATING: tuple[str, ...] = ("advantages", "old_logps", "ref_logps", "sampling_logps")
FLOATING += ("temperature", "importance_sampling_ratio")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("sum", "none")
IMPLEMENTATIONS = ("auto", "triton", "torch")


def check_layout(source, cu_seqlens):
    """Check the shape of the input and its ids; return the shape of the tokens, (B, T) or (N,)."""
    name, ids_name, found = source.name, source.ids_name, tuple(source.tensor.shape)
    if source.ids is None:
        if len(found) != (2 if cu_seqlens is None else 1):
            wanted = "(B, T)" if cu_seqlens is None else "(N,) with cu_seqlens"
            raise ValueError(f"{name} must be {wanted}, got {found}")
        shape = found
    else:
        if not isinstance(source.ids, torch.Tensor):
            raise ValueError(f"{ids_name} must be a tensor, got {type(source.ids).__name__}")
        shape = tuple(source.ids.shape)
        if cu_seqlens is None and ids_name != "ids" and len(found) == 2:
            raise ValueError(f"cu_seqlens is required with packed {name} {found}, got None")
        if cu_seqlens is None and len(found) != 2:
            _check_rows(source)
            return shape
        if len(found) != 2 or len(shape) != 1 or found[0] != shape[0] or found[1] == 0:
            wanted = f"{name} must be (N, {source.columns}) for {ids_name} (N,)"
            raise ValueError(f"{wanted}, got {name} {found} and {ids_name} {shape}")
        _check_integers(source)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, shape[0], source.tensor.device)
    return shape


def _check_integers(source):
    ids = source.ids
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{source.ids_name} must be integers, got {ids.dtype}")


def _check_rows(source):
    """Check padded inputs: (B, T, ...) or (B, T + 1, ...), with ids (B, T)."""
    _check_integers(source)
    shape, wanted = tuple(source.tensor.shape), tuple(source.ids.shape)
    if len(wanted) != 2:
        raise ValueError(f"{source.ids_name} must be (B, T), got {wanted}")
    fits = len(shape) == 3 and shape[0] == wanted[0]
    if not (fits and shape[1] in (wanted[1], wanted[1] + 1) and shape[2] > 0):
        name, columns = source.name, source.columns
        raise ValueError(
            f"{name} must be (B, T, {columns}) or (B, T + 1, {columns}) for {source.ids_name} "
            f"(B, T), got {name} {shape} and {source.ids_name} {wanted}"
        )


def check_floats(name, tensor):
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def check_logits(logits, inplace):
    """Check the strides of logits and, for inplace, that they may be overwritten."""
    if logits.stride(2) != 1 and logits.shape[2] > 1:
        raise ValueError(
            f"logits must be contiguous in the last dimension, got strides {logits.stride()}"
        )
    if inplace and logits.requires_grad and holds_values_of_a_leaf(logits):
        raise ValueError(
            "inplace=True would overwrite the values of a leaf or of a view of one: logits must be "
            "the output of an operation, or inplace False"
        )
    if inplace and _rows_overlap(logits):
        raise ValueError(
            "inplace=True requires logits without expanded or overlapping dimensions, got shape "
            f"{tuple(logits.shape)} and strides {logits.stride()}"
        )


def _rows_overlap(logits):
    """Whether two rows of (B, L, V) share memory."""
    (B, L, V), (batch, row, _) = logits.shape, logits.stride()
    return not (_nested(V, row, L, batch, B) or _nested(V, batch, B, row, L))


def _nested(extent, inner, inner_size, outer, outer_size):
    """Whether the outer dimension steps over all that the inner one spans."""
    if inner_size > 1 and inner < extent:
        return False
    return outer_size <= 1 or outer >= extent + inner * (inner_size - 1)


def holds_values_of_a_leaf(logits):
    """Whether the logits are a leaf of autograd, such as a parameter, or a view of one."""
    if logits.is_leaf or torch.compiler.is_compiling():
        return logits.is_leaf
    return logits._base is not None and logits._base.is_leaf


def check_head(source):
    """Check shapes, dtypes and devices of the weight, bias and main_grad of a `HeadInput`."""
    weight, bias, main_grad = source.weight, source.bias, source.main_grad
    check_floats("weight", weight)
    if is_dtensor(source.tensor):
        raise ValueError("hidden is a DTensor: pass to_local() of what every rank holds in full")
    H = source.tensor.shape[-1]
    if weight.numel() == 0:
        raise ValueError(
            f"weight is empty, got shape {tuple(weight.shape)}: of a weight that DeepSpeed ZeRO-3 "
            "or FSDP1 has partitioned, call the function within the forward of the module that "
            "owns it (`fuse_lm_head` does), or gather it (deepspeed.zero.GatheredParameters)"
        )
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
        check_device(source, name, tensor)
        if name != "main_grad" and not source.converts and tensor.dtype != source.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}, hidden is {source.dtype}: convert one of them, use "
                "autocast, or pass upcast=True for float32 logits"
            )
    if source.logits_dtype not in (None, torch.float32, source.dtype):
        raise ValueError(
            f"logits_dtype must be torch.float32, {source.dtype} or None, "
            f"got {source.logits_dtype!r}"
        )
    if main_grad is None:
        return
    if main_grad.dtype != torch.float32 or main_grad.requires_grad:
        raise ValueError(
            f"main_grad must be float32 and not require a gradient, got {main_grad.dtype} with "
            f"requires_grad={main_grad.requires_grad}"
        )
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError("main_grad requires a weight with requires_grad=True")


def check_tokens(source, layout, tensors):
    """Check tensors, given by name, with one value per token or, for some, per sequence."""
    shape, number = layout.shape, layout.num_sequences
    for name, tensor in tensors.items():
        if tensor is None and name != "advantages":
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {tensor!r}")
        found, others = tensor.shape, ()
        if found != shape:
            if name in PER_SEQUENCE:
                others = ((number,), (number, 1))
            elif name in ("advantages", "temperature"):
                others = ((number,),)
            if found not in others:
                choice, found = " or ".join(map(str, (*others, shape))), tuple(found)
                raise ValueError(f"{name} must have shape {choice} for ids {shape}, got {found}")
        if name in FLOATING and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        check_device(source, name, tensor)


def check_device(source, name, tensor):
    """Check that a tensor is on the device of the input."""
    device = source.tensor.device
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, {source.name} are on {device}")


def check_ids(source, mask):
    """Check that active ids are in the vocabulary, on the CPU only.

    Args:
        source: an input with ids (B, T), or None.
        mask: (B, T), or None.
    """
    ids = source.ids
    if ids is None or not checks.is_readable(ids.device):
        return
    V = source.vocabulary
    if ids.numel() == 0 or V is None:
        return
    least, most = ids.aminmax()  # usually enough: one pass over all ids, masked or not
    if least.item() >= 0 and most.item() < V:
        return
    outside = (ids < 0) | (ids >= V)
    if mask is not None:
        outside &= mask != 0
    if outside.any():
        found = ids[outside][0].item()
        raise ValueError(
            f"{source.ids_name} must lie in [0, {V}) where the mask is nonzero, got {found}"
        )


def check_scale(source, name, value, positive=False, nonzero=False):
    """Check a scalar; return a float, or a detached 0-d tensor on the device of the input."""
    if type(value) is float and 0.0 < value < math.inf:  # a default, most times
        return value
    if isinstance(value, torch.Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got {tuple(value.shape)}")
        check_device(source, name, value)
        value = value.detach()
        if not checks.is_readable(value.device):
            return value
    elif not isinstance(value, NUMBERS):
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {value!r}")
    number = float(value)
    if not abs(number) < math.inf or (positive and number <= 0) or (nonzero and number == 0):
        bound = " > 0" if positive else " != 0" if nonzero else ""
        raise ValueError(f"{name} must be a finite number{bound}, got {number}")
    return value if isinstance(value, torch.Tensor) else number


def check_temperature(source, layout, sequences, temperature):
    """As `check_scale`; also one temperature per sequence or token, ignored where masked."""
    if not isinstance(temperature, torch.Tensor) or temperature.dim() == 0:
        return check_scale(source, "temperature", temperature, positive=True)
    check_tokens(source, layout, {"temperature": temperature})
    temperature = temperature.detach()
    if checks.is_readable(temperature.device):
        per_token = sequences.spread(layout.value(temperature))
        wrong = ~((per_token > 0) & (per_token < math.inf))
        wrong = wrong if sequences.active is None else wrong & sequences.active
        if wrong.any():
            found = per_token.expand_as(wrong)[wrong][0].item()
            raise ValueError(f"temperature must be finite and > 0 on active tokens, got {found}")
    return temperature


def check_objective(objective, level, sequence_group=None):
    """Check an objective and that it supports the importance sampling level and the group."""
    if not isinstance(objective, Objective):
        raise ValueError(f"objective must be an Objective such as Clip(), got {objective!r}")
    check_choice("importance_sampling_level", level, LEVELS)
    if level not in objective.levels:
        raise ValueError(
            f"importance_sampling_level must be {' or '.join(objective.levels)} for "
            f"{type(objective).__name__}, got {level!r}"
        )
    if sequence_group is not None and not objective.over_ranks:
        raise ValueError(
            f"sequence_group must be None for {type(objective).__name__}, which needs all tokens "
            "of a sequence, or of the batch, on one rank"
        )


def check_choices(options):
    """Check keywords with a fixed set of values, and combinations of them."""
    check_choice("reduction", options.reduction, REDUCTIONS)
    check_choice("kl_estimator", options.kl_estimator, KL_ESTIMATORS)
    for name in ("normalizer", "kl_normalizer"):
        rule = getattr(options, name)
        if rule is None:
            continue
        check_choice(name, rule, RULES)
        if options.reduction == "none":
            raise ValueError(f'{name} must be None with reduction="none", got {rule!r}')


def triton_serves(device_type):
    """Whether Triton has a driver for devices of this type."""
    return _has_driver(device_type)


# The effect of `torch.compiler.assume_constant_result`, without importing the compiler.
triton_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    """The backend, "triton" or "torch"; raises where "triton" is requested but cannot run."""
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    serves = triton_serves(device.type)
    if implementation == "auto":
        return "triton" if serves else "torch"
    if implementation == "triton" and not serves:
        if not HAS_TRITON:
            raise ValueError(
                'implementation="triton" requires Triton, which is not installed; '
                '"auto" and "torch" run every function in plain torch'
            )
        if not launch.INTERPRETED:
            raise ValueError(
                f'implementation="triton" requires a device with a Triton driver, got {device}; '
                'use "torch", or set TRITON_INTERPRET=1 before importing grpo_fused'
            )
    return implementation
