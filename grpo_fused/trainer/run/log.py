"""The log of a run: metrics.jsonl, tables of completions and a plot of the reward."""

import json
import math
import os
import warnings
from dataclasses import asdict
from pathlib import Path

from grpo_fused.trainer.run.config import GRPOTrainerConfig
from grpo_fused.trainer.run.plot import plot_history

METRICS, PLOT = "metrics.jsonl", "reward.png"


class RunLog:
    """Writes metrics.jsonl, completions/ and reward.png to a folder.

    Each step is on the disk before the next one begins. A resumed run replaces the lines of the
    steps that it repeats, and lines truncated by a kill or a full disk are dropped. So
    metrics.jsonl always has each step once and in order. A `GeneralTracker` of Accelerate would
    not: trackers only append.

    Args:
        folder: created with the first line.
        title: title of the plot.
    """

    def __init__(self, folder: str | Path, title: str = ""):
        self.folder, self.title = Path(folder), title
        self.history = read_metrics(self.folder / METRICS)
        self._file = None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends the metrics of a step; NaN and infinity become null, as JSON requires.

        Raises:
            OSError: with the name of the file: the disk is full, and the incomplete line is
                removed; or the folder cannot be written.
        """
        line = {"step": step} | {name: _finite(value) for name, value in metrics.items()}
        if self._file is None or (self.history and step <= self.history[-1]["step"]):
            # A fresh start also drops an evaluation before its first step.
            self._open(step, is_resumed=step > 1)
        end = self._file.tell()
        try:
            rest = (json.dumps(line) + "\n").encode()
            while rest:  # an almost full disk accepts a part; the next write raises
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), end)
            self._file.seek(end)
            raise OSError(error.errno, error.strerror, str(self.folder / METRICS)) from error
        self.history.append(line)

    def extend(self, step: int, metrics: dict[str, float]) -> None:
        """Adds metrics to the line of a step, which may have been written before an interruption.

        Raises:
            OSError: as for `write`.
        """
        line = next((line for line in self.history if line["step"] == step), {})
        self._open(step, is_resumed=True)
        self.write(step, {k: v for k, v in line.items() if k != "step"} | metrics)

    def completions(self, name: int | str, rows: list[dict]) -> None:
        """Writes a table of completions to completions/NAME.jsonl, and as text to NAME.txt.

        Args:
            name: the step under which metrics.jsonl has their metrics, such as 5, or "eval-5" for
                those of an evaluation.
            rows: dicts of "prompt", "completion" and numbers, which are rounded to 6 digits.
        """
        folder = self.folder / "completions"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{k: _rounded(v) for k, v in row.items()} for row in rows]
        finite = [{k: _finite(v) for k, v in row.items()} for row in rows]
        lines = [json.dumps(row, default=str) + "\n" for row in finite]
        _write_atomically(folder / f"{name}.jsonl", "".join(lines).encode())
        _write_atomically(folder / f"{name}.txt", "\n".join(map(_as_text, rows)).encode())

    def close(self) -> None:
        """Closes metrics.jsonl and draws reward.png if there are rewards; warns if it cannot."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if any(line.get("reward") is not None for line in self.history):
            try:
                _write_atomically(self.folder / PLOT, plot_history(self.history, self.title))
            except OSError as error:  # must not hide the error that ended the run
                warnings.warn(f"{PLOT} could not be drawn ({error})", stacklevel=2)

    def _open(self, step, is_resumed):
        """Opens metrics.jsonl without the lines from `step` on; of another run, without any."""
        if self._file is not None:
            self._file.close()
        self.history = [line for line in self.history if is_resumed and line["step"] < step]
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(self.folder / METRICS, lines.encode())
        self._file = open(self.folder / METRICS, "ab", buffering=0)


def read_metrics(path: str | Path) -> list[dict]:
    """Reads the steps of metrics.jsonl in order; [] if there is no such file.

    Truncated lines are skipped. If a resumed run went back to an earlier step, its lines replace
    those from that step on.
    """
    if not Path(path).exists():
        return []
    history = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            step = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(step, dict) and isinstance(step.get("step"), int):
            while history and history[-1]["step"] >= step["step"]:
                history.pop()
            history.append(step)
    return history


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rounded(value):
    """Rewards are float32: 0.1 would be printed as 0.10000000149011612."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _as_text(row):
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n".join(f"[{message['role']}] {message['content']}" for message in prompt)
    others = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("prompt", "completion"))
    return f"=== {others}\n{prompt}\n--- completion\n{row['completion']}\n"


def _write_atomically(path, content):
    """Writes a temporary file and renames it: an error leaves the old file as it was."""
    partial = Path(f"{path}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def tracker_config(config: GRPOTrainerConfig) -> dict[str, int | float | str]:
    """Returns the settings in types that every tracker accepts: numbers, booleans and text."""
    settings = asdict(config).items()
    return {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in settings}
