"""Tests that need Triton's compiler, which a process with its interpreter does not have."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def offline(test):
    """Run a test in a process without TRITON_INTERPRET: its file as a script, see `main`."""

    @functools.wraps(test)
    def run(**parameters):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        path = [str(ROOT), str(Path(__file__).parent), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        command = [sys.executable, test.__code__.co_filename, test.__name__, json.dumps(parameters)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)

    return run


def main(tests):
    """Run the test that the command line names, of the globals of its file."""
    tests[sys.argv[1]].__wrapped__(**json.loads(sys.argv[2]))
