"""The log of a run: metrics by step, tables of completions, the reward as a picture."""

import json
import math
import os
import warnings
from pathlib import Path

METRICS, PICTURE = "metrics.jsonl", "reward.png"


class RunLog:
    """Writes metrics.jsonl, completions/ and reward.png in a folder.

    A line is whole on the disk before the next step begins. A run that goes on from an earlier
    step replaces the lines from there on, and a line that a kill or a full disk cut off is
    dropped: metrics.jsonl has every step once, in order, whatever happened.

    Args:
        folder: made if missing.
        title: over the picture.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, title: str = ""):
        self.folder, self.title = Path(folder), title
        self.folder.mkdir(parents=True, exist_ok=True)
        self.history = read_metrics(self.folder / METRICS)
        self._file = None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a step; NaN and inf become null, which is what JSON has for them.

        Raises:
            OSError: the disk is full; the line is taken back, all before it stay.
        """
        line = {"step": step} | {name: _finite(value) for name, value in metrics.items()}
        if self._file is None:
            self._start(step)
        elif self.history and step <= self.history[-1]["step"]:
            self._start(step)
        end = self._file.tell()
        try:
            rest = (json.dumps(line) + "\n").encode()
            while rest:  # on a disk that is almost full a write is short, and the next one fails
                rest = rest[self._file.write(rest) :]
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            self._file.seek(end)
            raise
        self.history.append(line)

    def completions(self, step: int, rows: list[dict]) -> None:
        """Writes completions/STEP.jsonl, and STEP.txt to be read by people.

        Args:
            step: optimizer steps taken before.
            rows: dicts of "prompt", "completion" and numbers.
        """
        folder = self.folder / "completions"
        folder.mkdir(exist_ok=True)
        lines = [json.dumps({k: _finite(v) for k, v in row.items()}) + "\n" for row in rows]
        _replace(folder / f"{step}.jsonl", "".join(lines).encode())
        _replace(folder / f"{step}.txt", "\n".join(map(_readable, rows)).encode())

    def close(self) -> None:
        """Draws reward.png, if there is a reward and the disk has room."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if any(line.get("reward") is not None for line in self.history):
            try:
                plot(self.history, self.folder / PICTURE, self.title)
            except OSError as error:  # no reason to lose what else is to be said
                warnings.warn(f"{PICTURE} could not be drawn ({error})", stacklevel=2)

    def _start(self, step):
        """Opens the file behind the last step before this one."""
        if self._file is not None:
            self._file.close()
        going_on = step > 1  # or it is a fresh start, of which an older evaluation is no part
        self.history = [line for line in self.history if going_on and line["step"] < step]
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        _replace(self.folder / METRICS, lines.encode())
        self._file = open(self.folder / METRICS, "ab", buffering=0)  # no line waits in memory


def read_metrics(path: str | Path) -> list[dict]:
    """The steps of metrics.jsonl in order; of a step that is there twice the later one.

    Lines that were cut off are left out, and so is what stands before a step that a resumed run
    went back to.
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


def plot(history: list[dict], path: str | Path, title: str = "", window: int | None = None) -> None:
    """Draws reward, evaluation and entropy by step, and puts the picture in its place when done.

    Args:
        history: steps as `read_metrics` gives them.
        path: of a PNG.
        title: over it.
        window: steps of the running mean; None = a tenth of the run, 20 at most.
    """
    from matplotlib.figure import Figure

    window = window or max(1, min(20, len(history) // 10))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps, rewards = _series(history, "reward")
    one_step = "one step" if window > 1 else "mean reward"
    top.plot(steps, rewards, color="#9ecae1" if window > 1 else "#08519c", label=one_step)
    if window > 1:
        running = [_mean(rewards[max(0, i - window) : i]) for i in range(1, len(rewards) + 1)]
        label = f"mean of the last {window} steps"
        top.plot(steps, running, color="#08519c", linewidth=2, label=label)
    steps, held_out = _series(history, "eval/reward")
    if held_out:
        top.plot(steps, held_out, "o-", color="#238b45", markersize=4, label="held out")
    if rewards and 0 <= min(rewards) and max(rewards) <= 1:
        top.set_ylim(-0.02, 1.02)
    top.set(ylabel="reward")
    top.set_title(title, loc="left")
    if len(top.lines) > 1:
        top.legend(loc="lower right", frameon=False)
    bottom.plot(*_series(history, "entropy"), color="#a63603")
    bottom.set(xlabel="optimizer step", ylabel="entropy (nats)")
    bottom.set_ylim(bottom=0)
    figure.align_ylabels()
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)

    unfinished = Path(f"{path}.partial")
    try:
        figure.savefig(unfinished, format="png", dpi=150)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    os.replace(unfinished, path)


def _series(history, name):
    points = [(line["step"], line[name]) for line in history if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _mean(values):
    return sum(values) / len(values)


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _readable(row):
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n".join(f"[{one['role']}] {one['content']}" for one in prompt)
    completion = row["completion"]
    figures = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("prompt", "completion"))
    return f"=== {figures}\n{prompt}\n--- completion\n{completion}\n"


def _replace(path, content):
    """A file that is whole or as it was before."""
    unfinished = Path(f"{path}.partial")
    try:
        unfinished.write_bytes(content)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    os.replace(unfinished, path)
