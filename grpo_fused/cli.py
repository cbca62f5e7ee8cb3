"""The console script `grpo-fused`; what a sub-command needs is imported when it runs."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

TRAIN_EXTRA = ("accelerate", "matplotlib", "tqdm", "transformers")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns its exit code."""
    parser = argparse.ArgumentParser(prog="grpo-fused", description="Losses of the GRPO family.")
    commands = parser.add_subparsers(metavar="command", required=True)
    add_demo(commands)
    options = vars(parser.parse_args(argv))
    run = options.pop("run")
    try:
        return run(**options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite int or float within bounds."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse builds "invalid int value: 'x'" from it
    return parse


def add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a tiny language model on a CPU within a minute",
        description="A tiny language model with random weights learns by GRPO to name the larger "
        "of two digits. Writes metrics.jsonl, reward.png and checkpoint/ (for transformers).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(name: str, kind: Callable, default, text: str) -> None:
        parser.add_argument(name, type=kind, default=default, help=text)

    add("--output-dir", Path, Path("runs/demo"), "made if missing; an earlier run is replaced")
    add("--steps", number(int, 1), 250, "rollouts, each followed by its updates")
    add("--seed", number(int, 0, 2**32 - 1), 0, "of weights, prompts and samples")
    add("--prompts-per-step", number(int, 1), 16, "prompts in one rollout")
    add("--num-generations", number(int, 2), 16, "completions per prompt: the group")
    add("--loss-type", str, "dapo", "a name in grpo_fused.LOSSES")
    add("--beta", number(float, 0), 0.04, "weight of the KL penalty towards the initial model")
    add("--learning-rate", number(float, 0), 1e-3, "of AdamW at the start; falls linearly to 0")
    add("--num-iterations", number(int, 1), 2, "updates per rollout")
    # A second thread gains nothing at this size, and loses much where cores are shared.
    add("--threads", number(int, 1), 1, "CPU threads")
    parser.set_defaults(run=lambda **options: demo(parser, **options))


def demo(parser: argparse.ArgumentParser, **options) -> int:
    missing = [name for name in TRAIN_EXTRA if find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        print(f'grpo-fused demo needs {names}: pip install "grpo-fused[train]"', file=sys.stderr)
        return 1
    from grpo_fused import LOSSES
    from grpo_fused.demo import DemoOptions, run_demo

    options = DemoOptions(**options)
    if options.loss_type not in LOSSES:
        names = ", ".join(LOSSES)
        parser.error(f"argument --loss-type: must be one of {names}, got {options.loss_type}")
    if options.output_dir.exists() and not options.output_dir.is_dir():
        parser.error(f"argument --output-dir: {options.output_dir} is not a directory")
    return run_demo(options)


if __name__ == "__main__":
    sys.exit(main())
