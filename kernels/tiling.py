"""Which block sizes a launch takes: one table, the first row that fits.

Block sizes decide in which order a row's columns are added up, so they never depend on the number
of rows. That only says how many programs share them: `programs` per multiprocessor at most.
"""

import math
from typing import NamedTuple


class Device(NamedTuple):
    """What block sizes depend on: "sm_90", "gfx942", ... or "interpreter"."""

    architecture: str
    warp_size: int
    multiprocessors: int


class Tiling(NamedTuple):
    """A block is unroll x (warps * warp_size) x vector columns, vector columns being one load."""

    warps: int
    unroll: int
    programs_per_multiprocessor: int


class Choice(NamedTuple):
    """For an architecture that starts so, and rows of so many bytes (V x dtype) at most."""

    architecture: str
    row_bytes: float
    threads: int
    unroll: int
    programs: int
    reason: str  # what was measured, on what, or "predicted" and from what


# "Predicted": from offline compilation (`python -m benchmarks.aot`), no GPU has measured it yet.
FOUR_LOADS = "four loads in flight a thread: no spills on sm_80, sm_90, sm_100 and gfx942"
CHOICES = (
    Choice("interpreter", math.inf, 32, 4, 2, "small blocks: short rows make many iterations"),
    Choice(
        *("", 128 * 1024, 256, 4, 2),
        f"predicted: as below, with twice as many rows of half as many bytes; {FOUR_LOADS}",
    ),
    Choice(
        *("", math.inf, 512, 4, 1),
        "predicted: the gradient's read should hit L2 (H200: 60 MB in two halves), and 132 rows of "
        f"304 KB are 40 MB; {FOUR_LOADS}",
    ),
)


def tiling(V, itemsize, device):
    """Block sizes for rows of V columns; a warp of 64 lanes counts as two."""
    for choice in CHOICES:
        fits = device.architecture.startswith(choice.architecture)
        if fits and V * itemsize <= choice.row_bytes:
            warps = choice.threads // device.warp_size
            return Tiling(warps, choice.unroll, choice.programs)
