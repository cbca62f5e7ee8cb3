"""Pictures of results, and the slopes that are fitted to cases of several sizes."""

from pathlib import Path
from statistics import linear_regression

# Providers in the order of legends, with colours for the colour-blind (Okabe and Ito).
STYLES = {
    "fused": ("ours", "#0072B2", "o"),
    "fused_inplace": ("ours, in place", "#009E73", "P"),
    "eager": ("eager", "#D55E00", "s"),
    "compiled": ("torch.compile", "#CC79A7", "D"),
    "trl": ("TRL", "#000000", "^"),
    "liger": ("Liger", "#E69F00", "v"),
    "liger_linear": ("Liger", "#E69F00", "v"),
    "torch_linear": ("torch, chunked", "#F0E442", "<"),
    "quack": ("QuACK", "#56B4E9", "X"),
}
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


def shown(infos):
    """Names of STYLES with a figure in some case."""
    found = {name for info in infos for name, v in info["providers"].items() if type(v) is dict}
    return [name for name in STYLES if name in found]


def slopes(infos):
    """Columns and rows of a table: the cost of 1,000 more tokens, or columns, for each provider."""
    names = shown(infos)
    columns = ["1,000 more"]
    columns += [f"{STYLES[name][0]} {unit}" for unit in ("ms", "MB") for name in names]
    rows = []
    for axis, label in AXES.items():
        cells = []
        for key in FIGURES:
            for name in names:
                sizes, figures = series(infos, axis, name, key)
                enough = len(sizes) > 1
                cells.append(
                    f"{1000 * linear_regression(sizes, figures)[0]:.1f}" if enough else "-"
                )
        rows.append([label, *cells])
    return columns, rows


def start(rows, columns, height):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot.subplots(rows, columns, figsize=(9, height), squeeze=False, layout="constrained")


def finish(figure, handles, labels, title, path):
    from matplotlib import pyplot

    figure.suptitle(title, fontsize=11)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def line(axes, name, sizes, figures):
    label, colour, marker = STYLES[name]
    axes.plot(sizes, figures, marker=marker, color=colour, label=label, linewidth=1.6, markersize=5)


def draw_growth(infos, title, path):
    """Time and memory over tokens and over the vocabulary."""
    figure, grid = start(len(FIGURES), len(AXES), height=6.2)
    for row, (key, (label, _)) in zip(grid, FIGURES.items(), strict=True):
        for axes, (axis, what) in zip(row, AXES.items(), strict=True):
            for name in shown(infos):
                line(axes, name, *series(infos, axis, name, key))
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.set_xlabel(what)
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.locator_params(axis="x", nbins=5)
        row[0].set_ylabel(label)
    finish(figure, *grid[0][0].get_legend_handles_labels(), title, path)


def over_floor(infos):
    """{provider: [(V, time over the floor's), ...]} of cases with a floor and a vocabulary."""
    found = {}
    for info in infos:
        for name in shown([info]):
            ratio = info["providers"][name]["ms"] / info["floor_ms"]
            found.setdefault(name, []).append((info["shape"][2], ratio))
    return {name: sorted(points) for name, points in found.items()}


def draw_floors(groups, title, path):
    """Time of every provider over that of the floor, by vocabulary.

    Args:
        groups: {title: infos}, a picture each.
    """
    figure, (row,) = start(1, len(groups), height=4.0)
    legend = {}
    for axes, (name, infos) in zip(row, groups.items(), strict=True):
        for provider, points in over_floor(infos).items():
            line(axes, provider, *zip(*points, strict=True))
        axes.axhline(1.0, color="0.4", linewidth=1.0, linestyle="--")
        axes.set_yscale("log")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("vocabulary")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_yticks([1, 2, 5, 10, 20, 50])
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
        legend |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    row[0].set_ylabel("time over that of the floor")
    finish(figure, list(legend.values()), list(legend), title, path)
