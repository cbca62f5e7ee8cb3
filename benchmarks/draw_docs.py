"""The picture of the README and the drawings of docs/how-it-works.md.

    python -m benchmarks.draw_docs [FOLDER]

The picture has figures of committed results alone; the drawings show counts and no measurement.
"""

import sys
from pathlib import Path

from benchmarks import lines, plots, report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
CASE = "head, loss and gradients, float32"
SHOWN = {
    **{"fused": "grpo_fused", "compiled": "torch.compile", "eager": "eager"},
    **{"liger_linear": "Liger", "trl_active": "TRL, active rows", "trl": "TRL"},
}
BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#8c8c8c", "#009E73"
# (operator, reads, writes), in bytes of bfloat16 logits: every operator of the eager loss that
# touches a tensor of their size reads its inputs and writes its output once.
EAGER = {
    "forward": (("/ temperature", 1, 1), (".float()", 1, 2), ("log_softmax", 2, 2)),
    "backward": (
        *(("gather", 0, 2), ("log_softmax", 4, 2), (".float()", 2, 1)),
        *(("/ temperature", 1, 1), ("[:, :-1]", 1, 2)),
    ),
}
FUSED = {"forward": (("grpo_loss", 1, 1),)}


def traffic(operators):
    """Reads and writes of all operators together."""
    return sum(reads + writes for part in operators.values() for _, reads, writes in part)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "svg.hashsalt": "grpo_fused"})
    return pyplot


