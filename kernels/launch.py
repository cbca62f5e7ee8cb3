"""Launches: the one call into Triton, block sizes from one table, arguments that never recompile.

Triton compiles a kernel again for every new combination of what it specialises on. Inside a tuple
these are integers and the 16-byte alignment of pointers, even with `do_not_specialize` (Triton 3.6
to 3.9). So integers stay outside of bundles, and `arguments` copies misaligned tensors.
"""

import contextlib
import functools
import inspect
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
REGISTERS = 65_536  # of an NVIDIA multiprocessor, sm_80 to sm_100
ALIGNMENT = 16  # bytes
ROW_PADDING = 8  # columns, to which `head.chunks.logits_memory` rounds the length of a row
ON_HOST = contextlib.nullcontext()


class Device(NamedTuple):
    """What block sizes depend on: "sm_90", "gfx942", ... or "interpreter"."""

    architecture: str
    warp_size: int
    multiprocessors: int


class Choice(NamedTuple):
    """Block sizes for an architecture with this prefix and rows of at most `row_bytes`."""

    architecture: str
    row_bytes: float  # V times the size of an element
    threads: int
    unroll: int  # 128-bit loads in flight per thread
    programs: int  # resident per multiprocessor
    reason: str


class Blocks(NamedTuple):
    """Block sizes, a constexpr of every kernel over rows.

    A block has UNROLL x THREADS x VECTOR columns. VECTOR columns are one load of a thread: 128
    bits, or fewer if some row of the logits is not aligned to that. Rows of the gradient are
    aligned to STORE_VECTOR columns, which do not affect the order of additions. V is a multiple of
    COLUMNS. Rows of a gradient that is not in place are V columns apart, or as many as the next
    multiple of PADDING.
    """

    THREADS: int
    UNROLL: int
    VECTOR: int
    STORE_VECTOR: int
    COLUMNS: int
    PADDING: int


# "Predicted" choices come from offline compilation (`python -m benchmarks.aot`); no GPU has
# measured them. The first match is used.
FOUR_LOADS = "four loads in flight per thread spill nowhere on sm_80, sm_90, sm_100 and gfx942"
CHOICES = (
    Choice("interpreter", math.inf, 32, 4, 2, "small blocks, so that short rows iterate"),
    Choice(
        "", 128 * 1024, 256, 4, 2, f"predicted: twice as many rows of half the bytes; {FOUR_LOADS}"
    ),
    Choice(
        *("", math.inf, 512, 4, 1),
        "predicted: the gradient's second read should hit L2 (H200: 60 MB in two partitions), and "
        f"132 rows of 304 KB are 40 MB; {FOUR_LOADS}",
    ),
)


def kernel(function):
    """`triton.jit` that specialises on constexprs, types and None alone.

    Values of 1, multiples of 16 and the alignment of pointers change from batch to batch and must
    not compile again.
    """
    parameters = inspect.signature(function).parameters.values()
    values = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=values, do_not_specialize_on_alignment=values)


def launch(function, programs, *args, **options):
    """Launch a one-dimensional grid. No other function calls Triton: tools that compile offline,
    count launches or emulate them replace this one.
    """
    function[(programs,)](*args, **options)


@functools.cache
def device_of(index):
    """Facts about the current CUDA or ROCm device; `index`, its number, is the cache's key."""
    if INTERPRETED:
        return Device("interpreter", warp_size=32, multiprocessors=1)
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    architecture = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
    properties = driver.utils.get_device_properties(index or 0)
    return Device(architecture, target.warp_size, properties["multiprocessor_count"])


def on_device(tensor):
    """Context that makes the device of `tensor` current."""
    if tensor.device.type == "cpu":
        return ON_HOST
    return torch.get_device_module(tensor.device).device(tensor.device)


def choose(V, itemsize, device):
    """The first row of CHOICES that fits rows of V columns."""
    for choice in CHOICES:
        fits = device.architecture.startswith(choice.architecture)
        if fits and V * itemsize <= choice.row_bytes:
            return choice


