"""The console script `grpo-fused`; a sub-command imports its dependencies when it runs."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_fused import __version__

if TYPE_CHECKING:
    from grpo_fused.trainer import TrainResult

VERSION = f"grpo-fused {__version__}"
TRAIN_EXTRA = ("accelerate", "datasets", "matplotlib", "pydantic", "tqdm", "transformers", "yaml")
TRAIN_USAGE = """usage: grpo-fused train|evaluate CONFIG.yaml [--name value ...]

`train` trains a causal language model by GRPO or another loss of the family; docs/trainer has
examples. `evaluate` scores the model on eval_data and prints the means, a line of JSON.
CONFIG.yaml contains `name: value` lines; options on the command line take precedence. Without
CONFIG.yaml all options come from the command line. `--objective.epsilon_low 0.1` sets one entry of
a mapping. Paths are relative to the current folder, those in CONFIG.yaml too. Set
GRPO_FUSED_TRACEBACK=1 in the environment to see the traceback of an error.

options:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="grpo-fused", description="Losses of the GRPO family.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(metavar="command", required=True)
    add_demo(commands)
    commands.add_parser("train", help="train a language model with the settings of a config file")
    commands.add_parser("evaluate", help="score a model on eval_data with the settings of a config")
    env = commands.add_parser("env", help="print versions, and what works with them")
    env.set_defaults(run=print_environment)
    try:
        if argv[:1] in (["train"], ["evaluate"]):  # options are dataclass fields, imported there
            return with_config(*argv)
        # Names may be spelled with _, as fields of a config, or with -.
        argv = [_dashed(word) if word.startswith("--") else word for word in argv]
        options = vars(parser.parse_args(argv))
        run = options.pop("run")
        return run(**options)
    except KeyboardInterrupt:
        from grpo_fused.trainer.run.report import report_error

        report_error("grpo-fused", "interrupted")
        return 130


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """Returns an argparse type: a finite int or float within bounds."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    parse.__name__ = kind.__name__  # for argparse's "invalid int value: 'x'"
    return parse


def add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a tiny language model on a CPU within a minute",
        description="A tiny language model with random weights learns by GRPO to name the larger "
        "of two digits. Writes metrics.jsonl, reward.png and model/ (for transformers).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(name: str, kind: Callable, default, text: str, old: str | None = None) -> None:
        parser.add_argument(name, type=kind, default=default, help=text)
        if old is not None:  # the name of before: an option of its own, so that errors say it
            hidden = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
            parser.add_argument(old, type=kind, dest=name[2:].replace("-", "_"), **hidden)

    add("--output-dir", Path, Path("runs/demo"), "created if missing; replaces an earlier run")
    add("--max-steps", number(int, 1), None, "optimizer steps; by default those of 250 rollouts")
    parser.add_argument(
        "--steps", type=number(int, 1), help="rollouts, as another way to say --max-steps"
    )
    add("--seed", number(int, 0, 2**32 - 1), 0, "seed of weights, prompt order and sampling")
    add(
        *("--prompts-per-rollout", number(int, 1), 16, "prompts in one rollout"),
        "--prompts-per-step",
    )
    add("--num-generations", number(int, 2), 16, "completions per prompt: the group size")
    add("--loss-type", str, "dapo", "a key of grpo_fused.LOSSES")
    add("--beta", number(float, 0), 0.04, "weight of the KL penalty to the initial model; 0: off")
    add("--learning-rate", number(float, 0), 1e-3, "of AdamW, falling linearly to 0")
    add("--num-iterations", number(int, 1), 2, "optimizer steps per rollout")
    # A second thread gains nothing at this size, and is much slower if cores are shared.
    add("--threads", number(int, 1), 1, "CPU threads")
    parser.set_defaults(run=lambda **options: demo(parser, **options))


def demo(parser: argparse.ArgumentParser, **options) -> int:
    if lacks_extra("demo"):
        return 1
    from grpo_fused import LOSSES
    from grpo_fused.demo import DemoOptions, run_demo

    steps, rollouts = options["max_steps"], options.pop("steps")
    if steps and rollouts:
        parser.error("--steps and --max-steps: give one of them")
    options["max_steps"] = steps or (rollouts or 250) * options["num_iterations"]
    chosen = DemoOptions(**options)
    if chosen.loss_type not in LOSSES:
        names = ", ".join(LOSSES)
        parser.error(f"argument --loss-type: must be one of {names}, got {chosen.loss_type}")
    if chosen.output_dir.exists() and not chosen.output_dir.is_dir():
        parser.error(f"argument --output-dir: {chosen.output_dir} is not a directory")
    return run_reporting("grpo-fused demo", lambda: run_demo(chosen))


def with_config(command: str, *given: str) -> int:
    """Runs `grpo-fused train` or `grpo-fused evaluate`.

    Returns:
        0; 1 for an error; 2 for an invalid config; 128 + the signal that stopped training.
    """
    arguments = list(given)
    if arguments == ["--version"]:
        print(VERSION)
        return 0
    if lacks_extra(command):
        return 1
    from grpo_fused.trainer.run.options import format_options, load_options
    from grpo_fused.trainer.run.report import report_error
    from grpo_fused.trainer.run.train_config import TrainConfig

    if not arguments or "--help" in arguments or "-h" in arguments:
        try:
            print(TRAIN_USAGE + format_options(TrainConfig), flush=True)
        except BrokenPipeError:  # of `| head`; what is not written yet would raise at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        return 0 if arguments else 2
    path = None if arguments[0].startswith("--") else arguments.pop(0)
    names = {word.partition("=")[0].replace("-", "_") for word in arguments}
    if command == "evaluate" and "__eval_steps" not in names:
        arguments += ["--eval_steps", "1"]  # which eval_data requires
    try:
        config = load_options(TrainConfig, path, arguments)
    except ValueError as error:
        report_error(f"grpo-fused {command}", error)
        return 2
    from grpo_fused.trainer.run.command import evaluate_model, train

    run = train if command == "train" else evaluate_model
    return run_reporting(f"grpo-fused {command}", lambda: run(config))


def run_reporting(command: str, action: "Callable[[], TrainResult | None]") -> int:
    """Runs a command; errors and warnings take a line each, in its name.

    Returns:
        0; 1 for an error; 128 + the signal that stopped training.
    """
    from grpo_fused.trainer.run.errors import TrainingError
    from grpo_fused.trainer.run.report import plain_warnings, report_error

    try:
        with plain_warnings(command):
            result = action()
    except (ValueError, FloatingPointError, OSError, TrainingError) as error:
        if os.environ.get("GRPO_FUSED_TRACEBACK"):
            raise
        report_error(command, error)
        return 1
    return 128 + result.signal if result is not None and result.signal else 0


def print_environment() -> int:
    from grpo_fused.environment import report

    print(report())
    return 0


def lacks_extra(command: str) -> bool:
    """Returns whether modules that a command needs are missing, and prints their names."""
    missing = [name for name in TRAIN_EXTRA if find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        message = f'grpo-fused {command} needs {names}: pip install "grpo-fused[train]"'
        print(message, file=sys.stderr)
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
