"""Markdown tables and pictures of results.

    python -m benchmarks.report benchmarks/results/*.json [--plots docs] [--json FILE] [--gpus]

A table has a column for every provider that ran in some case; the reasons of the others are listed
below it. The floor is the time of the memory traffic that every implementation needs, or of the
matmuls alone; it is measured alternately with the rest.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import lines, plots, predict

NAMES = {
    **{"fused": "ours", "fused_inplace": "ours, in place", "fused_torch": "ours, in torch"},
    **{"logits": "ours, over logits", "float32": "float32 eager", "compiled": "torch.compile"},
    "torch_linear": "torch, chunked",
    **{"trl": "TRL", "trl_active": "TRL, active rows", "liger": "Liger", "liger_linear": "Liger"},
    **{"liger_inplace": "Liger, in place", "quack": "QuACK", "quack_linear": "QuACK", "cce": "CCE"},
}


def table(columns, rows):
    """Rows of strings as a Markdown table; the first column is text, the others are numbers."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def name_of(provider):
    return NAMES.get(provider, provider)


def number(value):
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def cell(info, name, key, scale=1.0):
    """A provider's figure, the kind of reason for none, or - where it was not run."""
    figures = info["providers"].get(name, "-")
    return figures.split(":")[0] if isinstance(figures, str) else number(figures[key] * scale)


def split(infos):
    """(providers with a figure in some case, {reason: providers without any} of the others)."""
    names = dict.fromkeys(name for info in infos for name in info["providers"])
    found, reasons = [], {}
    for name in names:
        values = [info["providers"][name] for info in infos if name in info["providers"]]
        if any(isinstance(value, dict) for value in values):
            found.append(name)
        else:
            reasons.setdefault(" / ".join(dict.fromkeys(values)), []).append(name_of(name))
    return found, reasons


def remarks(infos):
    """Lines with the reasons of providers that did not run in some or all cases of a table."""
    infos = [info for info in infos if "providers" in info]
    found, reasons = split(infos)
    lines = [f"{', '.join(names)}: {reason}." for reason, names in reasons.items()]
    for name in found:
        parts = [info["providers"].get(name) for info in infos]
        some = dict.fromkeys(part for part in parts if isinstance(part, str))
        if some:
            lines.append(f"{name_of(name)}, in some cases: {' / '.join(some)}.")
    return "\n".join(f"* {line}" for line in lines)


def cases_table(infos):
    """Every case in a row: its sizes, its floor, then time and peak memory of the providers."""
    found, _ = split(infos)
    head, floor = "H" in infos[0], "floor_ms" in infos[0]
    columns = ["case", "active rows", *(["H"] if head else []), "V"]
    columns += ["floor ms"] if floor else []
    columns += [f"{name_of(name)} {unit}" for unit in ("ms", "MB") for name in found]
    rows = []
    for info in infos:
        line = [info["case"], f"{info['active_rows']:,}", *([str(info["H"])] if head else [])]
        line += [f"{info['shape'][2]:,}", *([number(info["floor_ms"])] if floor else [])]
        line += [cell(info, name, "ms") for name in found]
        line += [cell(info, name, "peak_bytes", 1e-6) for name in found]
        rows.append(line)
    return table(columns, rows)


def steps_table(infos):
    """Time and peak memory of training steps, and the longest completion within a budget."""
    parts = []
    for info in infos:
        columns, budget = [info["case"], "ms", "peak MB"], info.get("budget")
        columns += [f"longest completion in {budget >> 20} MiB"] if budget else []
        rows = []
        for name in info["providers"]:
            row = [name_of(name), cell(info, name, "ms"), cell(info, name, "peak_bytes", 1e-6)]
            rows.append(row + ([str(info["longest"][name] or "none")] if budget else []))
        parts.append(table(columns, rows))
    return "\n\n".join(parts)


def lengths_table(infos):
    """Time and number of compilations for new completion lengths."""
    found, _ = split(infos)
    rows = []
    for info in infos:
        for name in found:
            compiled = cell(info, name, "compiled")
            rows.append([name_of(name), cell(info, name, "ms"), compiled])
    return table([f"{len(infos[0]['lengths']) - 1} new lengths", "ms", "compiled"], rows)


def trainers_table(infos):
    """CPU time of whole trainers, and the share of our trainer's own code."""
    parts = []
    for info in infos:
        rows = [[name_of(name), number(s)] for name, s in info["rollout_seconds"].items()]
        rows.append(["of ours outside of generation, model, loss", f"{info['overhead']:.1%}"])
        parts.append(table([info["case"], "processor s"], rows))
    return "\n\n".join(parts)


def slopes_table(infos):
    """The cost of 1,000 more tokens or columns."""
    return table(*plots.slopes(infos))


