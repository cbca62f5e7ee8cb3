"""Plots the course of a run: reward, held-out reward and entropy by optimizer step."""

import os
from pathlib import Path


def plot_history(
    history: list[dict], path: str | Path, title: str = "", window: int | None = None
) -> None:
    """Draws a PNG, replacing an older one only when complete.

    Args:
        history: steps as returned by `read_metrics`.
        path: of the PNG.
        title: title of the plot.
        window: steps of the running mean; None = a tenth of the run, at most 20.

    Raises:
        OSError: the file cannot be written.
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

    partial = Path(f"{path}.partial")
    try:
        figure.savefig(partial, format="png", dpi=150)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)


def _series(history, name):
    """Returns (steps, values) of a metric, without steps that lack it."""
    points = [(line["step"], line[name]) for line in history if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _mean(values):
    return sum(values) / len(values)
