"""Losses of the GRPO family: table, objectives, KL estimators, weights, metrics."""

from grpo_fused.losses.table import LOSSES, Loss

__all__ = ["LOSSES", "Loss"]
