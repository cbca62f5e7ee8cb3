"""GRPOTrainer: training by rollouts, rewards and advantages, on Accelerate and transformers."""

try:
    from grpo_fused.trainer.reward_training import RewardTraining
    from grpo_fused.trainer.rewards import Rewards
    from grpo_fused.trainer.rewards.reward_model import RewardModel, StepRewardModel
    from grpo_fused.trainer.run.config import GRPOTrainerConfig
    from grpo_fused.trainer.run.errors import TrainingError
    from grpo_fused.trainer.run.summary import TrainResult
    from grpo_fused.trainer.run.train_config import TrainConfig
    from grpo_fused.trainer.trainer import GRPOTrainer
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] == "grpo_fused":
        raise
    raise ImportError(
        f'grpo_fused.trainer needs the extra "train": pip install "grpo-fused[train]" ({error})'
    ) from error

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
