"""Lists the figures that are worse than in a committed run on the same kind of machine.

    python -m benchmarks.compare benchmarks/results/cpu.json runs/cpu.jsonl

A time counts as worse when it is above the old one by more than both runs' spreads together and by
more than 5 %; memory by more than 2 %. Exit status 1 if anything is worse.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import lines

TIME, MEMORY = 0.05, 0.02


def figures(path):
    """{(case name, provider): figures} of a run."""
    found = {}
    for benchmark in lines.read(path)["benchmarks"]:
        for name, values in benchmark["extra_info"].get("providers", {}).items():
            if isinstance(values, dict) and "spread" in values:
                found[benchmark["fullname"], name] = values
    return found


def worse(old, new):
    """Reasons why figures are worse than older ones."""
    reasons = []
    allowed = max(TIME, old["spread"] + new["spread"])
    if new["ms"] > old["ms"] * (1 + allowed):
        reasons.append(f"{old['ms']:.1f} -> {new['ms']:.1f} ms, allowed {allowed:.0%}")
    if new["peak_bytes"] > old["peak_bytes"] * (1 + MEMORY):
        sizes = (old["peak_bytes"] / 1e6, new["peak_bytes"] / 1e6)
        reasons.append("{:.1f} -> {:.1f} MB".format(*sizes))
    return reasons


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--provider", default="fused", help="compared provider; default: ours")
    options = parser.parse_args(argv)
    old, new = figures(options.old), figures(options.new)
    keys = [key for key in new if key in old and key[1].startswith(options.provider)]
    found = {key: reasons for key in keys if (reasons := worse(old[key], new[key]))}
    for (case, name), reasons in found.items():
        print(f"WORSE {case} {name}: {'; '.join(reasons)}")
    print(f"{len(keys)} figures compared, {len(found)} worse, {len(new.keys() - old.keys())} new")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
