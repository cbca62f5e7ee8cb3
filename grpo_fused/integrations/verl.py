"""Policy losses for verl, under `grpo_fused_*` names, as soon as both packages are installed.

verl imports this module by its entry point group `verl.plugins`; a run chooses a loss with
`actor_rollout_ref.actor.policy_loss.loss_mode=grpo_fused_vanilla`. Configuration, aggregation,
divisors and metrics are verl's, so that nothing else changes. Names of its own losses stand for
the same loss:

    grpo_fused_vanilla    Clip with clip_ratio_low, clip_ratio_high and the dual clip clip_ratio_c
    grpo_fused_gspo       Clip of the ratio of sequences, GSPO-token
    grpo_fused_sapo       Sapo with tau_pos, tau_neg; always seq-mean-token-mean, as in verl
    grpo_fused_cispo      Cispo whose weight is within [1 - clip_ratio_low, 1 + clip_ratio_high]
    grpo_fused_geo_mean   Gmpo with clip_ratio; always seq-mean-token-mean
    grpo_fused_gpg        PolicyGradient
    grpo_fused_vespo      Vespo, which verl does not have

Log-probabilities and entropies are made before verl calls a loss: `verl_kernels`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from verl.trainer.ppo.core_algos import register_policy_loss

from grpo_fused import Cispo, Clip, Gmpo, PolicyGradient, Sapo, Vespo, grpo_loss_from_logps
from grpo_fused.checks import check_choice
from grpo_fused.objectives import Objective
from grpo_fused.sequences import Padded

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
LIMIT = 20.0  # verl's clamp of log-ratios of tokens


def _by_objective(log_ratio, advantages):
    """Share of clipped tokens: None = what the objective itself says."""
    return None


def _never(log_ratio, advantages):
    return torch.zeros_like(log_ratio)


class Recipe(NamedTuple):
    """One of verl's losses in terms of this package.

    Attributes:
        objective, level: as `grpo_loss`.
        bounds: of the log-ratio of the level, as `grpo_loss_from_logps`.
        limit: of the log-ratio of tokens where it is reported, as actor/ppo_kl.
        aggregation: the only loss_agg_mode that has a meaning; None = the configured one.
        upper, lower: (log-ratio, advantages) (B, T) -> tokens that actor/pg_clipfrac and
            actor/pg_clipfrac_lower count.
    """

    objective: Objective
    level: str = "token"
    bounds: tuple[float, float] | None = (-LIMIT, LIMIT)
    limit: float = LIMIT
    aggregation: str | None = None
    upper: Callable = _by_objective
    lower: Callable = _never


def clip_ratios(config):
    """(low, high) of an actor's configuration, clip_ratio where they are not set."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return (
        config.clip_ratio if low is None else low,
        config.clip_ratio if high is None else high,
    )


def vanilla(config):
    low, high = clip_ratios(config)
    cap = config.get("clip_ratio_c", 3.0)
    # verl caps where A < 0 alone, Clip on both sides: the same from 1 + high on.
    if not (cap > 1 and cap >= 1 + high):
        raise ValueError(
            f"clip_ratio_c must be > 1 and at least 1 + clip_ratio_high = {1 + high}, got {cap}"
        )
    return Recipe(Clip(low, high, cap), lower=lambda d, A: ((d > math.log(cap)) & (A < 0)).float())


def gspo(config):
    return Recipe(Clip(*clip_ratios(config)), "sequence_token", (-math.inf, 10.0), math.inf)


def sapo(config):
    objective = Sapo(config.tau_pos, config.tau_neg)
    return Recipe(objective, aggregation="seq-mean-token-mean", upper=_never)


def cispo(config):
    low, high = clip_ratios(config)
    lowest = max(math.log(1 - low), -LIMIT) if low < 1 else -LIMIT
    highest = math.log1p(high)
    # max(ratio, 1 - low) is the exponential of a log-ratio that is clamped below.
    return Recipe(
        Cispo(1 + high),
        bounds=(lowest, LIMIT),
        upper=lambda d, A: ((d < lowest) | (d > highest)).float(),
    )


def geo_mean(config):
    low, high = clip_ratios(config)
    if low != high:
        raise ValueError(
            f"clip_ratio_low and clip_ratio_high must be the same for Gmpo, got {low} and {high}"
        )
    return Recipe(
        *(Gmpo(low), "sequence", None, math.inf, "seq-mean-token-mean"),
        upper=lambda d, A: ((d.abs() > low) & (A > 0)).float(),
        lower=lambda d, A: ((d.abs() > low) & (A < 0)).float(),
    )


