"""Conversion of what a user's `rollout_fn` returns to a checked Rollout."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grpo_fused.trainer.rollouts.rollout import Prompt, Rollout
from grpo_fused.trainer.rollouts.sampler import Sampler

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
            prompt; logprobs, a mask or a support do not have one entry per token; a support lacks
            the sampled token; a completion exceeds max_completion_length or the model's context.
    """
    if not isinstance(output, dict) or "completion_ids" not in output:
        raise ValueError(f"rollout_fn must return a dict with completion_ids, got {type(output)}")
    output = {name: values for name, values in output.items() if values is not None}
    if "env_mask" in output:  # as TRL names completion_mask
        if "completion_mask" in output:
            raise ValueError("rollout_fn must return either env_mask or completion_mask, got both")
        output["completion_mask"] = output.pop("env_mask")
    for name, values in output.items():
        if len(values) != len(prompts):
            raise ValueError(
                f"rollout_fn: {name} must have one entry per prompt, {len(prompts)}, "
                f"got {len(values)}"
            )
    completion_ids = [list(ids) for ids in output["completion_ids"]]
    for row, ids in enumerate(completion_ids):
        _check_completion(output, row, ids, sampler.config.max_completion_length)
    prompt_ids = output.get("prompt_ids")
    if prompt_ids is not None and not all(map(len, prompt_ids)):
        raise ValueError("rollout_fn: prompt_ids must not be empty, got an empty list")
    prompt_ids = sampler.encode(prompts) if prompt_ids is None else [list(x) for x in prompt_ids]
    longest = max(len(x) + len(y) for x, y in zip(prompt_ids, completion_ids, strict=True))
    if sampler.context and longest > sampler.context:
        raise ValueError(
            "rollout_fn: prompt and completion must fit the model's context of "
            f"{sampler.context}, got {longest} tokens"
        )
    truncated = output.get("truncated")
    if truncated is None:
        truncated = [sampler.is_truncated(ids) for ids in completion_ids]
    return Rollout(
        list(prompts),
        prompt_ids,
        completion_ids,
        list(map(bool, truncated)),
        output.get("logprobs"),
        output.get("completion_mask"),
        columns | {name: list(v) for name, v in output.items() if name not in FIELDS},
        _supports(output, completion_ids, sampler.vocabulary),
    )


def _supports(output, completion_ids, vocabulary):
    """`Rollout.support` from the ids that were kept for every token of every completion."""
    if "support" not in output:
        return None
    supports = []
    for row, (kept, ids) in enumerate(zip(output["support"], completion_ids, strict=True)):
        kept = [np.asarray(tokens, np.int32).reshape(-1) for tokens in kept]
        for place, (tokens, chosen) in enumerate(zip(kept, ids, strict=True)):
            sampled = "completion_mask" not in output or output["completion_mask"][row][place]
            if sampled and chosen not in tokens:
                raise ValueError(
                    f"rollout_fn: support of completion {row} must have the token that was "
                    f"sampled, but that of token {place} lacks {chosen}"
                )
        for place, tokens in enumerate(kept):
            distinct = len(np.unique(tokens)) == len(tokens)
            if not distinct or (len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary):
                raise ValueError(
                    f"rollout_fn: support of completion {row} must have distinct ids in "
                    f"[0, {vocabulary}), got {tokens.tolist()} for token {place}"
                )
        counts = np.array([len(tokens) for tokens in kept], np.int64)
        supports.append((counts, np.concatenate([np.zeros(0, np.int32), *kept])))
    return supports


def _check_completion(output, row, ids, max_completion_length):
    if len(ids) > max_completion_length:
        raise ValueError(
            f"rollout_fn: completion {row} must have at most max_completion_length = "
            f"{max_completion_length} tokens, got {len(ids)}"
        )
    for name in ("logprobs", "completion_mask", "support"):
        if name in output and len(output[name][row]) != len(ids):
            raise ValueError(
                f"rollout_fn: {name} of completion {row} must have one entry per token, "
                f"{len(ids)}, got {len(output[name][row])}"
            )
