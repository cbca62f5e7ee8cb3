"""Files of results: a line of JSON each, written at once, so that a cut at any second loses one.

The first line of a run of the suite is {"machine_info": ...}, every other one is a benchmark. The
committed files in `results/` hold the same as one JSON object.
"""

import json
import os
from pathlib import Path


def append(path: Path, value: dict):
    """Append a value as a line; it is on the disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict]:
    """The values of a file; a line that was cut is left out."""
    return [json.loads(x) for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")]


def read(path: Path) -> dict:
    """{"machine_info": ..., "benchmarks": [...]} of a run, from lines or from one JSON object."""
    if path.suffix != ".jsonl":
        return json.loads(path.read_text())
    head, *benchmarks = read_lines(path)
    return {"machine_info": head["machine_info"], "benchmarks": benchmarks}
