"""Measure block sizes on this GPU, and print rows for the table in `kernels/tiling.py`.

    python -m benchmarks.tune --vocabulary 151936 --dtype bfloat16 [--rows 8192 64]

Timed is the loss with its gradient, in place; logits are restored and the L2 cache flushed outside
of that. A choice is held to float64 first. Block sizes are the fastest at most rows; what sharing a
row costs is found at fewest.
"""

import argparse
import contextlib
import itertools
import math
import statistics
import sys

import torch

from benchmarks import measure, providers
from grpo_fused import Clip
from grpo_fused.kernels import launch, launchers, tiling

SEGMENT_BYTES, RESIDENT_THREADS = 64 << 10, 2048
GRADIENT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def candidates():
    """Every choice worth a measurement, for rows of any length; a program for every row."""
    for threads, unroll, programs in itertools.product((256, 512, 1024), (2, 4, 8), (1, 2, 3, 4)):
        if threads * programs <= RESIDENT_THREADS:
            segment = max(1, SEGMENT_BYTES // (threads * unroll * 16))
            sizes = (threads, unroll, programs, segment, tiling.NEVER)
            yield tiling.Choice("", math.inf, *sizes, "")


@contextlib.contextmanager
def chosen(choice):
    before, tiling.CHOICES = tiling.CHOICES, (choice,)
    try:
        yield
    finally:
        tiling.CHOICES = before


def make_batch(rows, V, dtype, device):
    """(logits (1, rows, V), ids, mask, advantages, old_logps), all rows active."""
    generator = torch.Generator(device).manual_seed(rows)
    logits = 2 * torch.randn(1, rows, V, dtype=dtype, device=device, generator=generator)
    ids = torch.randint(V, (1, rows), device=device, generator=generator)
    old_logps = torch.full((1, rows), -math.log(V), device=device)
    mask, advantages = torch.ones_like(old_logps), torch.ones(1, device=device)
    return logits, ids, mask, advantages, old_logps


def step_of(logits, ids, mask, advantages, old_logps):
    """What is timed: it turns the logits into the gradient of GRPO's loss."""
    terms, logps = torch.empty(4, *ids.shape, device=ids.device), torch.empty_like(old_logps)
    objective = Clip(providers.EPSILON)
    return lambda: launchers.fused_loss(
        *(logits, ids, None, advantages, old_logps, None, None, None),
        *(float(ids.numel()), 1.0, 1.0, 1.0, None, None, 1.0, 1.0, None, 0.0, 1.0),
        *(objective.name(), objective.knobs(), "k3", False, terms, logps, None, logits),
    )


def check(V, dtype, device):
    batch = make_batch(16, V, dtype, device)
    want = list(providers.exact_gradients(*batch))
    step_of(*batch)()
    error = measure.relative_error(batch[0], want)
    assert error < GRADIENT_ERROR[dtype], f"gradient is off by {error:.1e}"


def device_timer(step, prepare):
    flush = torch.empty(measure.FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = [prepare() or measure._device_seconds(step, flush) for _ in range(17)]
    return statistics.median(times[2:])


def time_choice(choice, V, dtype, rows, device, timer):
    """Seconds of a choice that is right, None if it does not fit into the device."""
    batch = make_batch(rows, V, dtype, device)
    source = batch[0].clone()

    def restore():
        batch[0].copy_(source)

    with chosen(choice), contextlib.suppress(launch.triton.runtime.errors.OutOfResources):
        check(V, dtype, device)
        return timer(step_of(*batch), restore)


def sharing_cost(alone, shared, rows, segments, resident):
    """`Choice.sharing` that explains the seconds of rows alone and shared."""
    rounds = math.ceil(rows / resident)
    return max(0.01, shared / alone - math.ceil(rows * segments / resident) / segments / rounds)


def tune(V, dtype, rows, device, timer, choices):
    """[(seconds, choice)] at most of the rows, fastest first; at fewest, its `sharing` measured."""
    most, fewest = max(rows), min(rows)
    timed = [(time_choice(choice, V, dtype, most, device, timer), choice) for choice in choices]
    ranking = sorted((pair for pair in timed if pair[0]), key=lambda pair: pair[0])
    best = ranking[0][1]
    hardware = launch.device_of(torch.cuda.current_device() if device == "cuda" else None)
    segments = math.ceil(V * dtype.itemsize / (best.segment * best.unroll * best.threads * 16))
    if segments > 1 and fewest < most:
        alone, shared = (
            time_choice(best._replace(sharing=cost), V, dtype, fewest, device, timer)
            for cost in (tiling.NEVER, -math.inf)
        )
        resident = hardware.multiprocessors * best.programs
        cost = sharing_cost(alone, shared, fewest, segments, resident)
        ranking[0] = (ranking[0][0], best._replace(sharing=round(cost, 2)))
    return [
        (t, choice._replace(architecture=hardware.architecture, row_bytes=V * dtype.itemsize))
        for t, choice in ranking
    ]


def source(seconds, choice, rows, where):
    """A row for CHOICES, in front of the more general ones."""
    sharing = "NEVER" if choice.sharing == tiling.NEVER else choice.sharing
    speed = 2 * choice.row_bytes * rows / seconds / 1e9
    reason = f"measured on {where}: {rows} rows in {1e3 * seconds:.3f} ms, {speed:.0f} GB/s"
    sizes = ", ".join(map(str, choice[1:6]))
    return f'Choice(\n    *("{choice.architecture}", {sizes}, {sharing}),\n    "{reason}",\n),'


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 128_256, 151_936])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 64])
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.tune measures a GPU, and there is none here.", file=sys.stderr)
        return 2
    where = "{device}, torch {torch}, Triton {triton}".format(**measure.environment("cuda"))
    dtype = getattr(torch, options.dtype)
    for V in options.vocabulary:
        ranking = tune(V, dtype, options.rows, "cuda", device_timer, list(candidates()))
        for seconds, choice in ranking:
            print(f"# {1e3 * seconds:8.3f} ms  {choice[2:6]}")
        print(source(*ranking[0], max(options.rows), where))
    return 0


if __name__ == "__main__":
    sys.exit(main())
