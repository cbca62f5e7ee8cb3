"""The trainer: rollout -> rewards -> advantages -> minibatches -> reference, on Accelerate."""

from grpo_fused.trainer.config import GRPOTrainerConfig, TrainConfig
from grpo_fused.trainer.errors import TrainingError
from grpo_fused.trainer.rewards import Rewards
from grpo_fused.trainer.trainer import GRPOTrainer, TrainResult

__all__ = [
    "GRPOTrainer",
    "GRPOTrainerConfig",
    "Rewards",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
]
