"""Checks that several modules share: a ValueError names the argument, what came, what is wanted."""

import difflib
from numbers import Real

import torch

NUMBERS = (float, int, Real)  # what `isinstance` finds at once comes first: Real asks a registry


def check_choice(name, value, choices):
    if value not in choices:
        near = nearest(value, choices)
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{near}")


def nearest(name, names):
    """ " (did you mean x?)" for the name that is most like it, or nothing."""
    near = difflib.get_close_matches(str(name), list(names), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def check_tensor(name, tensor, shape=None, device=None, integer=False):
    """A tensor of real numbers; with a shape, of that one, on that device."""
    if not isinstance(tensor, torch.Tensor) or tensor.is_complex():
        got = tensor.dtype if isinstance(tensor, torch.Tensor) else repr(tensor)
        raise ValueError(f"{name} must be a tensor of real numbers, got {got}")
    if shape is not None and (tuple(tensor.shape) != shape or tensor.device != device):
        got = f"{tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} must have shape {shape} on {device}, got {got}")
    if integer and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise ValueError(f"{name} must be integers, got {tensor.dtype}")


def check_cu_seqlens(cu_seqlens, num_tokens, device):
    """(B + 1,) int32 or int64 that rise from 0 to N; values are looked at on the CPU only."""
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ValueError(f"cu_seqlens must be a tensor (B + 1,), got {cu_seqlens!r}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.device != device:
        got = f"{cu_seqlens.dtype} on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens must be int32 or int64 on {device}, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != num_tokens or ends != sorted(ends):
            raise ValueError(f"cu_seqlens must rise from 0 to N = {num_tokens}, got {ends}")
