"""Time and peak memory of ours and of the others, measured in turns, into a case's `extra_info`."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks import measure
from benchmarks.providers import NotSupported

ROUNDS, SECONDS = (5, 15), 6  # of a case: rounds as many as fit, within bounds
REASON_LENGTH = 100


def attempt(function):
    """(what it returns, None), or (None, why there is nothing): others may fail, ours may not."""
    try:
        return function(), None
    except NotSupported as error:
        reason = f"not supported: {error}"
    except ModuleNotFoundError as error:
        reason = f"not installed: {error.name}"
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:
        message = str(error).strip().splitlines() or [""]
        reason = f"failed: {type(error).__name__}: {message[0]}"[:REASON_LENGTH]
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None, reason


def errors_of(functions, error):
    """{name: error of a function, or why there is none}; the first, ours, is not excused."""
    ours = next(iter(functions))
    found = {ours: error(functions[ours])}
    for name, function in list(functions.items())[1:]:
        value, reason = attempt(lambda f=function: error(f))
        found[name] = value if reason is None else reason
    return found


def peaks(build, device, refused=None):
    """{name: figures} of `build()`'s steps: peak memory, or the reason why there is none."""
    measure.check_peak_bytes(device)
    _, steps, prepare = build()
    figures = {}
    for name, step in steps.items():
        peak, reason = None, (refused or {}).get(name)
        if reason is None:
            peak, reason = attempt(lambda s=step: measure.peak_bytes(s, device, prepare))
            prepare()
        figures[name] = {"peak_bytes": peak} if reason is None else reason
    return figures


def peaks_in_new_process(build, device, refused=None):
    """`peaks` where nothing was allocated before and all that is freed goes back to the system.

    Here the C library keeps what was freed, to be fast, and that is left alone because it is timed:
    after four cases the 112 MiB of `check_peak_bytes` were 144, eager's 262 MB of loss and gradient
    over float32 logits between 491 and 655.
    """
    context = multiprocessing.get_context("spawn")
    keep_nothing = measure.keep_no_freed_memory
    with ProcessPoolExecutor(1, mp_context=context, initializer=keep_nothing) as pool:
        return pool.submit(peaks, build, device, refused).result()


def record(benchmark, case, device, build, make_floors, errors=None):
    """Measure the steps, the first of them ours, and the floors; figures go into `extra_info`.

    Args:
        errors: {name: error, or why there is none} of `errors_of`: who could not run there is not
            asked again, the others' errors stand beside their figures.
        build: returns (batch, {name: step}, prepare); what `pickle` takes. A step is a function
            without arguments, `prepare` runs before each.
        make_floors: batch -> {name: step}.

    Returns:
        (batch, {name: seconds} of what ran).
    """
    errors = errors or {}
    refused = {name: reason for name, reason in errors.items() if isinstance(reason, str)}
    figures = (peaks_in_new_process if device == "cpu" else peaks)(build, device, refused)
    batch, steps, prepare = build()
    ours = next(iter(steps))
    steps = {name: step for name, step in steps.items() if not isinstance(figures[name], str)}
    assert ours in steps, f"{ours}: {figures[ours]}"
    timed = steps | make_floors(batch)
    rounds = measure.rounds_within(SECONDS, timed, prepare, *ROUNDS)
    times = measure.interleave(benchmark, timed, prepare, device, rounds)
    for name, step in steps.items():
        figures[name] |= {"ms": 1e3 * times[name][0], "spread": times[name][1]}
        if name in errors:
            figures[name]["error"] = errors[name]
        if device != "cpu":
            figures[name]["launches"] = measure.count_launches(step)
    info = measure.environment(device) | {"case": case, "providers": figures}
    info["peak_bytes"] = figures[ours]["peak_bytes"]
    if "eager" in steps:
        info["ratio_time_over_eager"] = figures[ours]["ms"] / figures["eager"]["ms"]
        info["ratio_memory_over_eager"] = info["peak_bytes"] / figures["eager"]["peak_bytes"]
    benchmark.extra_info.update(info)
    return batch, {name: seconds for name, (seconds, _) in times.items()}
