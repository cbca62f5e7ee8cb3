"""Time and peak memory of all providers of a case, measured alternately, for its `extra_info`."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from benchmarks import measure
from benchmarks.providers import NotSupported

ROUNDS, SECONDS = (5, 15), 6  # of a case: bounds on the rounds, and the time that they should take
REASON_LENGTH = 100


def attempt(function):
    """(result, None), or (None, reason) if the function fails.

    Raises:
        FailOnRecompileLimitHit: a function was to run eagerly where it should be compiled.
    """
    try:
        return function(), None
    except FailOnRecompileLimitHit:
        raise
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
    """{name: error of a function, or the reason why there is none}; the first, ours, must run."""
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
    """`peaks` in a process without earlier allocations; it returns freed memory to the system.

    In the timed process the C library keeps freed memory: after four cases the 112 MiB of
    `check_peak_bytes` were 144, eager's 262 MB of loss and gradient over float32 logits between 491
    and 655.
    """
    context = multiprocessing.get_context("spawn")
    keep_nothing = measure.keep_no_freed_memory
    with ProcessPoolExecutor(1, mp_context=context, initializer=keep_nothing) as pool:
        return pool.submit(peaks, build, device, refused).result()


def record(benchmark, case, device, build, make_floors, errors=None):
    """Measure the steps, the first of them ours, and the floors; figures go into `extra_info`.

    Args:
        errors: {name: error or reason} of `errors_of`. Providers with a reason are not measured;
            the errors of the others are recorded with their figures.
        build: picklable, returns (batch, {name: step}, prepare). A step is a function without
            arguments; `prepare` runs before each.
        make_floors: batch -> {name: step}.

    Returns:
        (batch, {name: seconds} of the steps that ran).
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
