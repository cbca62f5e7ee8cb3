"""Memory for what is large: on a CPU pages fresh from the system, large ones where they pay."""

import contextlib
import functools
import math
import mmap
from pathlib import Path

import torch

LARGE_BYTES = 32 << 20  # what is smaller the C library has at hand again
REPORTING = Path("/sys/module/page_reporting/parameters/page_reporting_order")


def allocate(shape, dtype, device):
    """Memory of a shape, contiguous, for values that the caller writes.

    Where it has an attribute `untouched` it is zeros, pages of which exist once they are written.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or torch.compiler.is_compiling() or size < LARGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )
    pages = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE") and not _host_takes_back(REPORTING):
        # To be given 4 KiB at a time takes as long as a loss.
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=dtype).view(shape)
    memory.untouched = True
    return memory


@functools.cache
def _host_takes_back(reporting):
    """Whether this is a virtual machine that reports its free blocks to a host, which takes them.

    A page of 2 MiB would then be given 4 KiB at a time all the same, by the host, which is slower.
    Linux has an order of what it reports, not -1, from the moment that somebody listens.
    """
    with contextlib.suppress(OSError, ValueError):
        return int(reporting.read_text()) >= 0
    return False
