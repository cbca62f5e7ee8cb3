"""Argument checks shared by all modules. Errors name the argument, the valid values and the given.

Values of tensors are read on the CPU only, where reading does not synchronise with a device.
"""

import difflib
from numbers import Real

import torch

NUMBERS = (float, int, Real)  # Real last: its isinstance check is slow


def is_readable(device):
    """Whether values can be read without synchronising: on a CPU, outside of torch.compile."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def constant(tensor):
    """The tensor without its history; itself where it has none, which saves a view's time."""
    return tensor.detach() if tensor.requires_grad else tensor


def check_choice(name, value, choices):
    if value not in choices:
        near = nearest(value, choices)
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{near}")


def nearest(name, names):
    """A suggestion " (did you mean x?)" for a misspelled name, or an empty string."""
    near = difflib.get_close_matches(str(name), list(names), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def check_tensor(name, tensor, shape=None, device=None, integer=False):
    """Check for a real tensor; with a shape (and device), check both."""
    if not isinstance(tensor, torch.Tensor) or tensor.is_complex():
        got = tensor.dtype if isinstance(tensor, torch.Tensor) else repr(tensor)
        raise ValueError(f"{name} must be a tensor of real numbers, got {got}")
    if shape is not None and (tuple(tensor.shape) != shape or tensor.device != device):
        got = f"{tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} must have shape {shape} on {device}, got {got}")
    if integer and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise ValueError(f"{name} must be integers, got {tensor.dtype}")


def check_dims(name, tensor, layout):
    """Check the number of dimensions against a layout such as "(B,)" or "(B, T)"."""
    check_tensor(name, tensor)
    if tensor.dim() != sum(map(str.isalpha, layout)):
        raise ValueError(f"{name} must have shape {layout}, got {tuple(tensor.shape)}")


def active_tokens(mask, tensor):
    """Boolean mask of the shape of tensor; all True without a mask."""
    if mask is None:
        return torch.ones_like(tensor, dtype=torch.bool)
    check_tensor("mask", mask, tuple(tensor.shape), tensor.device)
    return mask != 0


def check_cu_seqlens(cu_seqlens, num_tokens, device):
    """Check for (B + 1,) int32 or int64, nondecreasing from 0 to N; values on the CPU only."""
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ValueError(f"cu_seqlens must be a tensor (B + 1,), got {cu_seqlens!r}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.device != device:
        got = f"{cu_seqlens.dtype} on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens must be int32 or int64 on {device}, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.shape[0] == 1 and num_tokens:
        raise ValueError(f"cu_seqlens must end with N = {num_tokens}, got shape (1,): no sequences")
    if is_readable(device):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != num_tokens or ends != sorted(ends):
            raise ValueError(
                f"cu_seqlens must be nondecreasing from 0 to N = {num_tokens}, got {ends}"
            )
