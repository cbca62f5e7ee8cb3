"""The pictures of the documentation show what was measured and counted."""

import json

import pytest
import torch
from pages import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import draw_docs

# Operators that touch the entries of the targets alone, though they take or return whole tensors.
BY_TOKEN = ("aten.gather", "aten.scatter_add")


class Traffic(TorchDispatchMode):
    """Bytes of large inputs and outputs of every operator that is no view."""

    def __init__(self, size):
        super().__init__()
        self.size, self.operators = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and not str(func).startswith(BY_TOKEN):
            moved = self.bytes((args, kwargs)), self.bytes(result)
            if any(moved):
                self.operators.append((str(func).split(".")[1], *moved))
        return result

    def bytes(self, values):
        tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
        return sum(x.nbytes for x in tensors if x.numel() >= self.size)


def test_traffic_of_the_eager_loss():
    """Every operator of the drawing, as autograd runs them."""
    B, T, V = 2, 512, 64
    logits = torch.randn(B, T + 1, V, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, V, (B, T))
    with Traffic(B * T * V) as traffic:
        scaled = logits[:, :-1] / 0.9
        logps = torch.log_softmax(scaled.float(), -1).gather(-1, ids[..., None])
        logps.sum().backward()
    unit = 2 * B * T * V
    counted = [(name, round(a / unit), round(b / unit)) for name, a, b in traffic.operators]
    names = "div _to_copy _log_softmax new_zeros _log_softmax_backward_data _to_copy div"
    assert [name for name, *_ in counted] == [*names.split(), "slice_backward"]
    counted[-1] = ("slice_backward", 1, 2)  # zeros, then a copy into them
    drawn = [step for part in draw_docs.EAGER.values() for step in part]
    assert [moved for _, *moved in counted] == [moved for _, *moved in drawn]
    assert draw_docs.traffic(draw_docs.EAGER) == 25 and draw_docs.traffic(draw_docs.FUSED) == 2


@pytest.mark.slow
def test_pictures_are_drawn_from_committed_results(tmp_path, monkeypatch):
    """All are in docs, and another figure in the results is another figure in the picture."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    draw_docs.main(tmp_path / "new")
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {path.name for path in (ROOT / "docs" / "images").iterdir()}

    texts = []
    monkeypatch.setattr(draw_docs, "save", lambda figure, path: texts.extend(figure.findobj()))
    results = json.loads(draw_docs.RESULTS.read_text())
    for benchmark in results["benchmarks"]:
        if benchmark["extra_info"]["case"] == draw_docs.CASE:
            benchmark["extra_info"]["providers"]["fused"]["ms"] = 777.0
    changed = tmp_path / "cpu.json"
    changed.write_text(json.dumps(results))
    monkeypatch.setattr(draw_docs, "RESULTS", changed)
    draw_docs.draw_summary(tmp_path / "unused.png")
    shown = [x.get_text() for x in texts if hasattr(x, "get_text")]
    assert "777" in shown and "73" in shown
    assert any("measured on a CPU: AMD EPYC, 2 threads; torch 2.13.0" in text for text in shown)
    pyplot.close("all")
