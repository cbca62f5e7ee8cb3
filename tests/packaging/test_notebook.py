"""The notebook of examples/: what GitHub shows of it, and that it runs."""

import base64
import json
import re
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples" / "grpo_in_a_notebook.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    texts = ["".join(x["text"]) for x in outputs if x.get("name") == "stdout"]
    pictures = [x["data"]["image/png"] for x in outputs if "image/png" in x.get("data", {})]
    return "".join(texts), pictures


def check_claims(notebook):
    """What its text says: equal losses, a model that learned, less memory over the head."""
    text, pictures = printed(notebook)
    loss, eager, error = re.search(r"loss (\S+), eager (\S+); .* gradient (\S+)", text).groups()
    assert float(loss) == pytest.approx(float(eager), abs=2e-6) and float(error) < 1e-5
    first, last = map(float, re.search(r"reward (\S+) -> (\S+)", text).groups())
    assert first < 0.3 and last > 0.7
    found = {name: float(megabytes) for name, megabytes in re.findall(r"(\w+): +(\d+) MB", text)}
    assert list(found) == ["eager", "grpo_loss", "linear_grpo_loss"]
    assert found["linear_grpo_loss"] < 0.6 * found["grpo_loss"] < 0.36 * found["eager"]
    assert len(pictures) == 2


def test_notebook_as_it_is_shown():
    """Run from top to bottom, without errors or warnings, and small."""
    notebook = json.loads(PATH.read_text())
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {x.get("name") for cell in cells for x in cell["outputs"]} == {"stdout", None}
    check_claims(notebook)
    for picture in printed(notebook)[1]:
        assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert PATH.stat().st_size < 150_000


@pytest.mark.slow
def test_notebook_runs(monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="make test-all installs it")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(PATH, as_version=4)
    for cell in code_cells(notebook):
        cell["outputs"] = []
    where = {"metadata": {"path": str(PATH.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    check_claims(notebook)
