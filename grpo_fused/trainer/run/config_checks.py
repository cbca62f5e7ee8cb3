"""Checks of settings that depend on each other, or on another library."""

from dataclasses import fields
from typing import TYPE_CHECKING

from grpo_fused import LOSSES
from grpo_fused.checks import nearest
from grpo_fused.trainer.rollouts.chat import check_template_kwargs
from grpo_fused.trainer.rollouts.generation import check_generation_kwargs, plain_values
from grpo_fused.trainer.run.source_checks import check_source
from grpo_fused.validation import check_objective

if TYPE_CHECKING:
    from grpo_fused.trainer.run.config import GRPOTrainerConfig

CRITIC_OPTIONS = (
    *("critic", "critic_model", "critic_learning_rate", "value_coef", "value_cliprange"),
    *("gae_gamma", "gae_lambda", "reward_kl_estimator"),
)
# Settings of groups and of a penalty in the loss, which PPO does not have.
ONLY_OF_PPO = {"scale_rewards": "group", "baseline": "group", "pass_at_k": None}
ONLY_OF_PPO |= {"multi_objective_aggregation": "sum_then_normalize", "dynamic_sampling_rounds": 1}
ONLY_OF_PPO |= {"kl_estimator": "k3", "use_bias_correction_kl": False}


def check_settings(config: "GRPOTrainerConfig") -> None:
    """Checks every setting against the others.

    Raises:
        ValueError: naming the settings that do not fit.
    """
    check_sampling(config)
    check_objective_parameters(config.loss_type, config.objective)
    level = config.importance_sampling_level or LOSSES[config.loss_type].level
    check_objective(config.objective_or_default, level)
    check_advantages(config)
    check_critic(config)
    check_source(config)
    check_optimizer(config)
    check_iterations(config)
    rows = config.prompts_per_rollout * config.num_generations
    if rows % config.minibatches:
        raise ValueError(
            f"minibatches must divide prompts_per_rollout x num_generations = {rows}, "
            f"got {config.minibatches}"
        )
    if not config.push_to_hub and (config.hub_model_id or config.hub_private_repo is not None):
        raise ValueError(
            "hub_model_id and hub_private_repo require push_to_hub, got "
            f"{config.hub_model_id!r} and {config.hub_private_repo!r} without it"
        )
    if not config.reward_step_separator:
        raise ValueError(f"reward_step_separator must not be empty, got {''!r}")
    floor, cap = config.rollout_correction_floor, config.rollout_correction_cap
    if floor is not None and floor >= cap:
        raise ValueError(
            f"rollout_correction_floor must be below rollout_correction_cap = {cap}, got {floor}"
        )


def check_optimizer(config: "GRPOTrainerConfig") -> None:
    """Checks the settings of AdamW and its schedule."""
    betas = config.adam_betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adam_betas must be two numbers in [0, 1), got {betas}")
    if config.warmup_steps and config.lr_scheduler_type == "constant":
        raise ValueError(
            "warmup_steps requires another lr_scheduler_type, such as constant_with_warmup, "
            f"got {config.warmup_steps} with constant"
        )


def check_iterations(config: "GRPOTrainerConfig") -> None:
    """Checks when the reference and a reward model are refreshed."""
    if config.replay_fraction >= 1:
        raise ValueError(f"replay_fraction must be below 1, got {config.replay_fraction}")
    every = config.reference_refresh_rollouts
    if config.iterations > 1:
        if every:
            raise ValueError(
                "reference_refresh_rollouts must be none with iterations, which say when the "
                f"reference is refreshed, got {every}"
            )
        if config.max_steps % (config.iterations * config.steps_per_rollout):
            raise ValueError(
                "iterations must divide max_steps / (minibatches x num_iterations) = "
                f"{config.max_steps / config.steps_per_rollout:g} rollouts, "
                f"got {config.iterations}"
            )
    if config.reference_mix < 1 and not config.refresh_rollouts:
        raise ValueError(
            "reference_mix below 1 requires reference_refresh_rollouts, "
            f"got {config.reference_mix} without it"
        )
    if every and not config.beta:
        raise ValueError(
            "reference_refresh_rollouts requires beta > 0, because only the KL penalty uses "
            f"a reference model, got {every} with beta {config.beta}"
        )


