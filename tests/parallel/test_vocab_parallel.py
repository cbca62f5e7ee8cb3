"""Vocabulary-parallel functions on real gloo processes; the checks are in `vocab_ranks`."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "vocab_ranks.py"


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_against_whole_vocabularies(world_size, tmp_path):
    commands = [
        [sys.executable, str(SCRIPT), str(rank), str(world_size), str(tmp_path)]
        for rank in range(world_size)
    ]
    ranks = [subprocess.Popen(command) for command in commands]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()
