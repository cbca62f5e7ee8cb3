"""Slopes of time and memory over tokens and vocabulary, and their picture."""

from pathlib import Path
from statistics import linear_regression

NAMES = {"fused": "fused", "eager": "eager", "trl": "TRL"}
AXES = {"rows": "tokens", "V": "vocabulary"}
FIGURES = {"ms": ("time, ms", 1.0), "peak_bytes": ("peak memory, MB", 1e-6)}


def series(infos, axis, name, key):
    """(sizes, figures) of a provider along an axis, without those that have none."""
    points = []
    for info in infos:
        figures = info["providers"].get(name)
        if info["axis"] == axis and isinstance(figures, dict):
            points.append((info["size"], figures[key] * FIGURES[key][1]))
    return tuple(zip(*sorted(points), strict=True)) or ((), ())


def slopes(infos):
    """Columns and rows of a table: what a thousand more tokens, or columns, cost each provider."""
    columns = [
        "1,000 more",
        *(f"{shown} {unit}" for unit in ("ms", "MB") for shown in NAMES.values()),
    ]
    rows = []
    for axis, label in AXES.items():
        cells = []
        for key in FIGURES:
            for name in NAMES:
                sizes, figures = series(infos, axis, name, key)
                enough = len(sizes) > 1
                cells.append(
                    f"{1000 * linear_regression(sizes, figures)[0]:.1f}" if enough else "-"
                )
        rows.append([label, *cells])
    return columns, rows


def draw(infos, path):
    """Time and memory over both axes as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(len(FIGURES), len(AXES), figsize=(9, 6), sharex="col")
    for row, (key, (label, _)) in zip(grid, FIGURES.items(), strict=True):
        for axes, (axis, shown) in zip(row, AXES.items(), strict=True):
            for name, title in NAMES.items():
                axes.plot(*series(infos, axis, name, key), marker="o", label=title)
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.grid(alpha=0.3)
            if key == "peak_bytes":
                axes.set_xlabel(shown)
        row[0].set_ylabel(label)
    grid[0][0].legend(frameon=False)
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
