"""Measurements and checks for a GPU that is rented by the minute, the most valuable ones first.

    benchmarks/on_gpu.sh 1     at most 360 s: float64 checks, tests, times against floors, bytes
    benchmarks/on_gpu.sh 2     at most 300 s: block sizes, the LM head and peers, memory and races

Each step is a process with a time limit of its own. Its results are in files of $OUT (runs/gpu
without one) before the next step starts, so a cut at any second loses the running step alone:

    results.jsonl    `benchmarks.lines`, for `python -m benchmarks.report`
    steps.jsonl      a line per step: "passed", "failed", "cut" or "missing: ...", its seconds
    log.txt          what the steps print
    tests.xml        verdicts of tests
    ncu.csv, tune.jsonl, sanitizer.txt
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import lines

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {1: 360, 2: 300}  # seconds of a part
VOCABULARIES = (151_936, 128_256, 32_000, 50_257)
TUNED = (151_936, 32_000)
TESTS = ("tests/gpu", "tests/kernels/test_layouts.py", "tests/kernels/test_rows.py")
TESTS += ("tests/losses/test_invariants.py", "tests/losses/test_extremes.py")
BYTES = "dram__bytes_read.sum,dram__bytes_write.sum"
BYTES += ",lts__t_sector_hit_rate.pct,l1tex__t_sector_hit_rate.pct"
SANITIZED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


class Step(NamedTuple):
    """A process of a part.

    Attributes:
        seconds: its time limit.
        command: of this Python if it begins with "-", else of a program.
        needs: programs and Python modules without which it is left out.
    """

    name: str
    seconds: int
    command: list[str]
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = {}


def measure(*arguments):
    return ["-m", "benchmarks.gpu_steps", *map(str, arguments)]


def steps_of(part, out, dry):
    """The steps of a part, in their order."""
    flags = ["--out", str(out), *(["--dry"] if dry else [])]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out}/tests.xml"]
    if importlib.util.find_spec("xdist") and not dry:
        pytest += ["-n", "6", "--dist", "loadfile"]
    python = [sys.executable]
    ncu = ["ncu", "--clock-control", "none", "--csv", "--metrics", BYTES]
    ncu += ["--kernel-name", "regex:fused_loss|logprob", "--log-file", f"{out}/ncu.csv"]
    sanitizer = ["compute-sanitizer", "--log-file", f"{out}/sanitizer.txt", "--error-exitcode", "9"]
    small = [*python, *measure("small", *flags)]
    if part == 1:
        return [
            Step("float64", 60, measure("check", *flags)),
            Step("tests", 150, pytest + (["tests/gpu"] if dry else [*TESTS]), ("pytest",)),
            *(Step(f"times, V = {V:,}", 60, measure("times", V, *flags)) for V in VOCABULARIES),
            Step("bytes", 60, [*ncu, *python, *measure("once", *flags)], ("ncu",)),
        ]
    return [
        *(Step(f"block sizes, V = {V:,}", 75, measure("tune", V, *flags)) for V in TUNED),
        Step("head", 60, measure("head", *flags)),
        Step("head, TRL", 40, measure("head", "trl", *flags), ("trl",)),
        Step("head, torch's own", 40, measure("head", "torch_linear", *flags)),
        Step("head, Liger", 40, measure("head", "liger_linear", *flags), ("liger_kernel",)),
        *(
            Step(
                f"sanitizer, {tool}",
                60,
                [*sanitizer, "--tool", tool, *small],
                ("compute-sanitizer",),
                SANITIZED,
            )
            for tool in ("memcheck", "racecheck")
        ),
    ]


def missing(step):
    """What a step needs and this machine lacks."""
    return [x for x in step.needs if not (shutil.which(x) or _has_module(x))]


def _has_module(name):
    return name.isidentifier() and importlib.util.find_spec(name) is not None


def run(step, seconds, log):
    """ "passed", "failed: status", or "cut" after so many seconds; ends what the step started."""
    command = [sys.executable, *step.command] if step.command[0][0] == "-" else step.command
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return "cut"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return "passed" if status == 0 else f"failed: {status}"


def run_part(part, out, dry=False):
    """Run the steps of a part within its limit; return the names of those that did not pass."""
    out.mkdir(parents=True, exist_ok=True)
    end, bad = time.monotonic() + LIMITS[part], []
    with (out / "log.txt").open("a") as log:
        for step in steps_of(part, out, dry):
            lacking, start = missing(step), time.monotonic()
            left = min(step.seconds, end - start)
            if lacking:
                status = f"missing: {', '.join(lacking)}"
            elif left < 5:
                status = "cut"
            else:
                print(f"== {step.name}", file=log, flush=True)
                status = run(step, left, log)
            seconds = round(time.monotonic() - start, 1)
            line = {"part": part, "step": step.name, "status": status, "seconds": seconds}
            lines.append(out / "steps.jsonl", line)
            print(f"{step.name}: {status}, {seconds} s", flush=True)
            if not (status == "passed" or lacking):
                bad.append(step.name)
    return bad


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="benchmarks/on_gpu.sh", description=__doc__.split("\n")[0]
    )
    parser.add_argument("part", type=int, choices=LIMITS)
    parser.add_argument("--dry", action="store_true", help="tiny shapes in Triton's interpreter")
    options = parser.parse_args(argv)
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu").resolve()
    return int(bool(run_part(options.part, out, options.dry)))


if __name__ == "__main__":
    sys.exit(main())
