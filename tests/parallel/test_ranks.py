"""Functions over several ranks on real gloo processes; the checks are in tests/helpers/*_ranks."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "ranks.py"
NAMES = ("vocab", "sequence", "agreement", "fuzz", "adapter", "model")
ALL = tuple(f"{name}_ranks" for name in NAMES)
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world_size", "modules"),
    [(2, ALL), pytest.param(3, ALL, marks=SLOW), pytest.param(4, ALL[-1:], marks=SLOW)],
    ids=["2", "3", "4"],
)
def test_against_one_process(world_size, modules, tmp_path):
    commands = [
        [sys.executable, str(SCRIPT), str(rank), str(world_size), str(tmp_path), *modules]
        for rank in range(world_size)
    ]
    ranks = [subprocess.Popen(command) for command in commands]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()
