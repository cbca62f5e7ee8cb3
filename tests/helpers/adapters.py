"""Load the adapters of docs/integrations.md; stand-ins for frameworks; the formula in torch."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from batches import relative_error

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "integrations.md").read_text()
BLOCKS = re.findall(r"<!-- runs: (\w+) -->\n```python\n(.*?)```", DOCUMENT, re.S)
LOW, HIGH, BETA = 0.2, 0.28, 0.1


def load(label, **namespace):
    """Run the blocks of a section in order and return the names that they define."""
    blocks = [code for name, code in BLOCKS if name == label]
    assert blocks, label
    for code in blocks:
        exec(code, namespace)
    return SimpleNamespace(**namespace)


def make_fake(monkeypatch, name, **attributes):
    """Make a module of a framework that is not installed importable until the test ends."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        path = ".".join(parts[:n])
        if path not in sys.modules:
            module = ModuleType(path)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
            if n > 1:
                setattr(sys.modules[".".join(parts[: n - 1])], parts[n - 1], module)
    vars(sys.modules[name]).update(attributes)
    return sys.modules[name]


def log_softmax_of(logits, ids):
    return torch.log_softmax(logits.double(), -1).gather(-1, ids[..., None])[..., 0]


def clipped(logps, old, advantages, low=LOW, high=HIGH, cap=None):
    """Compute the clipped loss per token, with an optional dual clip."""
    ratio = torch.exp(logps - old.double())
    advantages = advantages.double()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if cap is not None:
        loss = torch.where(advantages < 0, torch.min(loss, -cap * advantages), loss)
    return loss


def k3(logps, ref):
    difference = ref.double() - logps
    return torch.exp(difference) - difference - 1


def make_tokens(B=5, T=7, seed=0):
    """Make logps, old_logps, ref_logps, advantages (B, T) and a mask, one token active in row 3."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(4, B, T, generator=generator)
    logps = -noise[0].abs() - 0.1
    mask = torch.arange(T) < torch.tensor([7, 4, 6, 1, 5])[:B, None]
    return logps, logps + 0.6 * noise[1], logps + 0.3 * noise[2], noise[3], mask


def assert_same(got, wanted, leaf, tolerance=2e-6):
    """Compare losses and their gradients with respect to a leaf."""
    (gradient,) = torch.autograd.grad(got, leaf)
    (expected,) = torch.autograd.grad(wanted, leaf)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    assert relative_error(gradient, expected) < tolerance
