"""What a `rollout_fn` returned, checked: the place where samples of a server come in."""

from grpo_fused.trainer.rollout import Rollout

KNOWN = ("prompt_ids", "completion_ids", "logprobs", "completion_mask", "truncated")


def checked(output, prompts, columns, sampler) -> Rollout:
    """What a rollout_fn returned, as a Rollout.

    Raises:
        ValueError: no dict with completion_ids; a list that is not one per prompt; logprobs or a
            mask that is not one per token; more tokens than max_completion_length or the model's
            context.
    """
    if not isinstance(output, dict) or "completion_ids" not in output:
        raise ValueError(f"rollout_fn must return a dict with completion_ids, got {type(output)}")
    output = {name: values for name, values in output.items() if values is not None}
    if "env_mask" in output:  # TRL's name
        if "completion_mask" in output:
            raise ValueError("rollout_fn: env_mask is completion_mask by TRL's name, got both")
        output["completion_mask"] = output.pop("env_mask")
    for name, values in output.items():
        if len(values) != len(prompts):
            raise ValueError(
                f"rollout_fn: {name} must be one per prompt, {len(prompts)}, got {len(values)}"
            )
    completion_ids = [list(ids) for ids in output["completion_ids"]]
    limit = sampler.config.max_completion_length
    for row, ids in enumerate(completion_ids):
        if len(ids) > limit:
            raise ValueError(
                f"rollout_fn: completion {row} has {len(ids)} tokens, max_completion_length "
                f"is {limit}"
            )
        for name in ("logprobs", "completion_mask"):
            if name in output and len(output[name][row]) != len(ids):
                raise ValueError(
                    f"rollout_fn: {name} of completion {row} must be one per token, {len(ids)}, "
                    f"got {len(output[name][row])}"
                )
    prompt_ids = output.get("prompt_ids")
    if prompt_ids is not None and not all(map(len, prompt_ids)):
        raise ValueError("rollout_fn: prompt_ids must have a token at least, got an empty list")
    prompt_ids = sampler.encode(prompts) if prompt_ids is None else [list(x) for x in prompt_ids]
    longest = max(len(x) + len(y) for x, y in zip(prompt_ids, completion_ids, strict=True))
    if sampler.context and longest > sampler.context:
        raise ValueError(
            f"rollout_fn: prompt and completion must fit the model's context of "
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
        columns | {k: list(v) for k, v in output.items() if k not in KNOWN},
    )
