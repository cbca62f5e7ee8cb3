"""Which block sizes a launch takes: one table, the first row that fits.

Block sizes and segments decide in which order a row's columns are added up, so they never depend on
the number of rows. That only says how many programs share the rows, `programs` per multiprocessor
at most, and whether several share each of them.
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
    segment: int
    sharing: float


class Choice(NamedTuple):
    """For an architecture that starts so, and rows of so many bytes (V x dtype) at most."""

    architecture: str
    row_bytes: float
    threads: int
    unroll: int
    programs: int  # per multiprocessor
    segment: int  # blocks in a part of a row that a program may have for itself
    sharing: float  # what merging such parts costs, in the time of a row
    reason: str  # what was measured, on what, or "predicted" and from what


# "Predicted": from offline compilation (`python -m benchmarks.aot`), no GPU has measured it yet.
FOUR_LOADS = "four loads in flight a thread: no spills on sm_80, sm_90, sm_100 and gfx942"
SHARING = (
    "segments of 64 KB cost 0.1 instructions per element; a row of 300 KB takes 19 us of latency, "
    "another launch and the merge 4"
)
NEVER = math.inf
CHOICES = (
    Choice(
        *("interpreter", math.inf, 32, 4, 2, 2, NEVER),
        "small blocks: short rows make many iterations",
    ),
    Choice(
        *("", 128 * 1024, 256, 4, 2, 4, 0.3),
        f"predicted: as below, with twice as many rows of half as many bytes; {FOUR_LOADS}",
    ),
    Choice(
        *("", math.inf, 512, 4, 1, 2, 0.3),
        "predicted: the gradient's read should hit L2 (H200: 60 MB in two halves), and 132 rows of "
        f"304 KB are 40 MB; {FOUR_LOADS}; {SHARING}",
    ),
)


def tiling(V, itemsize, device):
    """Block sizes for rows of V columns; a warp of 64 lanes counts as two."""
    for choice in CHOICES:
        fits = device.architecture.startswith(choice.architecture)
        if fits and V * itemsize <= choice.row_bytes:
            warps = choice.threads // device.warp_size
            return Tiling(warps, choice.unroll, *choice[4:7])


def programs_per_row(rows, segments, device, tile):
    """1, or one for every segment if the device is done sooner, counted in rounds of programs."""
    resident = device.multiprocessors * tile.programs_per_multiprocessor
    alone = math.ceil(rows / resident)
    shared = math.ceil(rows * segments / resident) / segments + tile.sharing * alone
    return segments if segments > 1 and shared < alone else 1
