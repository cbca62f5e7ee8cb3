"""Run a part of the tests with each combination of versions in ROWS.

    python tests/packaging/compatibility.py [oldest python-3.12 ...] [--docs FILE] [--wheel FILE]

Each row has an environment in build/compatibility/, set up by uv, which also fetches its Python
where the machine has none. The package is installed as its wheel, which is built unless --wheel
names one. The table that is printed replaces the one in the page of --docs; a run of some rows
replaces those.
"""

import argparse
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "compatibility"
MARKS = "<!-- compatibility -->\n", "<!-- /compatibility -->\n"
COLUMNS = ("environment", "Python", "torch", "Triton", "transformers", "numpy")
COLUMNS += ("passed", "skipped", "failed", "date")
HEAD = f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|\n"
LIMIT = 60 * 60  # seconds a row's tests may take; an hour on a machine that others use too

# Every part that a version can break: kernels in the interpreter, losses and their gradients, the
# head in chunks; models of transformers, training runs and their checkpoints.
LOSSES = ("kernels/test_rows", "kernels/test_reduce")
LOSSES += ("losses/test_autograd", "losses/test_objectives")
MODELS = ("head/test_linear_use", "integrations/test_transformers", "trainer/test_calculator")
MODELS += ("trainer/test_trainer_step", "trainer/test_trainer_checkpoint")


class Row(NamedTuple):
    """An environment: version specifiers, "" for the newest that the others leave."""

    python: str
    torch: str = ""
    triton: str = ""
    transformers: str = ""
    numpy: str = ""
    lowest: bool = False  # of each dependency the oldest that pyproject.toml accepts
    others: tuple[str, ...] = ()
    tests: tuple[str, ...] = LOSSES + MODELS


ROWS = {
    "oldest": Row("3.10", lowest=True, others=("datasets==3.0.*",)),  # uv would take a newer one
    "torch-2.11": Row("3.11", "==2.11.*", "==3.6.*"),
    "usual": Row("3.11", "==2.13.*", "==3.9.*"),  # of constraints.txt
    "transformers-5.0": Row("3.11", "==2.13.*", "==3.9.*", "==5.0.*", tests=MODELS),
    "transformers-5.5": Row("3.11", "==2.13.*", "==3.9.*", "==5.5.*", tests=MODELS),
    "transformers-5.12": Row("3.11", "==2.13.*", "==3.9.*", "==5.12.*", tests=MODELS),
    "newest": Row("3.11"),
    "python-3.12": Row("3.12", "==2.13.*"),
    "python-3.13": Row("3.13", "==2.14.*"),
    "python-3.14": Row("3.14"),
}


def uv(*arguments):
    subprocess.run([sys.executable, "-m", "uv", *map(str, arguments)], check=True, cwd=ROOT)


def built_wheel():
    """The wheel of this checkout, built from its source archive, so that no old file gets in."""
    uv("build", "--quiet", "--out-dir", BUILD / "dist")
    return max((BUILD / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)


def environment_of(name, wheel):
    """Set up the environment of a row, or update it; return the folder of its programs."""
    row, folder = ROWS[name], BUILD / name
    uv("venv", "--quiet", "--allow-existing", "--python", row.python, folder)
    wanted = {"torch": row.torch, "transformers": row.transformers, "numpy": row.numpy}
    constraints = [f"{package}{versions}" for package, versions in wanted.items() if versions]
    (folder / "constraints.txt").write_text("\n".join([*constraints, *row.others]))
    # torch's CUDA build pins one Triton. The interpreter takes any, and so do CPU builds.
    (folder / "overrides.txt").write_text(f"triton{row.triton}\n" if row.triton else "")
    install = ["pip", "install", "--quiet", "--python", folder]
    versions = ["--constraints", folder / "constraints.txt"]
    versions += ["--overrides", folder / "overrides.txt"]
    versions += ["--resolution", "lowest-direct"] if row.lowest else []
    uv(*install, *versions, "--requirements", "pyproject.toml", "--extra", "test")
    uv(*install, "--no-deps", "--reinstall-package", "grpo-fused", wheel)
    return folder / ("Scripts" if os.name == "nt" else "bin")


VERSIONS = """
import platform
from importlib.metadata import version
print(platform.python_version(), *map(version, ("torch", "triton", "transformers", "numpy")))
"""


def outcome(command):
    """Run pytest; return the numbers of tests passed, skipped and failed."""
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment}
    try:
        result = subprocess.run(command, timeout=LIMIT, **options)
    except subprocess.TimeoutExpired as cut:
        print((cut.stdout or b"").decode()[-5000:], file=sys.stderr)
        return 0, 0, f"not done in {LIMIT // 60} min"
    last = result.stdout.strip().splitlines()[-1] if result.stdout.strip() else ""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", last)}
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    if result.returncode:
        print(result.stdout[-20000:], result.stderr[-2000:], file=sys.stderr)
        failed = failed or "all"
    return counts.get("passed", 0), counts.get("skipped", 0), failed


def row_of(name, wheel):
    """Set up an environment and run the tests in it; return the row of the table."""
    programs = environment_of(name, wheel)
    found = subprocess.run(
        [programs / "python", "-c", VERSIONS], check=True, capture_output=True, text=True
    )
    files = [ROOT / "tests" / f"{test}.py" for test in ROWS[name].tests]
    # Not `python -m pytest`: that would look for the package in the checkout first.
    counts = outcome([programs / "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files])
    cells = [name, *found.stdout.split(), *counts, datetime.date.today()]
    return f"| {' | '.join(map(str, cells))} |\n"


def cells(row):
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def replace_rows(page, rows):
    """Replace the rows of these environments in the table of a page."""
    before, rest = page.read_text().split(MARKS[0])
    table, after = rest.split(MARKS[1])
    kept = [f"{line}\n" for line in table.splitlines()[2:]]
    named = {cells(row)[0]: row for row in [*kept, *rows]}
    body = "".join(named[name] for name in ROWS if name in named)
    page.write_text(f"{before}{MARKS[0]}{HEAD}{body}{MARKS[1]}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--wheel", type=Path)
    given = parser.parse_args()
    unknown = set(given.names) - set(ROWS)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    wheel = given.wheel or built_wheel()
    print(HEAD, end="", flush=True)
    rows, not_set_up = [], []
    for name in given.names or ROWS:
        try:
            rows.append(row_of(name, wheel))
        except subprocess.CalledProcessError as error:  # such as a Python that cannot be had here
            print(f"{name} could not be set up: {error}", file=sys.stderr)
            not_set_up.append(name)
            continue
        print(rows[-1], end="", flush=True)
        if given.docs is not None:  # after each: a run may be cut
            replace_rows(given.docs, rows)
    failed = COLUMNS.index("failed")
    return int(bool(not_set_up) or any(cells(row)[failed] != "0" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
