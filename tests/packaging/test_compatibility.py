"""The table of docs/compatibility.md, the script that writes it, and what pyproject.toml claims."""

import importlib.util
import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
PROJECT = (ROOT / "pyproject.toml").read_text()
spec = importlib.util.spec_from_file_location(
    "compatibility", Path(__file__).with_name("compatibility.py")
)
compatibility = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compatibility)


def table():
    """{name: {column: cell}} of the page."""
    text = PAGE.read_text()
    body = text.split(compatibility.MARKS[0])[1].split(compatibility.MARKS[1])[0]
    head, _, *rows = [compatibility.cells(line) for line in body.splitlines()]
    assert tuple(head) == compatibility.COLUMNS
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def lower_bounds():
    """{package: lower bound} of pyproject.toml."""
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)', PROJECT))


def test_rows_of_the_page_have_the_versions_of_their_names_and_passed():
    for name, cells in table().items():
        row = compatibility.ROWS[name]
        assert cells["Python"].startswith(f"{row.python}.")
        wanted = (row.torch, row.triton, row.transformers, row.numpy)
        columns = ("torch", "Triton", "transformers", "numpy")
        for column, versions in zip(columns, wanted, strict=True):
            assert cells[column].partition("+")[0] in SpecifierSet(versions), (name, column)
        assert cells["failed"] == "0" and int(cells["passed"]) > 100, name


def test_the_oldest_versions_that_are_accepted_are_tested():
    oldest, bounds = table()["oldest"], lower_bounds()
    assert oldest["Python"].startswith(re.search(r'requires-python = ">=(.+)"', PROJECT)[1])
    for column in ("torch", "triton", "transformers", "numpy"):
        tested = oldest["Triton" if column == "triton" else column].partition("+")[0]
        assert tested in SpecifierSet(f"=={bounds[column]}"), column


def test_every_python_that_the_package_claims_is_tested():
    claimed = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT))
    assert claimed == {".".join(cells["Python"].split(".")[:2]) for cells in table().values()}


def test_tests_of_the_rows_exist():
    for row in compatibility.ROWS.values():
        assert all((ROOT / "tests" / f"{test}.py").is_file() for test in row.tests)


def row_of(name, passed):
    cells = [name, "3.11.7", "2.13.0", "3.9.0", "5.24.0", "2.4.6", passed, 0, 0, "2026-11-29"]
    return f"| {' | '.join(map(str, cells))} |\n"


def test_rows_replace_those_of_their_names(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n" + "".join(compatibility.MARKS) + "after\n")
    compatibility.replace_rows(page, [row_of("newest", 1), row_of("oldest", 2)])
    compatibility.replace_rows(page, [row_of("usual", 3), row_of("newest", 4)])
    start, end = compatibility.MARKS
    rows = row_of("oldest", 2) + row_of("usual", 3) + row_of("newest", 4)  # in the order of ROWS
    assert page.read_text() == f"before\n{start}{compatibility.HEAD}{rows}{end}after\n"


CASES = {
    "has three tests": (
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert False\n"
        "def test_c(): pytest.skip()",
        (1, 1, 1),
    ),
    "cannot be imported": ("import no_such_module", (0, 0, 1)),
    "ends the process": ("import os\ndef test_a(): os._exit(3)", (0, 0, "all")),
    "hangs": ("import time\ndef test_a(): time.sleep(60)", (0, 0, "not done in 0 min")),
}


@pytest.mark.parametrize("case", CASES)
def test_outcome_counts_what_pytest_says(case, tmp_path, monkeypatch):
    text, counts = CASES[case]
    monkeypatch.setattr(compatibility, "LIMIT", 2 if case == "hangs" else 60)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds
    path = tmp_path / "test_case.py"
    path.write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # not the checkout's
    command = [compatibility.sys.executable, "-m", "pytest", "-q", "-c", tmp_path / "pytest.ini"]
    assert compatibility.outcome([*command, path]) == counts


def test_a_row_that_cannot_be_set_up_is_no_success(monkeypatch, tmp_path, capsys):
    def row_of_two(name, wheel):
        if name == "python-3.14":
            raise compatibility.subprocess.CalledProcessError(2, ["uv", "venv"])
        return row_of(name, 5)

    monkeypatch.setattr(compatibility, "row_of", row_of_two)
    page = tmp_path / "page.md"
    page.write_text("".join(compatibility.MARKS))
    arguments = ["compatibility", "usual", "python-3.14", "--wheel", "x.whl", "--docs", str(page)]
    monkeypatch.setattr(compatibility.sys, "argv", arguments)
    assert compatibility.main() == 1
    assert "python-3.14 could not be set up" in capsys.readouterr().err
    assert row_of("usual", 5) in page.read_text() and "python-3.14" not in page.read_text()
