"""Run the tests of FusedGRPOTrainer with every supported version of TRL.

    python tests/integrations/trl_matrix.py [1.0 1.8 1.12 1.16]

The first run creates an environment for each version in .venv-trl/, which takes minutes.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("1.0", "1.8", "1.12", "1.16")  # integrations.trl.TESTED, which imports TRL
TESTS = ["tests/integrations/test_trl_trainer.py", "tests/integrations/test_trl_handed.py"]


def python_with(version):
    """Return the interpreter of an environment with that TRL and this checkout."""
    folder = ROOT / ".venv-trl" / version
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        wanted = ["--constraint", "constraints.txt", "--editable", ".[train]"]
        wanted += [f"trl=={version}.*", "peft", "pytest", "numpy", "requests"]
        command = [python, "-m", "pip", "install", "--quiet", *wanted]
        subprocess.run(command, cwd=ROOT, check=True)
        (folder / "ready").touch()
    return python


def main():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    codes = {}
    for version in sys.argv[1:] or VERSIONS:
        command = [python_with(version), "-m", "pytest", "-q", "--slow", *TESTS]
        print(f"TRL {version}", flush=True)
        codes[version] = subprocess.run(command, cwd=ROOT, env=environment).returncode
    print(
        "\n".join(
            f"TRL {version}: {'failed' if code else 'passed'}" for version, code in codes.items()
        )
    )
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
