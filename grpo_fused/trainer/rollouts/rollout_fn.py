"""Conversion of what a user's `rollout_fn` returns to a checked Rollout."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grpo_fused.checks import nearest
from grpo_fused.trainer.rollouts.rollout import Prompt, Rollout
from grpo_fused.trainer.rollouts.sampler import Sampler
from grpo_fused.trainer.run.errors import shorten

RolloutFn = Callable[[list[Prompt], Any], dict[str, Any]]  # (prompts, trainer) -> lists by name
FIELDS = ("prompt_ids", "completion_ids", "logprobs", "completion_mask", "truncated", "support")


def convert_output(
    output: dict[str, Any], prompts: Sequence[Prompt], columns: dict[str, list], sampler: Sampler
) -> Rollout:
    """Converts the output of a rollout_fn to a Rollout.

    Args:
        output: what the rollout_fn returned; see `GRPOTrainer`.
        prompts: B prompts that it was called with.
        columns: columns of the data; values of `output` that are not FIELDS are added to them.
        sampler: encodes prompts if the output has no prompt_ids, and finds end tokens.

    Raises:
        ValueError: the output is no dict with completion_ids; a list does not have one entry per
            prompt; tokens are no integers, or not in the vocabulary; logprobs, a mask or a support
            do not have one entry per token, or one that is no number, 0 or 1, or ids; a support
            lacks the sampled token; a completion exceeds max_completion_length or the model's
            context.
    """
    output, size = _entries(output), len(prompts)
    for name, values in output.items():
        if not _is_list(values) or len(values) != size:
            got = len(values) if _is_list(values) else _describe(values)
            raise ValueError(
                f"rollout_fn: {name} must have one entry per prompt, {size}, got {got}"
            )
    vocabulary = sampler.vocabulary
    completion_ids = _tokens("completion_ids", "completion", output, vocabulary)
    for row, ids in enumerate(completion_ids):
        _check_completion(output, row, ids, sampler.config.max_completion_length)
    if "prompt_ids" in output:
        prompt_ids = _tokens("prompt_ids", "prompt", output, vocabulary)
        if not all(map(len, prompt_ids)):
            raise ValueError("rollout_fn: prompt_ids must not be empty, got an empty list")
    else:
        prompt_ids = sampler.encode(prompts, columns)
    longest = max(len(x) + len(y) for x, y in zip(prompt_ids, completion_ids, strict=True))
    if sampler.context and longest > sampler.context:
        raise ValueError(
            "rollout_fn: prompt and completion must fit the model's context of "
            f"{sampler.context}, got {longest} tokens"
        )
    logprobs, mask = _numbers(output, "logprobs"), _numbers(output, "completion_mask")
    for row, values in enumerate(mask or []):
        if not set(values) <= {0, 1}:
            raise ValueError(
                f"rollout_fn: completion_mask of completion {row} must be 0 or 1 for each token, "
                f"got {values}"
            )
    truncated = [sampler.is_truncated(ids) for ids in completion_ids]
    if "truncated" in output:
        truncated = _plain(output["truncated"])
        if not all(value in (0, 1) for value in truncated):
            raise ValueError(f"rollout_fn: truncated must be True or False, got {truncated}")
    return Rollout(
        list(prompts),
        prompt_ids,
        completion_ids,
        list(map(bool, truncated)),
        logprobs,
        mask,
        columns | {name: list(v) for name, v in output.items() if name not in FIELDS},
        _supports(output, completion_ids, mask, vocabulary),
    )


def _entries(output):
    """The entries of the output that are not None, under our names."""
    wanted = "rollout_fn must return a dict with completion_ids, a list of token ids per prompt"
    if not isinstance(output, dict):
        raise ValueError(f"{wanted}, got {_describe(output)}")
    output = {name: values for name, values in output.items() if values is not None}
    if "env_mask" in output:  # as TRL names completion_mask
        if "completion_mask" in output:
            raise ValueError("rollout_fn must return either env_mask or completion_mask, got both")
        output["completion_mask"] = output.pop("env_mask")
    if "completion_ids" not in output:
        names = ", ".join(map(str, output)) or "nothing"
        raise ValueError(f"{wanted}, got {names}{nearest('completion_ids', map(str, output))}")
    return output


def _is_list(values):
    """Whether something is a list, or as good as one."""
    is_array = getattr(values, "ndim", 0) > 0
    return isinstance(values, (list, tuple)) or is_array


def _describe(value):
    if value is None or isinstance(value, (int, float, str)):
        return shorten(value)
    return f"{type(value).__name__} {shorten(value)}"


def _plain(values):
    """A list of Python values from one, or from a tensor or an array."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _tokens(name, owner, output, vocabulary):
    """The token ids of every row, checked."""
    return [
        _check_ids(f"{name} of {owner} {row}", ids, vocabulary)
        for row, ids in enumerate(output[name])
    ]


