"""Rewards: functions with TRL's signature, reward models, scores of steps; weighted, added."""

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from grpo_fused.trainer.errors import TrainingError, shorten
from grpo_fused.trainer.judges import find_reward

NOTHING = float("nan")
NO_COLUMNS = ("trainer_state", "log_metric", "log_extra")


@dataclass
class Scores:
    """What rewards say about B completions.

    Attributes:
        total: (B,) float32, the weighted sum of what judged; NaN where nothing did.
        each: name of a reward -> (B,) float32 without its weight, NaN where it did not judge; of
            a reward of steps their sum.
        steps: None, or per completion [(end_token, score), ...] with weights.
        weights: of `each`; none where `total` is no weighted sum.
        metrics: name -> numbers that rewards logged.
        extra: name -> list of B values that rewards logged for the table of completions.
    """

    total: torch.Tensor
    each: dict[str, torch.Tensor]
    steps: list[list[tuple[int, float]]] | None = None
    weights: Sequence[float] = ()
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list] = field(default_factory=dict)

    def as_steps(self, completion_ids):
        """`steps`, or where only others' completions have some, numbers as steps at the end."""
        if self.steps is not None:
            return self.steps
        each, weights = (self.each.values(), self.weights) if self.weights else ([self.total], [1])
        rows = zip(*(values.tolist() for values in each), completion_ids, strict=True)
        return [_steps(row, weights, len(ids)) for *row, ids in rows]


class Rewards:
    """Judges completions with several functions.

    A function is called as in TRL, `function(prompts=, completions=, completion_ids=,
    trainer_state=, log_metric=, log_extra=, <columns of the data>)`, with those of them that its
    signature names or with all if it ends in `**kwargs`. `log_metric(name, number)` adds to the
    mean of a metric of the rollout, `log_extra(name, values)` a column to its table of completions.
    It returns one entry per completion: a number, None (not judged)
    or, for process supervision, [(end_token, score), ...], where end_token is the index of a
    step's last token in the completion. It may be `async`: those run at the same time. If one
    scores steps, numbers of the others become a step that ends with the completion.

    Args:
        functions: callables, or names: "path.py:function", "package.module:function", a ready
            one of `judges.READY`, or the folder of a sequence classifier of transformers with one
            label.
        weights: one per function; None = 1 each.

    Attributes:
        trainer_state: what functions get by that name; None until a trainer sets it.

    Raises:
        ValueError: no functions, a name that leads nowhere, weights that are not one finite
            number each.
    """

    def __init__(self, functions: Sequence[Callable | str], weights: Sequence[float] | None = None):
        functions = [functions] if isinstance(functions, str) or callable(functions) else functions
        found = [find_reward(one) if isinstance(one, str) else one for one in functions]
        if not found:
            raise ValueError("rewards: at least one function is needed, got none")
        self.functions = {}
        for function in found:
            if not callable(function):
                raise ValueError(f"rewards: a function is wanted, got {function!r}")
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
        self.trainer_state = None

    def __call__(self, prompts, completions, completion_ids, columns) -> Scores:
        """Judges B completions.

        Args:
            prompts: B, str or lists of messages.
            completions: B, str or lists of one message, as the prompts.
            completion_ids: B lists of tokens.
            columns: name -> B values.

        Returns:
            Scores.

        Raises:
            ValueError: a function wants a column that is not there, or returned something else
                than one number, None or list of steps per completion.
            TrainingError: a function raised; it and the example are named.
        """
        arguments = columns | {"prompts": prompts, "completions": completions}  # not the data's own
        arguments |= {"completion_ids": completion_ids, "trainer_state": self.trainer_state}
        metrics, extra = {}, {}
        arguments["log_metric"] = lambda name, x: metrics.setdefault(name, []).append(float(x))
        arguments["log_extra"] = lambda name, values: extra.update({name: list(values)})
        results = self._results(arguments)
        parsed = {
            name: _parse(name, result, completion_ids)
            for name, result in zip(self.functions, results, strict=True)
        }
        each = {name: torch.tensor([_sum(v) for v in values]) for name, values in parsed.items()}
        weighted = torch.stack([w * v for w, v in zip(self.weights, each.values(), strict=True)])
        total = weighted.nansum(0).masked_fill(weighted.isnan().all(0), NOTHING)
        if not any(isinstance(value, list) for values in parsed.values() for value in values):
            return Scores(total, each, None, self.weights, metrics, extra)
        steps = [
            _steps(row, self.weights, len(ids))
            for row, ids in zip(zip(*parsed.values(), strict=True), completion_ids, strict=True)
        ]
        return Scores(total, each, steps, self.weights, metrics, extra)

    def _results(self, arguments):
        """What every function returned; those that are async run at the same time."""
        chosen = {
            name: _chosen(name, function, arguments) for name, function in self.functions.items()
        }
        results = {}
        for name, function in self.functions.items():
            if not _is_async(function):
                try:
                    results[name] = function(**chosen[name])
                except Exception as error:
                    raise _located(name, function, chosen[name], error, arguments) from error
        waiting = [name for name, function in self.functions.items() if _is_async(function)]
        answers = _run([(self.functions[name], chosen[name]) for name in waiting])
        for name, answer in zip(waiting, answers, strict=True):
            if isinstance(answer, Exception):
                function = self.functions[name]
                raise _located(name, function, chosen[name], answer, arguments) from answer
            results[name] = answer
        return [results[name] for name in self.functions]


