"""Predicted times of our kernels on GPUs, from a model of one row per program.

    python -m benchmarks.report --gpus

A persistent program reads its row, computes the loss, reads the row again from L2 and writes the
gradient. It moves nothing while it waits for memory before the first block of a row, and while it
computes between the two passes:

    time = waves (bytes of a wave / bandwidth + EXPOSED idle) + launches

with waves = rows / (multiprocessors x programs), rounded up. Log-probabilities run one program per
row, and the next starts where one ends: their waves are not rounded. A head adds the pass over its
logits, and float32 sums for the weight's gradient, to its matmuls. No step is faster than the host
issues it. The floor is the bytes over the bandwidth, or the matmuls.

No constant here was measured on our kernels: `benchmarks.report` marks predictions as such, and
shows measurements in their place once there are any.
"""

import math
from typing import NamedTuple

from benchmarks.cases import CUDA_FEW, FULL, HALF

# Of a program and row: the latency of DRAM twice, for the values of its token and for the first
# block of the row, and 500 cycles for sums over threads and the loss.
IDLE_CYCLES = 2 * 750 + 500
EXPOSED = 0.5  # the share of it in which the other programs do not keep DRAM busy
LAUNCH = 2.5e-6  # seconds from the end of a small kernel to the start of the next
SMALL_LAUNCHES = 3  # of a loss besides its pass: weights, sums, rescaling
# Seconds of Python, autograd and launches, see `benchmarks.overhead`.
HOST_LOSS, HOST_LOGPS = 150e-6, 60e-6


class GPU(NamedTuple):
    """Public figures of a GPU; bandwidths as copies and matmuls reach them, 90 and 80 % of peak."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second
    flops: float  # per second, bfloat16


GPUS = (
    GPU("A100", 108, 1.41e9, 0.9 * 2.04e12, 0.8 * 312e12),
    GPU("H100", 132, 1.755e9, 0.9 * 3.35e12, 0.8 * 989e12),
    GPU("H200", 132, 1.755e9, 0.9 * 4.8e12, 0.8 * 989e12),
    GPU("B200", 148, 1.85e9, 0.9 * 8.0e12, 0.8 * 2250e12),
)


class Row(NamedTuple):
    """A row of the GPU table: a case of `cases.CUDA` or of `bench_linear`, in bfloat16."""

    title: str  # of the case, without its dtype
    rows: int  # padded
    active: int
    V: int
    H: int | None = None


def _row(title, V, lengths=FULL, H=None):
    return Row(title, len(lengths) * max(lengths), sum(lengths), V, H)


IN_PLACE, LOGPS, HEAD = (
    "loss and gradient in place",
    "log-probabilities",
    "head, loss and gradients",
)
ROWS = (
    *(_row(IN_PLACE, V) for V in (32_000, 50_257, 128_256, 151_936, 262_144)),
    _row("loss and gradient, 45 % active", 151_936, HALF),
    _row("loss and gradient, few rows", 151_936, CUDA_FEW),
    *(_row(LOGPS, V) for V in (32_000, 128_256, 151_936)),
    _row("log-probabilities, entropies", 151_936),
    *(_row(HEAD, V, H=4096) for V in (128_256, 151_936)),
)


def floor(gpu, row):
    """Seconds of the bytes, or of the matmuls, that no implementation avoids."""
    if row.H is not None:
        return 6 * row.active * row.H * row.V / gpu.flops
    passes = row.active + row.rows * ("loss" in row.title)  # masked rows of a gradient are written
    return 2 * row.V * passes / gpu.bandwidth


def seconds(gpu, row):
    """Predicted time of a whole step of ours."""
    if row.H is not None:
        loss = seconds(gpu, row._replace(title=IN_PLACE, H=None))
        loss += 2 * row.V * row.active / gpu.bandwidth  # logits are float32, their gradient is not
        chunks = math.ceil(6 * row.active * row.V / 2**31)
        sums = 8 * row.V * row.H * (chunks - 1) / gpu.bandwidth  # read and written in float32
        return floor(gpu, row) + loss + sums
    resident = gpu.multiprocessors * (2 if 2 * row.V <= 128 * 1024 else 1)  # launch.CHOICES
    if "loss" in row.title:
        waves = math.ceil(row.active / resident)
        transfer = floor(gpu, row) * waves * resident / row.active
        host, launches = HOST_LOSS, SMALL_LAUNCHES * LAUNCH
    else:
        waves = row.active / (2 * resident)  # min_blocks_per_sm = 2
        transfer, host, launches = floor(gpu, row), HOST_LOGPS, 0.0
    idle = waves * EXPOSED * IDLE_CYCLES / gpu.clock
    return max(transfer + idle + launches, host)


def ratio(gpu, row):
    """Predicted time over the floor."""
    return seconds(gpu, row) / floor(gpu, row)
