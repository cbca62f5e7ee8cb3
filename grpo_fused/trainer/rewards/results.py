"""Checks what reward functions return: numbers, None, or scores of steps."""

import math
from typing import Any

import torch

NO_SCORE = float("nan")  # stands for None in tensors
Steps = list[tuple[int, float]]  # (end_token, score) of each step


def parse_result(name: str, result: Any, completion_ids: list[list[int]]) -> list[float | Steps]:
    """Checks the result of a reward function, and replaces None by NaN.

    Args:
        name: of the reward function.
        result: what it returned.
        completion_ids: tokens of the B completions.

    Returns:
        A float or a list of steps per completion.

    Raises:
        ValueError: the result does not have one entry per completion; an entry is not a finite
            number, None or a list of steps; a step ends outside of its completion.
    """
    size = len(completion_ids)
    if isinstance(result, torch.Tensor) or hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, (list, tuple)) or len(result) != size:
        got = len(result) if isinstance(result, (list, tuple)) else repr(result)
        raise ValueError(f"reward {name} must return one value per completion, {size}, got {got}")
    values = []
    for i, value in enumerate(result):
        if value is None:
            values.append(NO_SCORE)
        elif isinstance(value, (list, tuple)):
            values.append(_parse_steps(name, i, value, len(completion_ids[i])))
        else:
            values.append(_parse_number(value, f"reward {name}: value {i}"))
    return values


def _parse_steps(name, row, steps, length):
    parsed = []
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
        parsed.append((int(end), _parse_number(score, f"reward {name}: step score {row}")))
    return parsed


def _parse_number(value, description):
    is_text = isinstance(value, (str, bytes))
    if is_text or not hasattr(type(value), "__float__"):
        raise ValueError(f"{description} must be a number or None, got {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{description} must be finite, or None for no score, got {number}")
    return number


def total_score(value: float | Steps) -> float:
    """Returns a number as it is, and the sum of steps; NaN without any."""
    if isinstance(value, list):
        return float(sum(score for _, score in value)) if value else NO_SCORE
    return value


def weighted_steps(values: list[float | Steps], weights: list[float], length: int) -> Steps:
    """Combines the scores of all rewards for one completion of `length` tokens.

    A number becomes one step that ends with the completion.
    """
    steps = []
    for value, weight in zip(values, weights, strict=True):
        if isinstance(value, list):
            steps += [(end, weight * score) for end, score in value]
        elif not math.isnan(value) and length:
            steps.append((length - 1, weight * value))
    return steps