def _chosen(name, function, arguments):
    """The arguments that a function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins have none
        return arguments
    for this in parameters:
        if this.default is this.empty and this.kind not in (this.VAR_POSITIONAL, this.VAR_KEYWORD):
            if this.name not in arguments or this.kind is this.POSITIONAL_ONLY:
                raise ValueError(
                    f"reward {name} wants {this.name}, which is no column of the data: there are "
                    f"{', '.join(arguments)}"
                )
    if any(this.kind is this.VAR_KEYWORD for this in parameters):
        return arguments
    taken = {this.name for this in parameters}
    return {key: value for key, value in arguments.items() if key in taken}


def _is_async(function):
    call = type(function).__call__ if not inspect.isroutine(function) else function
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _run(calls):
    """Results of async calls, exceptions among them."""
    if not calls:
        return []

    async def together():
        made = [function(**arguments) for function, arguments in calls]
        return await asyncio.gather(*made, return_exceptions=True)

    return asyncio.run_coroutine_threadsafe(together(), _event_loop()).result()


@functools.cache
def _event_loop():
    """One for the whole run, to which clients and locks of rewards are bound; in its own thread,
    because this one may have another."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _located(name, function, arguments, error, every):
    """The error with the example that it comes from: the first that fails when judged alone."""
    size = len(every["completions"])
    what = f"{type(error).__name__}: {error}"
    for i in range(size):
        alone = {
            key: values if key in NO_COLUMNS else values[i : i + 1]
            for key, values in arguments.items()
        }
        try:
            if _is_async(function):
                (answer,) = _run([(function, alone)])
                if isinstance(answer, Exception):
                    raise answer
            else:
                function(**alone)
        except Exception as again:
            prompt, completion = every["prompts"][i], every["completions"][i]
            return TrainingError(
                f"reward {name} failed on example {i} of {size} ({type(again).__name__}: {again}); "
                f"prompt: {shorten(prompt)}; completion: {shorten(completion)}"
            )
    return TrainingError(f"reward {name} failed on {size} examples, but on none alone ({what})")


def _parse(name, result, completion_ids):
    """One float (NaN for None) or list of (end_token, score) per completion."""
    size = len(completion_ids)
    if isinstance(result, torch.Tensor) or hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, (list, tuple)) or len(result) != size:
        got = len(result) if isinstance(result, (list, tuple)) else repr(result)
        raise ValueError(f"reward {name} must return one value per completion, {size}, got {got}")
    values = []
    for i, value in enumerate(result):
        if value is None:
            values.append(NOTHING)
        elif isinstance(value, (list, tuple)):
            values.append(_checked_steps(name, i, value, len(completion_ids[i])))
        else:
            values.append(_number(value, f"reward {name}: value {i}"))
    return values


def _checked_steps(name, row, steps, length):
    checked = []
    for step in steps:
        if not isinstance(step, (list, tuple)) or len(step) != 2:
            raise ValueError(
                f"reward {name}: a step of completion {row} must be (end_token, score), "
                f"got {step!r}"
            )
        end, score = step
        if isinstance(end, bool) or not hasattr(end, "__index__") or not 0 <= int(end) < length:
            raise ValueError(
                f"reward {name}: end_token of completion {row} must be an index of one of its "
                f"{length} tokens, got {end!r}"
            )
        checked.append((int(end), _number(score, f"reward {name}: step score {row}")))
    return checked


def _number(value, what):
    """A finite float; NaN is refused: who does not judge returns None."""
    is_text = isinstance(value, (str, bytes))
    if is_text or not hasattr(type(value), "__float__"):
        raise ValueError(f"{what} must be a number or None, got {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} must be finite, or None for not judged, got {number}")
    return number


def _sum(value):
    if isinstance(value, list):
        return float(sum(score for _, score in value)) if value else NOTHING
    return value


def _steps(row, weights, length):
    """The steps of all rewards of one completion, with weights."""
    steps = []
    for value, weight in zip(row, weights, strict=True):
        if isinstance(value, list):
            steps += [(end, weight * score) for end, score in value]
        elif not math.isnan(value) and length:
            steps.append((length - 1, weight * value))
    return steps
