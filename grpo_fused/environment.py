"""What is installed, and what works with it: `grpo-fused env`, for reports of bugs."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from grpo_fused import __version__
from grpo_fused.kernels.objective import HAS_TRITON
from grpo_fused.validation import triton_serves

PACKAGES = ("transformers", "accelerate", "peft", "datasets", "trl", "verl", "vllm", "bitsandbytes")


def installed(package: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_type() -> str:
    """Type of the device that tensors of this machine are put on: cuda, mps, xpu, ..., or cpu."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def what_works(device: str) -> str:
    """What Triton serves on devices of a type, in a sentence."""
    if not HAS_TRITON:
        return "not installed; all functions and the trainer run in plain torch"
    number = installed("triton") or installed("triton-windows") or "of an unknown version"
    if triton_serves(device):
        return f"{number}; its kernels serve {device} tensors"
    return f"{number}; no driver for {device} tensors, for which all functions run in plain torch"


def report() -> str:
    """Versions of what matters, a line each."""
    device = device_type()
    name = f" ({torch.cuda.get_device_name()})" if device == "cuda" else ""
    lines = [
        f"grpo-fused: {__version__}",
        f"Python: {platform.python_version()} on {platform.platform()}",
        f"torch: {torch.__version__}",
        f"device: {device}{name}",
        f"Triton: {what_works(device)}",
    ]
    return "\n".join(lines + [f"{name}: {installed(name) or 'not installed'}" for name in PACKAGES])
