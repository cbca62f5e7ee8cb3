"""Errors of a training run, and how all ranks learn that one of them failed."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator

R = TypeVar("R")


class TrainingError(RuntimeError):
    """A failure that no setting caused: a reward function raised, the disk is full.

    The command line prints the message alone, without a traceback.
    """


class RolloutError(TrainingError):
    """A source of rollouts failed. The trainer writes a checkpoint before it gives up."""


def shorten(value: object, length: int = 80) -> str:
    """Returns `repr(value)` for an error message, cut after `length` characters."""
    text = repr(value)
    return text if len(text) <= length else text[:length] + "..."


def together(accelerator: Accelerator, action: Callable[[], R]) -> R:
    """Returns what an action returns; if it raises on one rank, every rank raises.

    Every rank must call it.

    Raises:
        TrainingError: the action raised on another rank.
        Exception: what the action raised on this one.
    """
    result = error = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    if any_rank(accelerator, error is not None):
        raise error or TrainingError("another rank failed; see its message")
    return result


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Returns whether `flag` is true on any rank. Every rank must call it."""
    flags = torch.tensor([float(flag)], device=accelerator.device)
    return bool(accelerator.gather(flags).sum() > 0)