def _check_ids(name, ids, vocabulary):
    wanted = f"rollout_fn: {name} must be token ids, integers in [0, {vocabulary})"
    if not _is_list(ids):
        raise ValueError(f"{wanted}, got {_describe(ids)}")
    ids = [token.item() if hasattr(token, "item") else token for token in _plain(ids)]
    for place, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ValueError(f"{wanted}, got {_describe(token)} for token {place}")
    return ids


def _numbers(output, name):
    """The numbers of every row, or None."""
    if name not in output:
        return None
    rows = [
        [value.item() if hasattr(value, "item") else value for value in _plain(values)]
        for values in output[name]
    ]
    for row, values in enumerate(rows):
        for place, value in enumerate(values):
            if not isinstance(value, (int, float)):
                raise ValueError(
                    f"rollout_fn: {name} of completion {row} must be numbers, "
                    f"got {_describe(value)} for token {place}"
                )
    return rows


def _supports(output, completion_ids, mask, vocabulary):
    """`Rollout.support` from the ids that were kept for every token of every completion."""
    if "support" not in output:
        return None
    supports = []
    for row, (kept, ids) in enumerate(zip(output["support"], completion_ids, strict=True)):
        name = f"rollout_fn: support of completion {row}"
        arrays = []
        for place, (tokens, chosen) in enumerate(zip(kept, ids, strict=True)):
            array = _id_array(tokens, vocabulary)
            if array is None:
                raise ValueError(
                    f"{name} must have distinct ids in [0, {vocabulary}), "
                    f"got {_describe(tokens)} for token {place}"
                )
            if chosen not in array and (mask is None or mask[row][place]):
                raise ValueError(
                    f"{name} must have the token that was sampled, but that of token {place} "
                    f"lacks {chosen}"
                )
            arrays.append(array)
        counts = np.array([len(array) for array in arrays], np.int64)
        supports.append((counts, np.concatenate([np.zeros(0, np.int32), *arrays])))
    return supports


def _id_array(tokens, vocabulary):
    """int32 array of distinct ids in the vocabulary; None if they are not."""
    try:
        array = np.asarray(_plain(tokens)).reshape(-1)
    except (TypeError, ValueError):
        return None
    if not len(array):
        return array.astype(np.int32)
    valid = array.dtype.kind in "iu" and 0 <= array.min() and array.max() < vocabulary
    return array.astype(np.int32) if valid and len(np.unique(array)) == len(array) else None


def _check_completion(output, row, ids, max_completion_length):
    if len(ids) > max_completion_length:
        raise ValueError(
            f"rollout_fn: completion {row} must have at most max_completion_length = "
            f"{max_completion_length} tokens, got {len(ids)}"
        )
    for name in ("logprobs", "completion_mask", "support"):
        if name in output:
            values = output[name][row]
            if not _is_list(values) or len(values) != len(ids):
                got = len(values) if _is_list(values) else _describe(values)
                raise ValueError(
                    f"rollout_fn: {name} of completion {row} must have one entry per token, "
                    f"{len(ids)}, got {got}"
                )
