"""Scores completions with several reward functions and combines the scores with weights."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from grpo_fused.trainer.rewards.calls import OF_TRAINER, call_all, select_arguments
from grpo_fused.trainer.rewards.lookup import find_reward
from grpo_fused.trainer.rewards.results import (
    NO_SCORE,
    Steps,
    parse_result,
    total_score,
    weighted_steps,
)
from grpo_fused.trainer.rollouts.rollout import Prompt

if TYPE_CHECKING:
    from grpo_fused.trainer.reward_training import RewardTraining

RewardFunction = Callable[..., Any]


class TrainerState:
    """The argument `trainer_state` of reward functions.

    The first two fields are those of TRL's TrainerState; the others serve `steps.split_steps`.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far."""
        return self.trainer.step

    @property
    def max_steps(self) -> int:
        return self.trainer.config.max_steps

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the policy."""
        return self.trainer.tokenizer

    @property
    def step_separator(self) -> str:
        """Text that ends a step of a completion."""
        return self.trainer.config.reward_step_separator


@dataclass
class RewardScores:
    """Rewards of B completions.

    Attributes:
        total: (B,) float32, weighted sum of the scores; NaN where no function returned one.
        each: name of a reward function -> (B,) float32, unweighted; NaN where it returned None.
            For a function that scores steps, their sum.
        steps: per completion, weighted [(end_token, score), ...]; None if no function scores
            steps.
        weights: weights of `each`; empty if `total` is not their weighted sum.
        metrics: name -> numbers passed to `log_metric`.
        extra: name -> B values passed to `log_extra`.
    """

    total: torch.Tensor
    each: dict[str, torch.Tensor]
    steps: list[Steps] | None = None
    weights: Sequence[float] = ()
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list] = field(default_factory=dict)

    def as_steps(self, completion_ids: list[list[int]]) -> list[Steps]:
        """Returns `steps`, or, if only other ranks have some, each number as one final step."""
        if self.steps is not None:
            return self.steps
        each, weights = (self.each.values(), self.weights) if self.weights else ([self.total], [1])
        rows = zip(*(values.tolist() for values in each), completion_ids, strict=True)
        return [weighted_steps(row, weights, len(ids)) for *row, ids in rows]


class Rewards:
    """Scores completions with one or more reward functions.

    A function is called as in TRL, `function(prompts=, completions=, completion_ids=,
    trainer_state=, log_metric=, log_extra=, <columns of the data>)`, with the arguments that its
    signature names, or with all of them if it ends in `**kwargs`. `log_metric(name, number)` logs
    a metric, averaged over the rollout; `log_extra(name, values)` adds a column to the table of
    completions.

    A function returns one entry per completion: a number, None (no score) or, for process
    supervision, [(end_token, score), ...], where end_token is the index of the last token of a
    step in the completion. If any function scores steps, the numbers of the others become steps
    that end with the completion. Async functions run concurrently.

    Args:
        functions: one or more callables or names: "path.py:function", "package.module:function",
            a name in `builtin.BUILTIN`, or the folder of a reward model of transformers (a sequence
            classifier, or a token classifier, which scores steps).
        weights: one per function; None = 1 each.
        training: of one of the functions, a reward model that the trainer trains further at the
            end of every iteration (DeepSeekMath, Algorithm 1, line 12).

    Attributes:
        functions: callables by name.
        weights: list of floats.
        trainer_state: passed to functions as `trainer_state`; None until a trainer sets it.

    Raises:
        ValueError: there is no function; a name cannot be resolved; weights are not one finite
            number per function.
    """

    training: "RewardTraining | None" = None

    def __init__(
        self,
        functions: RewardFunction | str | Sequence[RewardFunction | str],
        weights: Sequence[float] | None = None,
        training: "RewardTraining | None" = None,
    ):
        self.training = training
        functions = [functions] if isinstance(functions, str) or callable(functions) else functions
        found = [find_reward(one) if isinstance(one, str) else one for one in functions]
        if not found:
            raise ValueError("rewards must contain at least one function, got none")
        self.functions: dict[str, RewardFunction] = {}
        for function in found:
            if not callable(function):
                raise ValueError(f"rewards must be functions or their names, got {function!r}")
            name = plain = getattr(function, "__name__", type(function).__name__)
            number = 1
            while name in self.functions:
                number += 1
                name = f"{plain}_{number}"
            self.functions[name] = function
        self.weights = [1.0] * len(found) if weights is None else [float(w) for w in weights]
        if len(self.weights) != len(found) or not all(map(math.isfinite, self.weights)):
            raise ValueError(
                f"reward_weights must be one finite number per reward, {len(found)}, got {weights}"
            )
        self.trainer_state: TrainerState | None = None

    def check_columns(self, columns: Iterable[str]) -> None:
        """Checks that data with these columns has what every function requires.

        Raises:
            ValueError: naming the function and the column.
        """
        functions = getattr(self, "functions", {})  # none with a `__call__` of one's own
        for name, function in functions.items():
            select_arguments(name, function, dict.fromkeys([*columns, *OF_TRAINER]))

    def __call__(
        self,
        prompts: list[Prompt],
        completions: list[Prompt],
        completion_ids: list[list[int]],
        columns: dict[str, list],
    ) -> RewardScores:
        """Scores B completions.

        Args:
            prompts: B strings or lists of messages.
            completions: B strings or, for chats, lists of one message.
            completion_ids: B lists of tokens.
            columns: other columns of the data, B values each, by name.

        Raises:
            ValueError: a function requires a column that does not exist, or returned something
                other than a number, None or a list of steps per completion.
            TrainingError: a function raised; the message says where and, of a function with the
                attribute `pure`, on which example.
        """
        # Columns of the data come first: they must not replace the sampled completions.
        arguments = columns | {"prompts": prompts, "completions": completions}
        arguments |= {"completion_ids": completion_ids, "trainer_state": self.trainer_state}
        metrics: dict[str, list[float]] = {}
        extra: dict[str, list] = {}
        arguments["log_metric"] = lambda name, x: metrics.setdefault(name, []).append(float(x))
        arguments["log_extra"] = lambda name, values: extra.update({name: list(values)})
        parsed = {
            name: parse_result(name, result, completion_ids)
            for name, result in call_all(self.functions, arguments).items()
        }
        each = {
            name: torch.tensor([total_score(value) for value in values])
            for name, values in parsed.items()
        }
        weighted = torch.stack([w * v for w, v in zip(self.weights, each.values(), strict=True)])
        total = weighted.nansum(0).masked_fill(weighted.isnan().all(0), NO_SCORE)
        steps = None
        if any(isinstance(value, list) for values in parsed.values() for value in values):
            steps = [
                weighted_steps(row, self.weights, len(ids))
                for row, ids in zip(zip(*parsed.values(), strict=True), completion_ids, strict=True)
            ]
        return RewardScores(total, each, steps, self.weights, metrics, extra)
