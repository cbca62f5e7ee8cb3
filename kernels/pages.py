"""Memory for what is large: on a CPU pages fresh from the system, large ones where they pay."""

import contextlib
import functools
import math
import mmap
from pathlib import Path

import torch

LARGE_BYTES = 32 << 20  # what is smaller the C library has at hand again
NO_BLOCK = 11  # Linux's MAX_ORDER
REPORTING = Path("/sys/module/page_reporting/parameters/page_reporting_order")


def allocate(shape, dtype, device):
    """Memory of a shape, contiguous, for values that the caller writes.

    Where it has an attribute `untouched` it is zeros, pages of which exist once they are written;
    its storage then cannot be resized.
    """
    pages = None
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and not torch.compiler.is_compiling() and size >= LARGE_BYTES:
        pages = _map(size)
    if pages is None:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = torch.frombuffer(pages, dtype=dtype).view(shape)
    memory.untouched = True
    return memory


def _map(size):
    """Pages of private memory, or None: torch says better what is missing."""
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )
    try:
        pages = mmap.mmap(-1, size, **private)
    except OSError:
        return None
    if hasattr(mmap, "MADV_HUGEPAGE") and not _host_takes_back(REPORTING):
        # To be given 4 KiB at a time takes as long as a loss.
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


@functools.cache
def _host_takes_back(reporting):
    """Whether this is a virtual machine that reports its free blocks to a host, which takes them.

    A page of 2 MiB would then be given 4 KiB at a time all the same, by the host, which is slower.
    Linux shows the order of the blocks that it reports; while nobody listens that is -1 or, in
    older kernels, above that of any block.
    """
    with contextlib.suppress(OSError, ValueError):
        return 0 <= int(reporting.read_text()) < NO_BLOCK
    return False
