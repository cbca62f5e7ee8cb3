"""Time and peak memory of ours and of the others, measured in turns, into a case's `extra_info`."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks import measure

ROUNDS = 15


def attempt(function):
    """(what it returns, None), or (None, why there is nothing): others may fail, ours may not."""
    try:
        return function(), None
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:
        reason = f"failed: {type(error).__name__}"
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None, reason


def peaks(build, device):
    """{name: figures} of `build()`'s steps: peak memory, or the reason why there is none."""
    measure.check_peak_bytes(device)
    _, steps, prepare = build()
    figures = {}
    for name, step in steps.items():
        peak, reason = attempt(lambda s=step: measure.peak_bytes(s, device, prepare))
        figures[name] = {"peak_bytes": peak} if reason is None else reason
        prepare()
    return figures


def peaks_in_new_process(build, device):
    """`peaks` where nothing was allocated before and all that is freed goes back to the system.

    Here the C library keeps what was freed, to be fast, and that is left alone because it is timed:
    after four cases the 112 MiB of `check_peak_bytes` were 144, eager's 262 MB of loss and gradient
    over float32 logits between 491 and 655.
    """
    context = multiprocessing.get_context("spawn")
    keep_nothing = measure.keep_no_freed_memory
    with ProcessPoolExecutor(1, mp_context=context, initializer=keep_nothing) as pool:
        return pool.submit(peaks, build, device).result()


def record(benchmark, case, device, build, make_floors):
    """Measure the steps, the first of them ours, and the floors; figures go into `extra_info`.

    Args:
        build: returns (batch, {name: step}, prepare); what `pickle` takes. A step is a function
            without arguments, `prepare` runs before each.
        make_floors: batch -> {name: step}.

    Returns:
        (batch, {name: seconds} of what ran).
    """
    figures = (peaks_in_new_process if device == "cpu" else peaks)(build, device)
    batch, steps, prepare = build()
    ours = next(iter(steps))
    steps = {name: step for name, step in steps.items() if not isinstance(figures[name], str)}
    assert ours in steps, f"{ours}: {figures[ours]}"
    times = measure.interleave(benchmark, steps | make_floors(batch), prepare, device, ROUNDS)
    for name in steps:
        figures[name] |= {"ms": 1e3 * times[name][0], "spread": times[name][1]}
    info = measure.environment(device) | {"case": case, "providers": figures}
    info["peak_bytes"] = figures[ours]["peak_bytes"]
    if "eager" in steps:
        info["ratio_time_over_eager"] = figures[ours]["ms"] / figures["eager"]["ms"]
        info["ratio_memory_over_eager"] = info["peak_bytes"] / figures["eager"]["peak_bytes"]
    benchmark.extra_info.update(info)
    return batch, {name: seconds for name, (seconds, _) in times.items()}
