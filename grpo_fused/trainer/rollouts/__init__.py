"""Rollouts: completions sampled with `generate`, or returned by a user's `rollout_fn`."""
