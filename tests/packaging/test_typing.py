"""Type checkers know the arguments of the public functions."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed: make lint installs it")
ROOT = Path(__file__).parents[2]
CODE = """
import torch
from grpo_fused import Clip, grpo_loss, outcome_advantages

x = torch.zeros(2, 3)
advantages = outcome_advantages(x[:, 0], 2)
grpo_loss(x, x, None, advantages, loss_type="grpo", objective=Clip(), beta=0.1).loss.backward()
grpo_loss(x, x, None, advantages, eps=0.2)
grpo_loss(x, x, None, advantages, beta="0.1")
outcome_advantages(x[:, 0], 2.0)
"""
ERRORS = {
    8: 'Unexpected keyword argument "eps" for "grpo_loss"',
    9: 'Argument "beta" to "grpo_loss" has incompatible type "str"',
    10: 'Argument 2 to "outcome_advantages" has incompatible type "float"',
}


@pytest.mark.slow
def test_types_of_public_functions(tmp_path):
    """A correct call passes; a misspelled keyword and wrong types are errors."""
    file = tmp_path / "calls.py"
    file.write_text(CODE)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", file]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if ": error: " in line]
    assert len(lines) == len(ERRORS), result.stdout + result.stderr
    for line, (number, message) in zip(lines, ERRORS.items(), strict=True):
        assert f"calls.py:{number}: error: {message}" in line
