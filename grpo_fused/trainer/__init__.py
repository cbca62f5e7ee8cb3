"""GRPOTrainer: training by rollouts, rewards and advantages, on Accelerate and transformers."""

from grpo_fused.trainer.reward_training import RewardTraining
from grpo_fused.trainer.rewards import Rewards
from grpo_fused.trainer.rewards.reward_model import RewardModel, StepRewardModel
from grpo_fused.trainer.run.config import GRPOTrainerConfig
from grpo_fused.trainer.run.errors import TrainingError
from grpo_fused.trainer.run.summary import TrainResult
from grpo_fused.trainer.run.train_config import TrainConfig
from grpo_fused.trainer.trainer import GRPOTrainer

__all__ = [
    "GRPOTrainer",
    "GRPOTrainerConfig",
    "RewardModel",
    "RewardTraining",
    "Rewards",
    "StepRewardModel",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
]
