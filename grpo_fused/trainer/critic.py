"""PPO's critic: values of the policy's tokens, advantages from them, and the critic's training."""

import copy

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForTokenClassification

from grpo_fused import gae_advantages, kl_rewards, value_loss, whiten
from grpo_fused.integrations.transformers import base_model
from grpo_fused.ppo import ValueLossOutput
from grpo_fused.trainer.experience import Batch, Experience
from grpo_fused.trainer.optimizer import make_optimizer, make_scheduler
from grpo_fused.trainer.policy import (
    checkpoint_activations,
    disable_dropout,
    model_inputs,
    takes_positions,
)
from grpo_fused.trainer.ranks import Ranks
from grpo_fused.trainer.reference import is_peft_model
from grpo_fused.trainer.rewards import RewardScores
from grpo_fused.trainer.run.config import GRPOTrainerConfig
from grpo_fused.trainer.run.errors import any_rank


def add_value_head(model: nn.Module) -> nn.Linear:
    """Adds a value head to the trunk of a policy, as `model.value_head`: float32, all zeros.

    The loss of its values then reaches the trunk; `save_pretrained` of the trainer leaves it out.
    """
    base = base_model(model)
    size = base.config.get_text_config().hidden_size
    base.value_head = nn.Linear(size, 1, device=base.device, dtype=torch.float32)
    nn.init.zeros_(base.value_head.weight)
    nn.init.zeros_(base.value_head.bias)
    return base.value_head


def load_critic(model: nn.Module, config: GRPOTrainerConfig) -> nn.Module:
    """Returns a token classifier of transformers with one label, whose logits are the values.

    It is the one in the folder `critic_model`, or the policy's trunk with a head that is zero.

    Raises:
        ValueError: the model in the folder has another number of labels, or cannot be loaded; the
            policy has adapters, or an architecture without a token classifier.
    """
    if config.critic_model is not None:
        try:
            critic = AutoModelForTokenClassification.from_pretrained(
                config.critic_model, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"critic_model {config.critic_model} cannot be loaded: {error}"
            ) from error
        if critic.config.num_labels != 1:
            raise ValueError(
                f"critic_model {config.critic_model} must have one label, the value, "
                f"got {critic.config.num_labels}"
            )
        return critic
    if is_peft_model(model) or getattr(model, "is_quantized", False):
        raise ValueError(
            "critic must be shared, or critic_model be given, for a model that is quantized or has "
            f"adapters already, got {config.critic!r}"
        )
    settings = copy.deepcopy(model.config)
    settings.num_labels = 1
    try:
        critic = AutoModelForTokenClassification.from_config(settings, dtype=torch.float32)
    except ValueError as error:
        raise ValueError(
            f"critic must be shared for {type(model).__name__}, which has no token classifier in "
            f"transformers, got {config.critic!r}"
        ) from error
    critic.base_model.load_state_dict(model.base_model.state_dict())
    head = critic.score if hasattr(critic, "score") else critic.classifier
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return critic


class Critic:
    """A value model of its own, with its optimizer and learning rate schedule.

    Args:
        model: from `load_critic`.
        config: GRPOTrainerConfig.
        accelerator: of the run; it has prepared the policy.
    """

    def __init__(self, model: nn.Module, config: GRPOTrainerConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        if config.disable_dropout:
            disable_dropout(model)
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        model.train()
        rate = config.critic_learning_rate
        rate = config.learning_rate if rate is None else rate
        self.model, self.optimizer = accelerator.prepare(model, make_optimizer(model, config, rate))
        self.unwrapped = accelerator.unwrap_model(self.model)
        self.with_positions = takes_positions(model)
        self.scheduler = make_scheduler(self.optimizer, config)

    def values(self, batch: Batch) -> torch.Tensor:
        """Returns the values before each completion token, (B, T) float32, differentiable."""
        logits = self.model(**model_inputs(batch, self.with_positions), use_cache=False).logits
        return logits[:, -batch.completion_ids.shape[1] - 1 : -1, 0].float()

    def clip_gradients(self) -> torch.Tensor:
        """Clips the gradient to max_grad_norm, and returns its norm before."""
        limit = self.config.max_grad_norm or float("inf")
        return self.accelerator.clip_grad_norm_(self.model.parameters(), limit)

    def step(self) -> None:
        """Takes an optimizer step."""
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


def loss_of_values(
    values: torch.Tensor, batch: Batch, config: GRPOTrainerConfig, num_items: float
) -> ValueLossOutput:
    """Returns the contribution of a micro-batch to the value loss of its optimizer step.

    Args:
        values: (B, T) float32 of the critic that is trained.
        batch: the micro-batch, with values and returns of the rollout.
        config: of the run.
        num_items: active tokens of the optimizer step over all ranks.
    """
    assert batch.returns is not None
    return value_loss(
        values,
        batch.returns,
        batch.completion_mask,
        old_values=batch.values,
        cliprange=config.value_cliprange,
        num_items_in_batch=num_items,
    )


def token_rewards(
    scores: RewardScores, completion_ids: list[list[int]], width: int, has_steps: bool
) -> torch.Tensor:
    """Returns rewards for `judge`: (B,) of completions or, if steps have scores, (B, T) of tokens.

    Args:
        scores: of this rank's B completions.
        completion_ids: their tokens.
        width: T.
        has_steps: whether any rank has scores of steps.
    """
    if not has_steps:
        return scores.total.nan_to_num(0.0)  # without a reward a completion is masked
    rewards = torch.zeros(len(completion_ids), width)
    for row, steps in enumerate(scores.as_steps(completion_ids)):
        for end, score in steps:
            rewards[row, end] += score
    return rewards


def judge(
    experience: Experience,
    rewards: torch.Tensor,
    logps: torch.Tensor | None,
    config: GRPOTrainerConfig,
    ranks: Ranks,
) -> dict[str, float]:
    """Sets returns and advantages of an experience that has values; returns metrics.

    The reward of a token is that of its step or, at the end, of its completion, minus the KL
    penalty. Advantages are generalised advantage estimates, whitened over all ranks.

    Args:
        experience: of this rank, with values and, if beta > 0, ref_logps; changed in place.
        rewards: (B,) float32, or (B, T) for process rewards.
        logps: (B, T) float32, log-probabilities of the policy over the vocabulary; None without a
            reference.
        config: of the run.
        ranks: of the run.

    Raises:
        FloatingPointError: a value is not finite; on every rank.

    References:
        DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1.1, eq. 2.
    """
    batch = experience.batch
    mask, values = batch.completion_mask, batch.values
    assert values is not None
    if any_rank(ranks.accelerator, not values[mask].isfinite().all()):
        raise FloatingPointError("the critic predicts values that are NaN or infinite")
    has_penalty = batch.ref_logps is not None and config.beta
    arguments = (logps, batch.ref_logps, mask) if has_penalty else (values, values, mask)
    beta, estimator = config.beta if has_penalty else 0.0, config.reward_kl_estimator
    penalised = kl_rewards(rewards, *arguments, beta=beta, kl_estimator=estimator)
    advantages, batch.returns = gae_advantages(
        penalised, values, mask, gamma=config.gae_gamma, lam=config.gae_lambda
    )
    group = dist.group.WORLD if dist.is_initialized() else None  # sharded models are refused
    batch.advantages = whiten(advantages, mask, group=group)
    if not has_penalty:
        return {}
    kl = kl_rewards(torch.zeros_like(rewards), *arguments, beta=-1.0, kl_estimator=estimator)
    tokens, total = ranks.sum(torch.stack([mask.sum().double(), kl.double().sum()])).tolist()
    return {"kl": total / max(tokens, 1)}
