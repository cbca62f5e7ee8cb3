"""Plots the course of a run: reward, held-out reward and entropy by optimizer step."""

import io
from typing import Any


def plot_history(history: list[dict], title: str = "", window: int | None = None) -> bytes:
    """Draws a PNG and returns its content.

    Args:
        history: steps as returned by `read_metrics`.
        title: title of the plot.
        window: steps of the running mean; None = a tenth of the run, at most 20.
    """
    from matplotlib.figure import Figure

    window = window or max(1, min(20, len(history) // 10))
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps, rewards = series(history, "reward")
    style: dict[str, Any] = {"color": "#08519c", "linewidth": 2, "label": "reward"}
    if window > 1:
        top.plot(steps, rewards, color="#9ecae1", label="reward of one step")
        parts = [rewards[max(0, i - window) : i] for i in range(1, len(rewards) + 1)]
        rewards = [sum(part) / len(part) for part in parts]
        style["label"] = f"mean of the last {window} steps"
    top.plot(steps, rewards, "." if len(steps) == 1 else "-", **style)
    steps, held_out = series(history, "eval/reward")
    if held_out:
        top.plot(steps, held_out, "o-", color="#238b45", markersize=4, label="held-out rows")
    shown = [value for line in top.lines for value in line.get_ydata()]
    if min(shown) >= 0 and max(shown) <= 1:
        top.set_ylim(-0.02, 1.02)
    bottom.plot(*series(history, "entropy"), color="#a63603")
    bottom.set(xlabel="optimizer step", ylabel="entropy (nats)")
    bottom.set_ylim(bottom=0)
    top.set(ylabel="reward")
    top.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize="small")
    figure.suptitle(title, x=0.01, ha="left", fontsize="large")
    figure.align_ylabels()
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def series(history: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Returns (steps, values) of a metric, without steps that lack it."""
    points = [(line["step"], line[name]) for line in history if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]
