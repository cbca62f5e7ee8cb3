"""Errors of a training run, and how all ranks learn that one of them failed."""

import errno
import os
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

R = TypeVar("R")
# Folders of code that no user wrote: Python's and this package.
LIBRARIES = (
    os.path.realpath(sysconfig.get_path("stdlib")),
    str(Path(__file__).resolve().parents[2]),
)


class TrainingError(RuntimeError):
    """A failure that no setting caused: a reward function raised, the disk is full.

    The command line prints the message alone, without a traceback.
    """


class OtherRankError(TrainingError):
    """A failure that another rank reports; the command line is silent about it on this one."""


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
        OtherRankError: the action raised on another rank.
        Exception: what the action raised on this one.
    """
    result = error = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    if any_rank(accelerator, error is not None):
        raise error or OtherRankError("another rank failed; see its message")
    return result


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Returns whether `flag` is true on any rank. Every rank must call it."""
    if flag:
        accelerator.set_trigger()
    return accelerator.check_trigger()


def explain(error: BaseException, folder: str | Path) -> str:
    """Says why files could not be written to a folder: above all, that the disk is full.

    torch and safetensors raise errors of their own, some without the system's ("unexpected pos 704
    vs 598"), so that a full disk is recognised by writing to it once more.
    """
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno is not None:
            return _explain_system(one, folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 20))
            probe.flush()
    except OSError as found:
        return f"{_explain_system(found, folder)}; {error}"
    return f"{type(error).__name__}: {error}"


def _explain_system(error: OSError, folder: str | Path) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"no space left in {folder}: {error}" if full else str(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Lists an error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def locate(error: BaseException, function: Callable | None = None) -> str:
    """Returns " at file.py:7" of the innermost frame of an error that is in the user's code.

    That is what neither Python, nor an installed package, nor this one contains; or else the file
    of `function`, which was called; "" if there is none.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_library(frame.filename)]
    if not own and function is not None:
        call = function if hasattr(function, "__code__") else type(function).__call__
        file = getattr(getattr(call, "__code__", None), "co_filename", None)
        own = [frame for frame in frames if frame.filename == file] or frames
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def _is_library(filename: str) -> bool:
    path = Path(os.path.realpath(filename))
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(installed) or filename.startswith("<") or any(map(path.is_relative_to, LIBRARIES))
