"""A machine that is rented for its GPU may have torch, Triton and pytest, and no package index."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
