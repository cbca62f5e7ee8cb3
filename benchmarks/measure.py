"""Time, peak memory and error of steps; a step is a function without arguments."""

import contextlib
import ctypes
import importlib.metadata
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
import torch._dynamo

from benchmarks.peers import DISTRIBUTIONS
from grpo_fused.kernels.objective import HAS_TRITON, jit, tl

if HAS_TRITON:
    import triton

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
FLUSHES = 8  # longer on the device than a step takes to launch
WORDS_PER_PROGRAM = 8192
RESIDENT_RUNS = 3
M_MMAP_THRESHOLD = -3  # of malloc.h
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def environment(device):
    """Device, versions and commit (None: there is none), and threads, for `extra_info`."""
    return {
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if HAS_TRITON else None,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "peers": {name: version(name) for name in DISTRIBUTIONS},
    }


def _commit():
    """Name of the commit, or None where there is no git or no repository."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() or None


def version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def count_launches(step):
    """Kernels and copies that a step starts on the GPU."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


class Compilations:
    """Counts, while active, compiled Triton kernels and graphs of `torch.compile`."""

    def __enter__(self):
        self.kernels, self.graphs_before = 0, self._graphs()
        if HAS_TRITON:
            self.hook = triton.knobs.runtime.jit_post_compile_hook
            triton.knobs.runtime.jit_post_compile_hook = self._count
        return self

    def __exit__(self, *error):
        if HAS_TRITON:
            triton.knobs.runtime.jit_post_compile_hook = self.hook

    def _count(self, **variant):
        self.kernels += 1

    @staticmethod
    def _graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    @property
    def count(self):
        """Since the start."""
        return self.kernels + self._graphs() - self.graphs_before


def peak_bytes(step, device, prepare=lambda: None):
    """Peak memory of `step`, in addition to the memory in use after `prepare`.

    On a CPU this is resident memory, the minimum of a few runs: the C library keeps a varying part
    of freed memory.
    """
    if device == "cpu":
        return min(_resident_peak(step, prepare) for _ in range(RESIDENT_RUNS))
    prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def keep_no_freed_memory():
    """From now on allocations of 1 MiB and more are mapped, and unmapped when they are freed.

    The C library would raise that limit to 32 MiB, and keep smaller pieces.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _resident_peak(step, prepare):
    prepare()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")  # the high-water mark falls to the present size
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def _status_bytes(name):
    """A figure of /proc/self/status: resident memory of this process."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return next(1024 * int(words[1]) for words in lines if words[0] == f"{name}:")


def check_peak_bytes(device):
    """Assert `peak_bytes` of a step with a known peak: 48 MiB kept, 64 and then 32 on top."""

    def step():
        kept = torch.ones(48 << 20, dtype=torch.uint8, device=device)
        for size in (64 << 20, 32 << 20):
            torch.ones(size, dtype=torch.uint8, device=device)
        del kept

    measured, held = peak_bytes(step, device), 112 << 20
    slack = 1 << 20  # CUDA's allocator leaves the end of a block, the system counts in batches
    assert abs(measured - held) <= slack, f"peak_bytes measured {measured}, held were {held}"


def _device_seconds(step, flush):
    """Seconds of `step` on the GPU, caches cold.

    The host is not waited for: what it launches queues up behind the flushes.
    """
    for _ in range(FLUSHES):
        flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _wall_seconds(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def rounds_within(seconds, steps, prepare, least, most):
    """How many rounds of all steps fit, after a warm-up round."""
    for _ in range(2):
        start = time.perf_counter()
        for step in steps.values():
            prepare()
            step()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        duration = time.perf_counter() - start
    return max(least, min(most, int(seconds / duration)))


def interleave(benchmark, steps, prepare, device, rounds, warmup_rounds=1):
    """Time steps {name: step} alternately, A, B, A, B, ..., so that drift changes all of them.

    pytest-benchmark times the first, the others run in its setup. On a GPU the first runs there
    too, for its device time: the fixture then has the wall time from an idle device.

    Args:
        prepare: called before every step, not timed.

    Returns:
        {name: (median in seconds, interquartile range over median)}.
    """
    first = next(iter(steps))
    seconds = {name: [] for name in steps}
    flush = None
    if device != "cpu":
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def run(name):
        prepare()
        step = steps[name]
        seconds[name].append(
            _wall_seconds(step) if device == "cpu" else _device_seconds(step, flush)
        )

    def setup():
        for name in steps:
            if name != first or device != "cpu":
                run(name)
        prepare()
        if device != "cpu":
            torch.cuda.synchronize()

    def target():
        if device == "cpu":
            seconds[first].append(_wall_seconds(steps[first]))
        else:
            steps[first]()
            torch.cuda.synchronize()

    benchmark.pedantic(target, setup=setup, rounds=rounds, warmup_rounds=warmup_rounds)
    return {name: _summary(times[-rounds:]) for name, times in seconds.items()}


def _summary(times):
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return median, (high - low) / median


def relative_error(got, want):
    """Norm of the difference over the norm of `want`, both sequences of tensors."""
    difference = total = 0.0
    for g, w in zip(got, want, strict=True):
        difference += (g.double() - w).square().sum().item()
        total += w.square().sum().item()
    return (difference / total) ** 0.5


@jit
def _read_kernel(words_ptr, sums_ptr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    words = tl.load(words_ptr + program * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums_ptr + program, tl.sum(words, axis=0))


def floors(logits):
    """Steps that only read, and only copy, memory of the size of the logits.

    On a GPU to less than a program's share, 32 KB.
    """
    values = logits.detach().flatten()
    copy = torch.empty_like(values)
    steps = {"copy": lambda: copy.copy_(values)}
    if logits.device.type == "cpu":
        floats = values[: values.numel() // 2 * 2].view(torch.float32)
        return steps | {"read": lambda: floats.sum()}
    programs = logits.nbytes // (4 * WORDS_PER_PROGRAM)
    words = values[: programs * WORDS_PER_PROGRAM * 4 // logits.itemsize].view(torch.int32)
    sums = torch.empty(programs, dtype=torch.int32, device=logits.device)

    def read():
        _read_kernel[(programs,)](words, sums, BLOCK=WORDS_PER_PROGRAM, num_warps=8)

    return steps | {"read": read}