# Titles of tables, in order, each with the function that makes it.
KINDS = {
    "Trainers": trainers_table,
    "Training steps": steps_table,
    "Over logits": cases_table,
    "Over logits, growth": slopes_table,
    "The LM head inside": cases_table,
    "The LM head inside, growth": slopes_table,
    "Completions of new lengths": lengths_table,
}


def kind(info):
    """The table that a case belongs to; None for a benchmark with its own report."""
    if "rollout_seconds" in info:
        return "Trainers"
    if "providers" not in info:
        return None
    if "step" in info:
        return "Training steps"
    if "lengths" in info:
        return "Completions of new lengths"
    subject = "The LM head inside" if "H" in info else "Over logits"
    return subject + (", growth" if "axis" in info else "")


def grouped(results):
    """{title: infos} of one file of results, in the order of KINDS."""
    infos = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    groups = {title: [info for info in infos if kind(info) == title] for title in KINDS}
    return {title: chosen for title, chosen in groups.items() if chosen}


def heading(results, info):
    """The hardware and the versions of the measurement."""
    cpu = results["machine_info"]["cpu"]["brand_raw"]
    device = f"{cpu}, {info['threads']} threads" if info["device"] == "cpu" else info["device"]
    versions = f"torch {info['torch']}, Triton {info['triton']}, Python {info['python']}"
    peers = [f"{name} {v}" for name, v in info.get("peers", {}).items() if v is not None]
    return "; ".join([device, versions, *peers, f"commit {info['commit']}"])


def render(results):
    """The tables of one file of results."""
    parts = []
    for title, infos in grouped(results).items():
        parts += [f"### {title}", heading(results, infos[0]), KINDS[title](infos)]
        parts += [remarks(infos)] if remarks(infos) else []
    return "\n\n".join(parts)


def draw(results, folder):
    """Write the pictures of one file of results, named after its device."""
    groups = grouped(results)
    of_kernels = [info for name in groups if name != "Trainers" for info in groups[name]]
    title = heading(results, of_kernels[0]).split(";")[0]
    device = "cpu" if of_kernels[0]["device"] == "cpu" else "gpu"
    pictures = {"Over logits, growth": "logits", "The LM head inside, growth": "head"}
    for name, word in pictures.items():
        if name in groups:
            infos = groups[name]
            what = f"{name.split(',')[0]}, loss and gradient: {title}"
            plots.draw_growth(infos, what, folder / f"{word}-{device}.png")
    plain = [info for info in groups.get("Over logits", []) if "," not in info["case"][:-10]]
    floors = {}
    for info in [*plain, *groups.get("Over logits, growth", [])]:
        if info.get("axis") != "rows" and "floor_ms" in info:
            case = f"{info['case'].split(',')[0]}, {info['dtype']}, {info['active_rows']:,} rows"
            floors.setdefault(case, []).append(info)
    floors = {k: v for k, v in floors.items() if len({info["shape"][2] for info in v}) > 2}
    if floors:
        plots.draw_floors(floors, title, folder / f"floor-{device}.png")


def gpu_table(runs):
    """Milliseconds of ours on GPUs, and in brackets relative to the floor: measured in one of the
    runs, or predicted, which is *italic*.
    """
    infos = [b["extra_info"] for run in runs for b in run["benchmarks"]]
    rows = []
    for row in predict.ROWS:
        cells = [row.title, f"{row.active:,}", f"{row.V:,}"]
        rows.append(cells + [_gpu_cell(gpu, row, infos) for gpu in predict.GPUS])
    return table(["case", "active rows", "V", *(gpu.name for gpu in predict.GPUS)], rows)


def _gpu_cell(gpu, row, infos):
    for info in infos:
        found = info.get("case"), info.get("shape", [0])[-1], info.get("active_rows")
        of_row = found == (f"{row.title}, bfloat16", row.V, row.active)
        if of_row and gpu.name in info["device"] and info.get("H") == row.H:
            ms = next(iter(info["providers"].values()))["ms"]  # of the first provider, ours
            return f"{ms:.3g} ({info['time_over_floor']:.2f})"
    ms = 1e3 * predict.seconds(gpu, row)
    return f"*{ms:.3g} ({predict.ratio(gpu, row):.2f})*"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="files of `benchmarks.lines`")
    parser.add_argument("--plots", type=Path, help="a folder for pictures")
    parser.add_argument("--json", type=Path, help="write the one run to this file, to be committed")
    parser.add_argument("--gpus", action="store_true", help="print the table of GPUs alone")
    options = parser.parse_args(argv)
    if not (options.results or options.gpus):
        parser.error("no files of results")
    runs = [lines.read(path) for path in options.results]
    if options.json:
        (run,) = runs
        options.json.write_text(json.dumps(run, indent=1) + "\n")
    print(gpu_table(runs) if options.gpus else "\n\n".join(map(render, runs)))
    for run in runs if options.plots else []:
        draw(run, options.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
