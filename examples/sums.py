"""Few-shot sums for `make demo-lm`: rows, and the reward that examples/sums.yaml names.

python examples/sums.py runs/sums.jsonl
"""

import json
import sys
from pathlib import Path

SHOTS = "2+2=4\n1+5=6\n7+1=8\n3+6=9\n"


def rows() -> list[dict[str, str]]:
    """All sums below 10 of two digits above 0."""
    pairs = [(a, b) for a in range(1, 9) for b in range(1, 10 - a)]
    return [{"prompt": f"{SHOTS}{a}+{b}=", "answer": str(a + b)} for a, b in pairs]


def right_sum(completions, answer, **columns) -> list[float]:
    """1 if the line is the answer and then ends, else 0."""
    lines = [text.partition("\n") for text in completions]
    pairs = zip(lines, answer, strict=True)
    return [float(line.strip() == right and end == "\n") for (line, end, _), right in pairs]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
