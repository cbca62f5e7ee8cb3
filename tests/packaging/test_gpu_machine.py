"""A machine that is rented for its GPU may have torch, Triton and pytest, and no package index."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import lines, on_gpu, report

ROOT = Path(__file__).parents[2]
BLOCKER = """
import sys

NAMES = {"accelerate", "datasets", "liger_kernel", "peft", "transformers", "trl", "verl"}


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
def test_the_tests_of_a_gpu_are_collected_without_the_extras(tmp_path):
    (tmp_path / "blocker.py").write_text(BLOCKER)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = ["-m", "pytest", "-p", "blocker", "-m", "cuda", "--collect-only", "-q"]
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(re.search(r"(\d+)/\d+ tests collected", done.stdout)[1]) > 80
    assert "peft is not installed" in done.stdout


def run_steps(monkeypatch, tmp_path, *steps):
    """{name: status} of steps with the given commands, as steps.jsonl has them."""
    monkeypatch.setattr(on_gpu, "steps_of", lambda part, out, dry: list(steps))
    bad = on_gpu.run_part(1, tmp_path)
    found = {line["step"]: line["status"] for line in lines.read_lines(tmp_path / "steps.jsonl")}
    assert bad == [name for name, status in found.items() if status.split(":")[0] in BAD]
    return found


BAD = ("failed", "cut")


def test_a_step_that_fails_hangs_or_is_missing_stops_no_other(monkeypatch, tmp_path):
    """The processes that a step started end with it."""
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(8); open({str(alive)!r}, 'w')"
    hangs = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = run_steps(
        monkeypatch,
        tmp_path,
        on_gpu.Step("fails", 20, ["-c", "print('why'); raise SystemExit(3)"]),
        on_gpu.Step("hangs", 5, ["-c", hangs]),
        on_gpu.Step("is missing", 20, ["no-such-program"], ("no-such-program",)),
        on_gpu.Step(
            "passes", 20, ["-c", "import os; assert os.environ['A'] == 'b'"], (), {"A": "b"}
        ),
    )
    assert found == {
        "fails": "failed: 3",
        "hangs": "cut",
        "is missing": "missing: no-such-program",
        "passes": "passed",
    }
    assert "why" in (tmp_path / "log.txt").read_text()
    time.sleep(4)
    assert not alive.exists()


def test_a_part_ends_in_its_time(monkeypatch, tmp_path):
    monkeypatch.setitem(on_gpu.LIMITS, 1, 4)
    step = on_gpu.Step("too late", 20, ["-c", ""])
    assert run_steps(monkeypatch, tmp_path, step) == {"too late": "cut"}


def test_the_limits_of_a_device_run():
    """A quarter of an hour with the machine's start, and at most eight files."""
    assert sum(on_gpu.LIMITS.values()) <= 11 * 60
    steps = [step for part in on_gpu.LIMITS for step in on_gpu.steps_of(part, Path("out"), False)]
    assert len({step.name for step in steps}) == len(steps)
    files = set(re.findall(r"[a-z]+\.(?:jsonl|txt|xml|csv)", on_gpu.__doc__))
    assert len(files) == 7
    for step in steps:
        assert set(re.findall(r"out/([a-z.]+)", " ".join(step.command))) <= files


@pytest.mark.slow
def test_dry_run(tmp_path):
    """Both parts on tiny shapes; `benchmarks.report` reads what they measured."""
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    for part in on_gpu.LIMITS:
        script = [ROOT / "benchmarks" / "on_gpu.sh", str(part), "--dry"]
        subprocess.run(script, env=environment, check=True)
    found = {line["step"]: line["status"] for line in lines.read_lines(tmp_path / "steps.jsonl")}
    assert all(status == "passed" or status.startswith("missing: ") for status in found.values())
    assert found["float64"] == found["tests"] == found["head"] == "passed"
    text = report.render(lines.read(tmp_path / "results.jsonl"))
    assert "### Over logits" in text and "### The LM head inside" in text
    assert len((tmp_path / "tune.jsonl").read_text().splitlines()) == 2 * len(on_gpu.TUNED)
