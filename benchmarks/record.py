"""Time and peak memory of ours and of the others, measured in turns, into a case's `extra_info`."""

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


def peaks(steps, prepare, device):
    """(steps that ran, {name: figures}): peak memory, or the reason why there is none."""
    ran, figures = {}, {}
    for name, step in steps.items():
        peak, reason = attempt(lambda s=step: measure.peak_bytes(s, device, prepare))
        if reason is None:
            ran[name], figures[name] = step, {"peak_bytes": peak}
        else:
            figures[name] = reason
            prepare()
    return ran, figures


def record(benchmark, case, device, steps, prepare, floors, **info):
    """Measure the steps, the first of them ours, and the floors; figures go into `extra_info`.

    Returns:
        {name: seconds} of what ran.
    """
    measure.check_peak_bytes(device)
    ours = next(iter(steps))
    steps, figures = peaks(steps, prepare, device)
    assert ours in steps, f"{ours}: {figures[ours]}"
    times = measure.interleave(benchmark, steps | floors, prepare, device, ROUNDS)
    for name in steps:
        figures[name] |= {"ms": 1e3 * times[name][0], "spread": times[name][1]}
    info = measure.environment(device) | {"case": case} | info
    info |= {"peak_bytes": figures[ours]["peak_bytes"], "providers": figures}
    if "eager" in steps:
        info["ratio_time_over_eager"] = figures[ours]["ms"] / figures["eager"]["ms"]
        info["ratio_memory_over_eager"] = info["peak_bytes"] / figures["eager"]["peak_bytes"]
    benchmark.extra_info.update(info)
    return {name: seconds for name, (seconds, _) in times.items()}