def save(figure, path):
    """Writes a picture whose bytes depend on its content alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=120, metadata=metadata, facecolor="white")
    pyplot().close(figure)


def draw_summary(path):
    """Time and peak memory of one case against eager PyTorch, torch.compile, Liger and TRL."""
    results = lines.read(RESULTS)
    (info,) = [b["extra_info"] for b in results["benchmarks"] if b["extra_info"]["case"] == CASE]
    # One above the other, so that a phone shows both.
    figure, (top, bottom) = pyplot().subplots(2, 1, figsize=(5.6, 5.2), layout="constrained")
    names = list(SHOWN)[::-1]
    colours = [BLUE if name == "fused" else GREY for name in names]
    for axes, key in ((top, "ms"), (bottom, "peak_bytes")):
        label, scale = plots.FIGURES[key]
        values = [info["providers"][name][key] * scale for name in names]
        bars = axes.barh([SHOWN[name] for name in names], values, color=colours)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=9)
        axes.set_title(label, fontsize=10)
        axes.margins(x=0.14)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    _, T, V = info["shape"]
    heading = report.heading(results, info)
    machine, versions = heading.split("; ")[0], ", ".join(heading.split("; ")[1:4])
    figure.suptitle(
        f"Loss and gradients of an LM head, float32, {info['active_rows']} of 4 x {T} tokens "
        f"active,\nH = {info['H']}, V = {V:,}; measured on a CPU: {machine};\n{versions}",
        fontsize=9,
    )
    save(figure, path)


def canvas(width, height, size):
    """Axes of a drawing in its own units, y downwards."""
    figure, axes = pyplot().subplots(figsize=size, layout="constrained")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return figure, axes


def box(axes, x, y, width, height, text="", colour=GREY, alpha=0.25):
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(
        FancyBboxPatch(
            *((x, y), width, height, style),
            **dict(facecolor=(colour, alpha), edgecolor=colour, linewidth=1.2),
        )
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes, start, end, colour="0.3"):
    style = dict(arrowstyle="-|>", color=colour, linewidth=1.2, shrinkA=0, shrinkB=0)
    axes.annotate("", end, start, arrowprops=style)


def draw_traffic(path):
    """Reads and writes of tensors as large as the logits, eager and fused."""
    figure, axes = canvas(27, 7.4, (9, 3.3))
    for y, name, operators in ((0.9, "eager", EAGER), (4.9, "grpo_loss", FUSED)):
        total = traffic(operators)
        axes.text(0, y - 0.35, f"{name}: {total} units", fontsize=10, weight="bold")
        x = 0.0
        for part, steps in operators.items():
            begin = x
            for label, reads, writes in steps:
                for i in range(reads + writes):
                    box(axes, x + i, y, 0.9, 0.9, colour=ORANGE if i >= reads else BLUE, alpha=0.55)
                middle = x + (reads + writes) / 2 - 0.05
                axes.text(middle, y + 1.15, label, fontsize=7.5, ha="center", va="top")
                x += reads + writes + 0.15
            if len(operators) > 1:
                axes.plot([begin, x - 0.25], [y + 1.85] * 2, color="0.4", linewidth=1)
                axes.text((begin + x) / 2, y + 2.0, part, fontsize=9, ha="center", va="top")
    for x, colour, text in ((8, BLUE, "read"), (12, ORANGE, "written")):
        box(axes, x, 5.0, 0.9, 0.9, colour=colour, alpha=0.55)
        axes.text(x + 1.3, 5.45, text, va="center", fontsize=9)
    axes.text(8, 6.6, "one unit: the bytes of the bfloat16 logits", va="center", fontsize=9)
    save(figure, path)


def draw_launches(path):
    """A row in one launch and in two."""
    figure, axes = canvas(20, 8.0, (9, 3.7))
    axes.text(0, 0.3, "one launch: a loss per token", weight="bold")
    box(axes, 0, 0.8, 5.6, 1.2, "read the row:\nmaximum and sum", BLUE)
    box(axes, 6.2, 0.8, 4.2, 1.2, "the token's loss\nand its derivative", GREEN)
    box(axes, 11, 0.8, 5.6, 1.2, "read the row again,\nwrite its gradient", ORANGE)
    for x in (5.6, 10.4):
        arrow(axes, (x, 1.4), (x + 0.6, 1.4))
    axes.text(2.8, 2.3, "from memory", ha="center", va="top", fontsize=8, color="0.35")
    axes.text(8.3, 2.3, "in registers", ha="center", va="top", fontsize=8, color="0.35")
    text = "from the cache (predicted),\nto memory"
    axes.text(13.8, 2.3, text, ha="center", va="top", fontsize=8, color="0.35")

    axes.text(0, 4.1, "two launches: a loss that couples tokens, or ranks", weight="bold")
    box(axes, 0, 4.6, 5.6, 1.2, "read the rows:\nlog-probabilities", BLUE)
    box(axes, 6.2, 4.6, 4.2, 1.2, "ratio of the sequence;\nexchange of ranks", GREEN)
    box(axes, 11, 4.6, 5.6, 1.2, "read the rows again,\nwrite their gradient", ORANGE)
    for x in (5.6, 10.4):
        arrow(axes, (x, 5.2), (x + 0.6, 5.2))
    axes.text(2.8, 6.1, "first launch", ha="center", va="top", fontsize=8, color="0.35")
    axes.text(8.3, 6.1, "(B, T) tensors", ha="center", va="top", fontsize=8, color="0.35")
    text = "second launch, in backward:\nfrom memory, to memory"
    axes.text(13.8, 6.1, text, ha="center", va="top", fontsize=8, color="0.35")
    axes.text(17, 1.4, "2 units", va="center", fontsize=11, weight="bold")
    axes.text(17, 5.2, "3 units", va="center", fontsize=11, weight="bold")
    save(figure, path)


def draw_head(path):
    """The LM head in chunks of tokens."""
    figure, axes = canvas(20, 9.6, (9, 4.4))
    axes.text(1.4, 0.5, "hidden states", ha="center", weight="bold", fontsize=9)
    for i, (y, text) in enumerate(((1.0, "chunk 1"), (2.6, "chunk 2"), (4.2, "chunk 3"))):
        box(axes, 0, y, 2.8, 1.4, text, BLUE, 0.5 if i == 1 else 0.15)
    box(axes, 0, 5.8, 2.8, 1.4, "masked:\nskipped", GREY, 0.1)
    box(axes, 4.2, 2.5, 5.6, 1.6, "logits of the chunk\n(chunk_bytes)", BLUE, 0.3)
    axes.text(7, 2.1, "matmul 1", ha="center", fontsize=8, color="0.35")
    box(axes, 4.2, 5.4, 5.6, 1.6, "their gradient,\nfrom the fused kernel", ORANGE, 0.3)
    box(axes, 12.4, 1.0, 4.6, 1.6, "dhidden of the chunk", ORANGE, 0.5)
    box(axes, 12.4, 5.4, 4.6, 1.6, "dweight, added up\nin float32", ORANGE, 0.5)
    box(axes, 4.2, 0.0, 5.6, 1.2, "weight (V, H)", GREEN, 0.3)
    arrow(axes, (2.8, 3.3), (4.2, 3.3))
    arrow(axes, (7, 1.2), (7, 1.9))
    arrow(axes, (7, 4.1), (7, 5.4))
    arrow(axes, (9.8, 6.0), (12.4, 2.3))
    arrow(axes, (9.8, 6.2), (12.4, 6.2))
    axes.text(11.9, 4.2, "matmul 2", ha="center", fontsize=8, color="0.35")
    axes.text(11.1, 6.8, "matmul 3", ha="center", fontsize=8, color="0.35")
    axes.text(
        *(0, 8.6, "The memory of chunk 1 serves chunks 2 and 3: logits of all tokens never exist."),
        **dict(fontsize=9.5),
    )
    save(figure, path)


def main(folder=ROOT / "docs" / "images"):
    folder = Path(folder)
    draw_summary(folder / "summary-cpu.png")
    draw_traffic(folder / "traffic.svg")
    draw_launches(folder / "launches.svg")
    draw_head(folder / "head-chunks.svg")


if __name__ == "__main__":
    main(*sys.argv[1:])
