"""Checks of settings that depend on each other, or on another library."""

from dataclasses import fields
from typing import TYPE_CHECKING

from grpo_fused import LOSSES
from grpo_fused.checks import nearest
from grpo_fused.trainer.rollouts.chat import check_template_kwargs
from grpo_fused.trainer.rollouts.generation import check_generation_kwargs, plain_values

if TYPE_CHECKING:
    from grpo_fused.trainer.run.config import GRPOTrainerConfig


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


def check_objective_parameters(loss_type: str, parameters: dict[str, float]) -> None:
    """Checks that the objective of a loss has these parameters; it checks their values itself."""
    known = [field.name for field in fields(LOSSES[loss_type].objective)]
    for name in parameters:
        if name not in known:
            raise ValueError(
                f"objective: {loss_type} has {', '.join(known) or 'no parameters'}, got {name!r}"
                f"{nearest(name, known)}"
            )