def gpg(config):
    return Recipe(PolicyGradient(), upper=_never)


def vespo(config):
    return Recipe(Vespo(), upper=_never)


RECIPES = {recipe.__name__: recipe for recipe in (vanilla, gspo, sapo, cispo, geo_mean, gpg, vespo)}


def policy_loss(recipe):
    """A policy loss with verl's signature, for its `register_policy_loss`.

    Args:
        recipe: function of the actor's configuration that returns a Recipe.

    Returns:
        fn(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
        rollout_is_weights) -> (loss () float32, dict of floats): all tensors (B, T). The metrics
        are verl's: actor/pg_clipfrac, actor/ppo_kl, actor/pg_clipfrac_lower. Masked values may be
        anything; without an active token the loss is a differentiable 0. One transfer from the
        device for the three metrics. It raises ValueError for an unknown loss_agg_mode, for a
        global divisor that dp_size > 1 needs, and as `grpo_loss_from_logps`.

    Example:
        register_policy_loss("my_sapo")(policy_loss(lambda config: Recipe(Sapo(0.9, 1.2))))

    References:
        verl 0.9.1, verl/trainer/ppo/core_algos.py: compute_policy_loss_* and agg_loss.
    """

    def loss(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode="token-mean",
        config=None,
        rollout_is_weights=None,
    ):
        if config is None:
            raise ValueError("config must be the configuration of the actor, got None")
        made = recipe(config)
        sequences = Padded(response_mask, response_mask)
        weights = rollout_is_weights
        if weights is not None and isinstance(made.objective, Gmpo):
            # A geometric mean, as that of the ratios that they correct.
            weights = sequences.mean(weights.float().clamp(min=1e-10).log()).exp()
        rule, dp_size, divisors = aggregation(
            made.aggregation or loss_agg_mode, sequences, **config.global_batch_info
        )
        out = grpo_loss_from_logps(
            log_prob,
            response_mask,
            advantages,
            old_logps=old_log_prob,
            importance_sampling_ratio=weights,
            objective=made.objective,
            importance_sampling_level=made.level,
            log_ratio_bounds=made.bounds,
            normalizer=rule,
            **divisors,
        )
        return out.loss * dp_size, metrics(made, out, old_log_prob, advantages, sequences)

    return loss


def aggregation(
    loss_agg_mode,
    sequences,
    *,
    dp_size=1,
    batch_num_tokens=None,
    global_batch_size=None,
    loss_scale_factor=None,
):
    """(normalizer, factor of the loss, divisors) that stand for verl's `agg_loss`.

    verl counts sequences with an active token alone, unless it is told global_batch_size; it
    multiplies by dp_size because gradients are averaged over ranks.
    """
    check_choice("loss_agg_mode", loss_agg_mode, AGGREGATIONS)
    number, name = batch_num_tokens, "batch_num_tokens"
    if loss_agg_mode.startswith("seq-mean"):
        number, name = global_batch_size, "global_batch_size"
    if number is None and dp_size > 1 and loss_agg_mode != "token-sum":
        raise ValueError(f"{name} is needed for {loss_agg_mode} when dp_size > 1, got None")
    if global_batch_size is None:
        global_batch_size = (sequences.counts > 0).sum().clamp(min=1)
    divisors = {
        "num_items_in_batch": batch_num_tokens,
        "num_sequences_in_batch": global_batch_size,
        "max_completion_length": loss_scale_factor,
    }
    return loss_agg_mode, dp_size, divisors


@torch.no_grad()
def metrics(recipe, out, old_log_prob, advantages, sequences):
    """verl's metrics by its names, as floats: means over active tokens."""
    log_ratio = sequences.select(out.logps - old_log_prob.float())
    log_ratio = log_ratio.clamp(-recipe.limit, recipe.limit)

    def mean(values):
        return sequences.select(values).sum() / sequences.total.clamp(min=1)

    upper = recipe.upper(log_ratio, advantages)
    region = out.metrics["clip_ratio/region_mean"] if upper is None else mean(upper)
    values = (region, mean(-log_ratio), mean(recipe.lower(log_ratio, advantages)))
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    return dict(zip(names, torch.stack(values).tolist(), strict=True))


POLICY_LOSSES = {
    name: register_policy_loss(f"grpo_fused_{name}")(policy_loss(recipe))
    for name, recipe in RECIPES.items()
}