@functools.cache
def _plan(choices, device, V, itemsize, width, store, padding, min_blocks_per_sm):
    """(programs that fill the device once, keywords of a launch) for a kernel over rows.

    Args:
        choices: CHOICES, a key of the cache.
        width, store, padding: `vector_width` of the logits and of the gradient, its row_padding.
        min_blocks_per_sm: as `launch_rows`.
    """
    choice = choose(V, itemsize, device)
    unroll = choice.unroll * (16 // itemsize) // width  # as many columns per thread
    options = {
        "blocks": Blocks(choice.threads, unroll, width, store, math.gcd(V, width), padding),
        "num_warps": choice.threads // device.warp_size,
        "enable_fp_fusion": True,
    }
    if min_blocks_per_sm and itemsize == 2 and device.architecture.startswith("sm_"):
        # ptxas alone spills to fit more programs than the grid has, or takes so many registers
        # that half as many fit. float32 fits anyway.
        resident = choice.threads * choice.programs * min_blocks_per_sm
        options["maxnreg"] = REGISTERS // resident
    return device.multiprocessors * choice.programs, options


def vector_width(matrix):
    """Columns, at most 128 bits, to which every row of a matrix (B, L, V) is aligned."""
    itemsize = matrix.element_size()
    return math.gcd(16 // itemsize, matrix.data_ptr() // itemsize, *matrix.stride()[:2])


def aligned(tensor):
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def row_padding(dlogits, V):
    """1 if rows (B, L, V) are V columns apart, else the multiple that they are rounded up to."""
    if dlogits.stride(1) == V or dlogits.shape[:2].numel() == 1:
        return 1
    if dlogits.stride(1) != -(-V // ROW_PADDING) * ROW_PADDING:
        raise ValueError(f"rows of a gradient must be {V} columns apart, got {dlogits.stride(1)}")
    return ROW_PADDING


def argument(value):
    """A kernel's argument: a float, None, or an aligned tensor: (B, T), (0-d,), or (B,) twice.

    The tuples differ in length, not in their class or by None: Triton's cache compares tuples, and
    NamedTuples with equal fields are equal; Triton 3.6 takes no None in a tuple.
    """
    if not isinstance(value, torch.Tensor):
        return None if value is None else float(value)
    value, dimensions = aligned(value), value.dim()
    return value if dimensions == 2 else (value, value) if dimensions else (value,)


def arguments(bundle):
    """A bundle of inputs as kernels take it."""
    # Most fields are None or a float, which are arguments as they are.
    return bundle._make([v if v is None or type(v) is float else argument(v) for v in bundle])


def launch_rows(function, logits, *args, dlogits=None, persistent=False, min_blocks_per_sm=0):
    """Launch a kernel over the rows of logits: one program per row, or a grid that loops over them.

    Args:
        function: kernel with the parameters logits_ptr, stride_sequence, stride_position, rows
            (B * L), positions (L), V; then `args`; then the constexpr `blocks`.
        logits: (B, L, V).
        dlogits: (B, L, V) that the kernel writes, `logits` itself, or contiguous but for rows that
            are padded to a multiple of ROW_PADDING; None if it writes nothing of that size.
        persistent: whether the kernel loops over rows; the grid then fills the device once.
        min_blocks_per_sm: bound registers so that this many times the resident programs of CHOICES
            fit a multiprocessor; 0 leaves it to the compiler.
    """
    sequences, positions, V = logits.shape
    rows = programs = sequences * positions
    if rows == 0:
        return
    width = vector_width(logits)
    store, padding = width, 1
    if dlogits is not None:
        store = min(width, vector_width(dlogits))
        if dlogits.data_ptr() != logits.data_ptr():
            padding = row_padding(dlogits, V)
    with on_device(logits):
        device = device_of(logits.device.index)
        itemsize = logits.element_size()
        fill, options = _plan(
            CHOICES, device, V, itemsize, width, store, padding, min_blocks_per_sm
        )
        if persistent:
            programs = min(rows, fill)
        shape = (logits, *logits.stride()[:2], rows, positions, V)
        launch(function, programs, *shape, *args, **options)


def launch_small(function, programs, tensor, *args, **options):
    """Launch a kernel over tokens on the device of a tensor."""
    if programs:
        with on_device(tensor):
            launch(function, programs, *args, **options, enable_fp_fusion=True)
