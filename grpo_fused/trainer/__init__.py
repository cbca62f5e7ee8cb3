"""The trainer: rollout -> rewards -> advantages -> minibatches -> reference, on Accelerate."""

from grpo_fused.trainer.config import GRPOTrainerConfig, TrainConfig

__all__ = ["GRPOTrainerConfig", "TrainConfig"]
