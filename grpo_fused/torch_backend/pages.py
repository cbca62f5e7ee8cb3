"""Memory for large tensors on a CPU: fresh pages from the system, large ones where they pay."""

import contextlib
import functools
import math
import mmap
from pathlib import Path

import torch

LARGE_BYTES = 32 << 20  # malloc reuses smaller blocks
NO_BLOCK = 11  # Linux's MAX_ORDER
REPORTING = Path("/sys/module/page_reporting/parameters/page_reporting_order")


def allocate(shape, dtype, device):
    """Contiguous memory for values that the caller writes.

    On a CPU large memory is made of fresh pages; see `is_unwritten`.
    """
    pages = None
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and not torch.compiler.is_compiling() and size >= LARGE_BYTES:
        pages = _map(size)
    if pages is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def is_unwritten(memory):
    """Whether memory from `allocate` is still zero: fresh pages exist once written.

    Memory of torch's own allocator can be resized, fresh pages cannot.
    """
    return not memory.untyped_storage().resizable()


def _map(size):
    """Pages of private memory, or None if there are none: torch's own error says more."""
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )
    try:
        pages = mmap.mmap(-1, size, **private)
    except OSError:
        return None
    if hasattr(mmap, "MADV_HUGEPAGE") and not _host_takes_back(REPORTING):
        # Page faults of 4 KiB take as long as a loss.
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


@functools.cache
def _host_takes_back(reporting):
    """Whether this virtual machine reports its free blocks to a host that takes them back.

    The host then backs a page of 2 MiB with 4 KiB at a time, which is slower than small pages.
    Linux shows the order of the blocks it reports; without a listener that is -1 or, in older
    kernels, above the order of any block.
    """
    with contextlib.suppress(OSError, ValueError):
        return 0 <= int(reporting.read_text()) < NO_BLOCK
    return False
