"""Run the tests of the TRL integration with every minor version of TRL that it supports.

    python tests/integrations/trl_matrix.py [1.0 1.16 ...] [--quick] [--docs FILE]

Each version lies in a folder of build/trl/, without its dependencies, in front of the packages of
the environment that runs this. The table that is printed replaces the one in the page of --docs;
a run of some versions replaces their rows. --quick leaves the full matrices of options out, as
`make test` does.
"""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = [f"1.{minor}" for minor in range(17)]  # trl_versions.OLDEST to NEWEST, which need TRL
FILES = ("test_trl_trainer", "test_trl_handed", "test_trl_rloo", "test_trl_newer", "test_trl_async")
MARKS = "<!-- trl-matrix -->\n", "<!-- /trl-matrix -->\n"
HEAD = "| TRL | passed | skipped | failed | transformers | torch |\n| --- " + "| --- " * 5 + "|\n"


def folder_of(version):
    """Return the folder with that TRL, installed if it is not there."""
    folder = ROOT / "build" / "trl" / version
    if not (folder / "trl").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", folder, f"trl=={version}.*"], check=True)
    return folder


def row_of(version, quick=False):
    """Run the tests; return the row of the table."""
    folder = folder_of(version)
    (found,) = importlib.metadata.distributions(name="trl", path=[str(folder)])
    paths = [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths).rstrip(os.pathsep)}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    tests = [ROOT / "tests" / "integrations" / f"{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    command += [] if quick else ["--slow"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = result.stdout.strip().splitlines()[-1] if result.stdout.strip() else result.stderr
    if result.returncode:
        print(result.stdout[-5000:], result.stderr[-2000:], file=sys.stderr)

    def count(word):
        number = re.search(rf"(\d+) {word}", last)
        return int(number[1]) if number else 0

    failed = count("failed") + count("error")
    failed = "all" if result.returncode and not failed else failed
    versions = [importlib.metadata.version(name) for name in ("transformers", "torch")]
    cells = [found.version, count("passed"), count("skipped"), failed, *versions]
    return f"| {' | '.join(map(str, cells))} |\n"


def minor(row):
    return tuple(map(int, re.match(r"\| (\d+)\.(\d+)", row).groups()))


def replace_rows(page, rows):
    """Replace the rows of these versions in the table of a page."""
    before, rest = page.read_text().split(MARKS[0])
    table, after = rest.split(MARKS[1])
    kept = [line + "\n" for line in table.splitlines()[2:] if line.startswith("| 1.")]
    table = {minor(row): row for row in [*kept, *rows]}
    body = "".join(table[key] for key in sorted(table))
    page.write_text(f"{before}{MARKS[0]}{HEAD}{body}{MARKS[1]}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    print(HEAD, end="", flush=True)
    rows = []
    for version in given.versions:
        rows.append(row_of(version, given.quick))
        print(rows[-1], end="", flush=True)
        if given.docs is not None:  # after each: a run may be cut
            replace_rows(given.docs, rows)
    return int(any(row.split(" | ")[3] != "0" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
