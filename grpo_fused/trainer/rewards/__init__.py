"""Rewards: functions called, checked and combined with weights, and looked up by name or path."""

from grpo_fused.trainer.rewards.weighted import Rewards, RewardScores

__all__ = ["RewardScores", "Rewards"]
