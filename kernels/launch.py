"""How a kernel is launched: alignment, the grid, and the block sizes of `tiling`."""

import contextlib
import functools
import inspect
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .tiling import Device, programs_per_row, tiling

INTERPRETED = triton.knobs.runtime.interpret
REGISTERS = 65_536  # of an NVIDIA multiprocessor, from sm_80 to sm_100


def kernel(function):
    """`triton.jit` for kernels: only constexprs, types and None make a new variant.

    Not the value 1, not a multiple of 16, not the alignment of a pointer: what changes from batch
    to batch must not compile again.
    """
    parameters = inspect.signature(function).parameters.values()
    values = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=values, do_not_specialize_on_alignment=values)


@functools.cache
def device_of(index):
    """Facts about the current CUDA or ROCm device, `index` being its number (the cache's key)."""
    if INTERPRETED:
        return Device("interpreter", warp_size=32, multiprocessors=1)
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    architecture = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
    properties = driver.utils.get_device_properties(index or 0)
    return Device(architecture, target.warp_size, properties["multiprocessor_count"])


def vector_width(matrix):
    """Columns per load or store, 128 bits at most, for which every row of a matrix is aligned."""
    itemsize = matrix.element_size()
    return math.gcd(16 // itemsize, matrix.data_ptr() // itemsize, *matrix.stride()[:2])


def store_width(logits, dlogits):
    """Columns per store of the gradient: as many as a load of the logits if both are aligned alike.

    Rows that start anywhere are read from their first whole vector on, wherever that is; the
    gradient, if its rows start as far from whole vectors, is written so too.
    """
    if dlogits is None:
        return 1
    vector = 16 // logits.element_size()
    if vector_width(logits) == vector:
        return vector_width(dlogits)
    apart = [(dlogits.data_ptr() - logits.data_ptr()) // logits.element_size()]
    for size, a, b in zip(logits.shape[:2], logits.stride(), dlogits.stride(), strict=False):
        apart.append(a - b if size > 1 else 0)
    return vector if all(n % vector == 0 for n in apart) else 1


def argument(value):
    """A number or tensor of (), (B,) or (B, T), as `online_softmax.token_value` reads it."""
    if not isinstance(value, torch.Tensor):
        return None if value is None else (float(value),)
    # A float: the interpreter of Triton 3.7 takes no bool in a tuple, and integers are specialised.
    return (value, float(value.dim() == 1)) if value.dim() else (value,)


def on_device(tensor):
    """Context in which kernels are launched on the device that holds `tensor`."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


class Traffic(NamedTuple):
    """Bytes of logits and their gradient that a launch moves at most: masked rows are not read."""

    read: int
    written: int


def launch(function, programs, *args, traffic=None, **options):
    """Launch a one-dimensional grid. The only place that does, so that offline compilation and
    counting (of launches, and of `traffic`) can stand in for it.
    """
    function[(programs,)](*args, **options)


def sharing(logits):
    """How programs share a row: (as many as it has segments, slots for what each finds, lanes of a
    slot), or None: there are rows enough, every program has some of its own.
    """
    sequences, positions, V = logits.shape
    with on_device(logits):
        device = device_of(logits.device.index)
    tile = tiling(V, logits.element_size(), device)
    vector = 16 // logits.element_size()
    lanes = tile.warps * device.warp_size
    segments = math.ceil(V / (tile.segment * tile.unroll * lanes * vector))
    if programs_per_row(sequences * positions, segments, device, tile) == 1:
        return None
    if vector_width(logits) == vector:
        return segments, segments, lanes
    return segments, segments + 1, lanes * vector  # see row_statistics.other_columns


def launch_rows(
    function,
    logits,
    *args,
    writes=False,
    reads=True,
    persistent=False,
    crowd=0,
    parts=None,
    **constexprs,
):
    """Launch a kernel over rows: one program a row, or a grid that fills the device once.

    Args:
        function: kernel whose parameters are logits_ptr and its strides per sequence and position,
            rows (B * L), positions (L), V; then `args`; then the constexprs of the blocks.
        logits: (B, L, V).
        writes: whether it also writes as much; a row's second read hits the caches.
        reads: whether it reads logits that no launch just before it has read.
        persistent: whether the kernel loops over rows in steps of the number of programs.
        crowd: how many times the programs of the table must find registers; 0: not bounded.
        parts: programs per row, the last of `args`, for a kernel that knows segments.
        constexprs: the kernel's own flags.
    """
    sequences, positions, V = logits.shape
    rows = sequences * positions
    if rows == 0:
        return
    with on_device(logits):
        device = device_of(logits.device.index)
        tile = tiling(V, logits.element_size(), device)
        programs = rows
        if parts is not None:
            programs *= parts
            args = (*args, parts)
            constexprs["SEGMENT"] = tile.segment
        if persistent:
            programs = min(programs, device.multiprocessors * tile.programs_per_multiprocessor)
        vector = 16 // logits.element_size()
        ends = vector_width(logits) < vector
        tight = ends or (parts or 1) > 1 or logits.element_size() == 2
        if crowd and tight and device.architecture.startswith("sm_"):
            # Left alone, ptxas spills a few values to make room for more programs than the grid
            # has, or takes so many registers that half as many programs fit. float32 fits anyway.
            resident = tile.warps * device.warp_size * tile.programs_per_multiprocessor
            constexprs["maxnreg"] = REGISTERS // (resident * (1 if ends else crowd))
        launch(
            function,
            programs,
            *(logits, *logits.stride()[:2]),
            *(rows, positions, V),
            *args,
            THREADS=tile.warps * device.warp_size,
            UNROLL=tile.unroll,
            VECTOR=vector,
            COLUMNS=vector if ends else math.gcd(V, vector),
            ENDS=ends,
            num_warps=tile.warps,
            enable_fp_fusion=True,
            traffic=Traffic(logits.nbytes * reads, logits.nbytes * writes),
            **constexprs,
        )


def gradient_arguments(dlogits):
    """Pointer and strides of the gradient (B, L, V), or of none."""
    return (None, 0, 0) if dlogits is None else (dlogits, *dlogits.stride()[:2])


def launch_single(function, tensor, *args, **options):
    """Launch one program on the device of a tensor, for what is too small to share."""
    with on_device(tensor):
        launch(function, 1, *args, **options)
