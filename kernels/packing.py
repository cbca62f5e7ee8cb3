"""Where the sequences of a packed batch lie: found on the device, in one small launch."""

import triton.language as tl

from . import launch
from .library import launcher

BLOCK = 1024


@launch.kernel
def _locate_kernel(
    cu_seqlens_ptr,
    sequences: tl.int32,
    tokens: tl.int32,
    active_ptr,
    index_ptr,
    counts_ptr,
    BLOCK: tl.constexpr,
):
    """One program a sequence. Its tokens are counted as far as they exist; the first and the last
    sequence also take those outside of all, so that every token gets a number, whatever the ends.
    """
    sequence = tl.program_id(0)
    start = tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0).to(tl.int32)
    stop = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), tokens).to(tl.int32)
    first = tl.where(sequence == 0, 0, start)
    last = tl.where(sequence == sequences - 1, tokens, stop)
    count = tl.zeros((BLOCK,), tl.float32)
    for begin in range(first, last, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        tl.store(index_ptr + token, sequence.to(tl.int64), token < last)
        counted = (token >= start) & (token < stop)
        if active_ptr is not None:
            counted = counted & (tl.load(active_ptr + token, counted, 0) != 0)
        count += counted.to(tl.float32)
    tl.store(counts_ptr + sequence, tl.sum(count))


@launcher
def locate(cu_seqlens, active, index, counts):
    """Write which sequence every token belongs to, and how many active tokens each has.

    Args:
        cu_seqlens: (B + 1,) int32 or int64, contiguous, B > 0; what lies outside of [0, N] is cut.
        active: (1, N) contiguous, nonzero = active, or None: all are.
        index: (N,) int64.
        counts: (B,) float32.
    """
    with launch.on_device(index):
        launch.launch(
            _locate_kernel,
            len(counts),
            cu_seqlens,
            len(counts),
            len(index),
            active,
            index,
            counts,
            BLOCK=BLOCK,
            num_warps=4,
        )
