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
try: from grpo_fused.trainer import TrainConfig
except ImportError as error: print(error)
try: import grpo_fused.trainer.rewards
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
    first, second, *errors, codes, usage = result.stdout.split("\n", 6)
    assert first == str(len(LOSSES))
    assert second == "module 'grpo_fused' has no attribute 'nothing'"
    message = 'grpo_fused.trainer needs the extra "train": pip install "grpo-fused[train]" ('
    assert len(errors) == 3 and all(error.startswith(message) for error in errors)
    assert codes == "1 1" and "--num-generations" in usage
    for command, line in zip(("demo", "train"), result.stderr.splitlines(), strict=True):
        assert line == (
            f"grpo-fused {command} needs accelerate, tqdm, transformers: "
            'pip install "grpo-fused[train]"'
        )
    assert list(tmp_path.iterdir()) == []
