"""The Python blocks of README and docs, and the names that every page may use."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
# Blocks run unless a comment in the line above says otherwise:
#   <!-- runs: slime -->        tests/integrations runs it, against a stand-in of the framework
#   <!-- needs: trl -->         it is skipped where that package is not installed
#   <!-- not run: reason -->    it cannot run here at all
BLOCK = re.compile(
    r"(?:<!-- (runs|needs|not run): ([^>]*) -->\n)?^```python\n(.*?)^```", re.S | re.M
)


class Block(NamedTuple):
    """A Python block of a page."""

    mark: str  # "", "runs", "needs" or "not run"
    value: str  # behind the colon of the mark
    code: str
    line: int  # of its first line of code, for tracebacks


def blocks(path: Path) -> list[Block]:
    """Returns the Python blocks of a page in order."""
    text = path.read_text()
    return [
        Block(found[1] or "", found[2] or "", found[3], text[: found.start(3)].count("\n"))
        for found in BLOCK.finditer(text)
    ]


def run(path: Path, block: Block, namespace: dict) -> None:
    """Runs a block; an error has the line of the page."""
    exec(compile("\n" * block.line + block.code, str(path), "exec"), namespace)


def names() -> dict:
    """Returns what a page finds: a tiny model, its tokenizer, and a batch of completions."""
    from grpo_fused.demo import make_model, make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    B, P, T = 4, 3, 8
    input_ids = torch.randint(2, len(tokenizer), (B, P + T))
    lengths = torch.tensor([[8], [5], [3], [8]])
    completion_mask = torch.arange(T) < lengths
    batch = SimpleNamespace(
        input_ids=input_ids,
        mask=torch.ones_like(input_ids),
        completion_ids=input_ids[:, P:],
        completion_mask=completion_mask,
        advantages=torch.tensor([1.0, -0.5, 0.7, -1.2]),
        old_logps=-3 + torch.randn(B, T),
        ref_logps=-3 + torch.randn(B, T),
        num_items_in_batch=completion_mask.sum(),
    )
    numbers = {"B": B, "T": T, "beta": 0.04, "temperature": 0.9}
    return {"torch": torch, "model": model, "tokenizer": tokenizer} | numbers | vars(batch)
