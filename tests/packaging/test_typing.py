"""Type checkers know the arguments of the public functions."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed: make lint installs it")
ROOT = Path(__file__).parents[2]
CALLS = ROOT / "tests" / "packaging" / "public_calls.py"
IGNORED = re.compile(r"  # type: ignore\[([\w-]+)\]$", re.M)


@pytest.mark.slow
def test_types_of_public_functions(tmp_path):
    """Correct calls pass; a misspelled keyword and wrong types are errors, where the file says."""
    text = CALLS.read_text()
    wanted = {
        number: found.group(1)
        for number, line in enumerate(text.splitlines(), 1)
        if (found := IGNORED.search(line))
    }
    assert len(wanted) > 4
    file = tmp_path / "calls.py"
    file.write_text(IGNORED.sub("", text))
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", file]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    errors = re.findall(r"calls\.py:(\d+): error: .*\[([\w-]+)\]$", result.stdout, re.M)
    found = {int(number): code for number, code in errors}
    assert found == wanted, result.stdout + result.stderr
