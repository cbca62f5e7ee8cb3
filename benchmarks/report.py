"""Markdown tables from committed results.

    python -m benchmarks.report benchmarks/results/*.json

Over logits CPU cases stand next to eager, GPU cases next to the floor: the time of a read or a copy
alone. With the head inside all stand next to the others and to the matmuls alone. Cases of several
sizes become slopes and, with --plot, a picture.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import growth


def table(columns, rows):
    """Rows of strings as a Markdown table; the first column is text, the others are numbers."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(info, name, key, form, scale=1.0):
    """A provider's figure, the reason why there is none, or - where it took no part."""
    figures = info["providers"].get(name, "-")
    return figures if isinstance(figures, str) else form.format(figures[key] * scale)


def against_eager(infos):
    """Time and peak memory next to eager's."""
    columns = ["case", "eager ms", "fused ms", "ratio", "eager MB", "fused MB", "ratio"]
    rows = [
        [
            info["case"],
            figure(info, "eager", "ms", "{:.0f}"),
            figure(info, "fused", "ms", "{:.0f}"),
            f"{info['ratio_time_over_eager']:.3f}",
            figure(info, "eager", "peak_bytes", "{:.0f}", 1e-6),
            figure(info, "fused", "peak_bytes", "{:.0f}", 1e-6),
            f"{info['ratio_memory_over_eager']:.3f}",
        ]
        for info in infos
    ]
    return table(columns, rows)


def against_floor(infos):
    """Device time next to the time in which the same bytes are only read or copied."""
    columns = ["case", "V", "ms", "GB/s", "time / floor", "peak MB", "eager ms", "compiled ms"]
    rows = [
        [
            info["case"],
            str(info["shape"][2]),
            f"{info['device_ms']:.3f}",
            f"{info['GB/s']:.0f}",
            f"{info['time_over_floor']:.2f}",
            f"{info['peak_bytes'] / 1e6:.0f}",
            figure(info, "eager", "ms", "{:.2f}"),
            figure(info, "compiled", "ms", "{:.2f}"),
        ]
        for info in infos
    ]
    return table(columns, rows)


def with_head(infos):
    """Time and peak memory, gradients included, next to the others' and to bare matmuls."""
    others = {"eager": "eager", "trl": "TRL", "trl_active": "TRL, active rows", "liger": "Liger"}
    names = {"fused": "fused"} | others
    columns = ["case", "rows", "H", "V", "matmuls ms", "time / matmuls"]
    columns += [f"{shown} {unit}" for unit in ("ms", "MB") for shown in names.values()]
    rows = [
        [
            info["case"],
            "{} of {} x {}".format(info["active_rows"], *info["shape"]),
            str(info["H"]),
            str(info["shape"][2]),
            f"{info['floor_ms']:.1f}",
            f"{info['time_over_floor']:.2f}",
            *(figure(info, name, "ms", "{:.0f}") for name in names),
            *(figure(info, name, "peak_bytes", "{:.0f}", 1e-6) for name in names),
        ]
        for info in infos
    ]
    return table(columns, rows)


def whole_step(infos):
    """Time and peak memory of a training step, and the longest completion within a budget."""
    names = {"fused": "head inside", "logits": "over logits", "eager": "eager", "trl": "TRL 1.16"}
    rows = []
    for info in infos:
        budget = f"longest completion in {info['budget'] >> 20} MiB"
        columns = ["loss", "ms", "peak MB", budget]
        for name, shown in names.items():
            cells = [figure(info, name, "ms", "{:.0f}")]
            cells.append(figure(info, name, "peak_bytes", "{:.0f}", 1e-6))
            rows.append([shown, *cells, str(info["longest"][name] or "none")])
    return table(columns, rows)


def slopes(infos):
    """What a thousand more tokens or columns cost."""
    return table(*growth.slopes(infos))


def kind(info):
    """The table that a case belongs to."""
    if "axis" in info:
        return slopes
    if "step" in info:
        return whole_step
    over_logits = against_eager if info["device"] == "cpu" else against_floor
    return with_head if "H" in info else over_logits


def render(results):
    """The tables of one file of results."""
    parts = []
    for make in (against_eager, against_floor, with_head, whole_step, slopes):
        if chosen := [info for info in infos_of(results) if kind(info) is make]:
            one_shape = make in (against_eager, against_floor)
            parts += [heading(results, chosen[0], shape=one_shape), make(chosen)]
    return "\n\n".join(parts)


def infos_of(results):
    return [benchmark["extra_info"] for benchmark in results["benchmarks"]]


def heading(results, info, *, shape):
    """Where a table was measured and, where its cases have one shape, with which."""
    cpu = results["machine_info"]["cpu"]["brand_raw"]
    device = f"{cpu}, {info['threads']} threads" if info["device"] == "cpu" else info["device"]
    parts = [device]
    parts += [f"torch {info['torch']}, Triton {info['triton']}, Python {info['python']}"]
    if shape:
        sizes = "B = {}, T = {}".format(*info["shape"])
        if info["device"] == "cpu":
            sizes += f", V = {info['shape'][2]}"
        parts += [f"{sizes}, {info['active_rows']} active rows"]
    return "; ".join([*parts, f"commit {info['commit']}"])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--plot", type=Path, help="PNG of the growth with tokens and vocabulary")
    options = parser.parse_args(argv)
    runs = [json.loads(path.read_text()) for path in options.results]
    print("\n\n".join(map(render, runs)))
    if options.plot:
        infos = [info for run in runs for info in infos_of(run) if kind(info) is slopes]
        growth.draw(infos, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
