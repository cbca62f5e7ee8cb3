"""What a run has come to so far: rewards, duration, and steps that could not train anything."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

WINDOW = 10  # rollouts whose rewards are averaged at either end of a run
PATIENCE = 10  # optimizer steps in a row without a gradient before a warning
NO_REWARDS = "all rewards are None"
EQUAL_REWARDS = (
    "the rewards in every group are equal, so that all advantages are 0 (is the task too hard or "
    "too easy for the model? does the reward function see what it expects? completions_steps: 1 "
    "writes tables)"
)
CLIPPED = "the objective clips all tokens with an advantage (see clip_ratio/region_mean)"
FILES = ("model", "metrics.jsonl", "reward.png", "completions")  # in output_dir, for the last line


class TrainResult(NamedTuple):
    """How training ended; the same on every rank.

    Attributes:
        step: optimizer steps taken, those before a resume included.
        signal: number of the signal that stopped it, or None.
        first_reward, last_reward: mean rewards of the first and of the last rollouts, 10 or half
            of all; None without any reward.
        seconds: time of training, with evaluations and checkpoints, before a resume included.
        steps_without_gradient: optimizer steps whose gradient was 0.
        rollouts_without_reward: rollouts in which all rewards were None.
        output_dir: folder of model/, metrics.jsonl, reward.png, completions/ and checkpoints.
    """

    step: int
    signal: int | None
    first_reward: float | None
    last_reward: float | None
    seconds: float
    steps_without_gradient: int
    rollouts_without_reward: int
    output_dir: Path


@dataclass
class RunSummary:
    """Counts what `TrainResult` reports; a part of checkpoints. Equal on every rank.

    Attributes:
        seconds: of training until the last checkpoint.
        scored, unscored: rollouts with and without a reward.
        first, last: rewards of the first and last rollouts with a reward, at most WINDOW.
        idle: optimizer steps whose gradient was 0.
        idle_in_a_row: the last of them, if they are the last steps.
        warned: causes that the user was told.
    """

    seconds: float = 0.0
    scored: int = 0
    unscored: int = 0
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    idle: int = 0
    idle_in_a_row: int = 0
    warned: list[str] = field(default_factory=list)

    def add_rollout(self, metrics: dict[str, float], show: bool) -> None:
        """Counts a rollout, and warns of the first without a reward if `show`."""
        if metrics["frac_reward_none"] == 1:
            self.unscored += 1
            self._warn(NO_REWARDS, "a rollout trains nothing", show)
            return
        self.scored += 1
        if len(self.first) < WINDOW:
            self.first.append(metrics["reward"])
        self.last = [*self.last, metrics["reward"]][-WINDOW:]

    def add_step(self, metrics: dict[str, float], config, show: bool) -> None:
        """Counts a step, and warns if PATIENCE steps in a row, or all, changed nothing.

        With a learning rate of 0 that is what the user wants.
        """
        idle = metrics["grad_norm"] == 0
        self.idle += idle
        self.idle_in_a_row = self.idle_in_a_row + 1 if idle else 0
        if config.learning_rate and self.idle_in_a_row >= min(PATIENCE, config.max_steps):
            effect = f"the gradient was 0 in the last {self.idle_in_a_row} steps"
            self._warn(cause_of_idleness(metrics), effect, show)

    def _warn(self, cause: str, effect: str, show: bool) -> None:
        """Warns once for each cause; a resumed run remembers."""
        if cause not in self.warned:
            self.warned.append(cause)
            if show:
                warnings.warn(f"{effect}: {cause}", stacklevel=4)

    def result(self, step: int, signal: int | None, seconds: float, folder: str) -> TrainResult:
        """Returns the result of a run of `seconds` that ended after a step."""
        ends: list[float | None] = [None, None]
        if self.scored:
            size = max(1, min(WINDOW, self.scored // 2))
            ends = [sum(part) / size for part in (self.first[:size], self.last[-size:])]
        return TrainResult(step, signal, *ends, seconds, self.idle, self.unscored, Path(folder))


def cause_of_idleness(metrics: dict[str, float]) -> str:
    """Says why the gradient of a step was 0."""
    if metrics["frac_reward_none"] == 1:
        return NO_REWARDS
    if metrics["num_tokens"] == 0:
        return "all completions are empty, or truncated and masked"
    return EQUAL_REWARDS if metrics["frac_reward_zero_std"] == 1 else CLIPPED


def last_line(result: TrainResult, config, *, can_resume: bool = True) -> str:
    """Returns the sentence with which a command ends a run."""
    ended = "interrupted after" if result.signal else "trained"
    parts = [f"{ended} {result.step} of {config.max_steps} steps in {duration(result.seconds)}"]
    if result.first_reward is None:
        parts.append("no rewards")
    else:
        parts.append(f"reward {result.first_reward:.3g} -> {result.last_reward:.3g}")
    if result.steps_without_gradient:
        parts.append(f"no gradient in {result.steps_without_gradient} of {result.step} steps")
    if result.rollouts_without_reward:
        parts.append(f"rollouts without any reward: {result.rollouts_without_reward}")
    found = [name for name in FILES if (result.output_dir / name).exists()]
    found += ["checkpoints"] if any(result.output_dir.glob("checkpoint-*")) else []
    parts.append(f"{', '.join(found)} in {result.output_dir}")
    if result.signal and can_resume:
        parts.append("--resume latest continues the run")
    return "; ".join(parts)


def duration(seconds: float) -> str:
    """Formats a time as 4.2 s, 3 min 20 s or 2 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min {seconds} s"
