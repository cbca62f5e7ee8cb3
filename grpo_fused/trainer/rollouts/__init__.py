"""Rollouts: completions from `generate`, from vLLM servers, or from a user's `rollout_fn`."""
