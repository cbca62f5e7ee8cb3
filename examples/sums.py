"""Few-shot sums for `make demo-lm`: the rows, and the reward function of examples/sums.yaml.

python examples/sums.py runs/sums.jsonl
"""

import json
import sys
from pathlib import Path

SHOTS = "2+2=4\n1+5=6\n7+1=8\n3+6=9\n"


def rows() -> list[dict[str, str]]:
    """Returns all sums of two positive digits below 10, as few-shot prompts with answers."""
    pairs = [(a, b) for a in range(1, 9) for b in range(1, 10 - a)]
    return [{"prompt": f"{SHOTS}{a}+{b}=", "answer": str(a + b)} for a, b in pairs]


def right_sum(completions, answer, **columns) -> list[float]:
    """Returns 1 for a completion whose first line is the answer, else 0."""
    lines = [text.partition("\n") for text in completions]
    pairs = zip(lines, answer, strict=True)
    return [float(line.strip() == right and end == "\n") for (line, end, _), right in pairs]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