def check_sampling(config: "GRPOTrainerConfig") -> None:
    """Checks mappings for `generate` and chat templates, and makes them as JSON has them."""
    config.generation_kwargs = check_generation_kwargs(config.generation_kwargs)
    check_template_kwargs(config.chat_template_kwargs)
    config.chat_template_kwargs = plain_values("chat_template_kwargs", config.chat_template_kwargs)
    if "" in config.stop_strings:
        raise ValueError(f"stop_strings must not be empty text, got {config.stop_strings}")


def check_advantages(config: "GRPOTrainerConfig") -> None:
    """Checks that no setting of the advantages would be ignored."""
    if config.pass_at_k is not None and config.pass_at_k > config.num_generations:
        raise ValueError(
            f"pass_at_k must be at most num_generations = {config.num_generations}, "
            f"got {config.pass_at_k}"
        )
    if config.pass_at_k is not None and config.soft_punish_cache is not None:
        raise ValueError(
            "soft_punish_cache must be none with pass_at_k, whose rewards are 0 or 1, "
            f"got {config.soft_punish_cache}"
        )
    if config.dynamic_sampling_rounds > 1 and config.num_generations == 1:
        raise ValueError(
            "dynamic_sampling_rounds must be 1 with num_generations 1, because no reward of a "
            f"group differs from another, got {config.dynamic_sampling_rounds}"
        )
    cache = config.soft_punish_cache
    if cache is not None and cache > config.max_completion_length:
        raise ValueError(
            "soft_punish_cache must be at most max_completion_length = "
            f"{config.max_completion_length}, got {cache}"
        )
    other = None if config.pass_at_k is None else "pass_at_k"
    if config.multi_objective_aggregation == "normalize_then_sum":
        if other:
            raise ValueError(
                "pass_at_k must be none with multi_objective_aggregation normalize_then_sum, "
                f"got {config.pass_at_k}"
            )
        other = "multi_objective_aggregation normalize_then_sum"
    for name in ("scale_rewards", "baseline"):
        if other and getattr(config, name) != "group":
            raise ValueError(f"{name} must be group with {other}, got {getattr(config, name)!r}")


def check_critic(config: "GRPOTrainerConfig") -> None:
    """Checks the settings of PPO, and that none of them is set without it."""
    if config.algorithm == "grpo":
        defaults = {this.name: this.default for this in fields(config)}
        for name in CRITIC_OPTIONS:
            if getattr(config, name) != defaults[name]:
                raise ValueError(f"{name} requires algorithm ppo, got {getattr(config, name)!r}")
        return
    for name, value in ONLY_OF_PPO.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} must be {value} with algorithm ppo, whose advantages come from a "
                f"critic and whose KL penalty is in the rewards, got {getattr(config, name)!r}"
            )
    shared = config.critic == "shared"
    if shared and config.loss_input == "logits":
        raise ValueError('critic shared requires loss_input "hidden", got "logits"')
    for name in ("critic_model", "critic_learning_rate"):
        if shared and getattr(config, name) is not None:
            raise ValueError(
                f"{name} must be none with critic shared, got {getattr(config, name)!r}"
            )
    if config.mixed_precision == "fp16":
        raise ValueError(
            "mixed_precision must be no or bf16 with algorithm ppo: one loss scale cannot "
            "serve two optimizers"
        )


def check_objective_parameters(loss_type: str, parameters: dict[str, float]) -> None:
    """Checks that the objective of a loss has these parameters; it checks their values itself."""
    known = [field.name for field in fields(LOSSES[loss_type].objective)]
    for name in parameters:
        if name not in known:
            raise ValueError(
                f"objective: {loss_type} has {', '.join(known) or 'no parameters'}, got {name!r}"
                f"{nearest(name, known)}"
            )
