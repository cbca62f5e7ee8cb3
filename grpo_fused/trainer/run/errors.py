"""Errors of a training run, and how all ranks learn that one of them failed."""

import torch
from accelerate import Accelerator


class TrainingError(RuntimeError):
    """A failure that no setting caused: a reward function raised, the disk is full.

    The command line prints the message alone, without a traceback.
    """


def shorten(value: object, length: int = 80) -> str:
    """Returns `repr(value)` for an error message, cut after `length` characters."""
    text = repr(value)
    return text if len(text) <= length else text[:length] + "..."


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Returns whether `flag` is true on any rank. Every rank must call it."""
    flags = torch.tensor([float(flag)], device=accelerator.device)
    return bool(accelerator.gather(flags).sum() > 0)
