"""Measure block sizes on this GPU, and print rows for CHOICES in `kernels/launch.py`.

    python -m benchmarks.tune --vocabulary 151936 --dtype bfloat16 [--rows 4096] [--output FILE]

Times the loss with its gradient, in place; restoring the logits and flushing the L2 cache are not
timed. A choice is timed only if its gradient agrees with float64. Every result is printed, and
appended to FILE as a line of JSON, before the next choice starts.
"""

import argparse
import contextlib
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

import torch

from benchmarks import lines, measure, providers
from grpo_fused import Clip
from grpo_fused.bundles import Formula, Outputs, Scales, Tokens
from grpo_fused.kernels import launch
from grpo_fused.ops import BACKENDS

launchers = BACKENDS["triton"]
THREADS, UNROLL, PROGRAMS = (256, 512, 1024), (2, 4, 8), (1, 2, 3, 4)
RESIDENT_THREADS = 2048  # of a multiprocessor: with so many each has 32 registers, and spills
GRADIENT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def candidates():
    """Every choice worth a measurement, for rows of any length."""
    for threads, unroll, programs in itertools.product(THREADS, UNROLL, PROGRAMS):
        if threads * programs < RESIDENT_THREADS:
            yield launch.Choice("", math.inf, threads, unroll, programs, "")


@contextlib.contextmanager
def chosen(choice):
    before, launch.CHOICES = launch.CHOICES, (choice,)
    try:
        yield
    finally:
        launch.CHOICES = before


def make_batch(rows, V, dtype, device):
    """(logits (1, rows, V), ids, mask, advantages, old_logps), all rows active."""
    generator = torch.Generator(device).manual_seed(rows)
    logits = 2 * torch.randn(1, rows, V, dtype=dtype, device=device, generator=generator)
    ids = torch.randint(V, (1, rows), device=device, generator=generator)
    old_logps = torch.full((1, rows), -math.log(V), device=device)
    mask, advantages = torch.ones_like(old_logps), torch.ones(1, device=device)
    return logits, ids, mask, advantages, old_logps


def step_of(logits, ids, mask, advantages, old_logps):
    """The timed function: it turns the logits into the gradient of GRPO's loss."""
    objective, weight = Clip(providers.EPSILON, providers.EPSILON), 1.0 / ids.numel()
    advantages = advantages.expand_as(old_logps).contiguous()
    tokens = Tokens(ids, None, 1.0, advantages, old_logps, w_policy=weight)
    formula = Formula(objective.name(), objective.params(), "k3", False, 1.0)
    values = [torch.empty_like(old_logps) for _ in range(5)]
    outputs = Outputs(*values, entropies=None, dlogits=logits)
    return lambda: launchers.fused_loss(logits, tokens, Scales(), formula, outputs)


def check(V, dtype, device):
    """Assert that the gradient of the current choice agrees with float64."""
    logits, ids, *tokens = batch = make_batch(16, V, dtype, device)
    exact = providers.exact_logps(logits, ids)
    want = list(providers.exact_gradients(logits, ids, tokens, providers.surrogate, exact))
    step_of(*batch)()
    error = measure.relative_error(logits, want)
    assert error < GRADIENT_ERROR[dtype], f"gradient is off by {error:.1e}"


def device_timer(step, prepare):
    """Median seconds of a step on the GPU, from a cold L2 cache."""
    flush = torch.empty(measure.FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = [prepare() or measure._device_seconds(step, flush) for _ in range(17)]
    return statistics.median(times[2:])


def time_choice(choice, V, dtype, rows, device, timer):
    """Seconds of a choice, None if it does not fit the device."""
    batch = make_batch(rows, V, dtype, device)
    source = batch[0].clone()

    def restore():
        batch[0].copy_(source)

    with chosen(choice), contextlib.suppress(launch.triton.runtime.errors.OutOfResources):
        check(V, dtype, device)
        return timer(step_of(*batch), restore)


def tune(V, dtype, rows, device, timer, choices):
    """Yield (seconds, choice) as soon as it is measured; seconds is None if it does not fit."""
    hardware = launch.device_of(torch.cuda.current_device() if device == "cuda" else None)
    for choice in choices:
        seconds = time_choice(choice, V, dtype, rows, device, timer)
        row_bytes = V * dtype.itemsize
        yield seconds, choice._replace(architecture=hardware.architecture, row_bytes=row_bytes)


def result(seconds, choice, V, dtype, rows):
    """A result as JSON holds it."""
    sizes = {name: getattr(choice, name) for name in ("threads", "unroll", "programs")}
    where = {"architecture": choice.architecture, "V": V, "dtype": dtype, "rows": rows}
    return where | sizes | {"ms": None if seconds is None else 1e3 * seconds}


def source(seconds, choice, rows, where):
    """A row for CHOICES, to be put before the more general ones."""
    speed = 2 * choice.row_bytes * rows / seconds / 1e9
    reason = f"measured on {where}: {rows} rows in {1e3 * seconds:.3f} ms, {speed:.0f} GB/s"
    sizes = ", ".join(map(str, choice[1:5]))
    return f'Choice(\n    *("{choice.architecture}", {sizes}),\n    "{reason}",\n),'


def sweep(V, dtype, rows, device, timer, choices, where, output=None):
    """Print and write the result of every choice, then print the row of the fastest."""
    best = (math.inf, None)
    for seconds, choice in tune(V, dtype, rows, device, timer, choices):
        found = result(seconds, choice, V, str(dtype)[6:], rows)
        print(f"# {json.dumps(found)}", flush=True)
        if output is not None:
            lines.append(output, found | {"where": where})
        if seconds is not None:
            best = min(best, (seconds, choice), key=lambda pair: pair[0])
    if best[1] is not None:
        print(source(*best, rows, where), flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 128_256, 151_936])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--output", type=Path, help="append results to this file, one JSON a line")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.tune measures a GPU, and there is none here.", file=sys.stderr)
        return 2
    where = "{device}, torch {torch}, Triton {triton}".format(**measure.environment("cuda"))
    dtype = getattr(torch, options.dtype)
    for V in options.vocabulary:
        choices = list(candidates())
        sweep(V, dtype, options.rows, "cuda", device_timer, choices, where, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
