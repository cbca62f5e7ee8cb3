"""Without the extra [train] the package imports, and errors name the packages to install."""

import subprocess
import sys

from grpo_fused import LOSSES

PROGRAM = """
import contextlib, sys
sys.modules.update(transformers=None, accelerate=None, tqdm=None)
import grpo_fused
from grpo_fused import *
from grpo_fused.cli import main

print(len(grpo_fused.LOSSES))
try: grpo_fused.nothing
except AttributeError as error: print(error)
try: grpo_fused.GRPOTrainer
except ImportError as error: print(error)
print(main(["demo"]), main(["train"]))
main(["demo", "--help"])
"""


def test_only_names_that_need_the_extra_fail_without_it(tmp_path):
    """One process for all of it: most of the time is spent on importing torch."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    first, second, third, codes, *shown = result.stdout.splitlines()
    assert first == str(len(LOSSES))
    assert second == "module 'grpo_fused' has no attribute 'nothing'"
    assert third.startswith('grpo_fused.GRPOTrainer needs the extra "train": pip install "grpo-fu')
    assert codes == "1 1" and "--num-generations" in "".join(shown)
    for command, line in zip(("demo", "train"), result.stderr.splitlines(), strict=True):
        assert line == (
            f"grpo-fused {command} needs accelerate, tqdm, transformers: "
            'pip install "grpo-fused[train]"'
        )
    assert list(tmp_path.iterdir()) == []
