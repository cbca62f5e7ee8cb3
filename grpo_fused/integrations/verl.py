"""Policy losses for verl, registered as `grpo_fused_*` as soon as both packages are installed.

verl imports this module through its entry point group `verl.plugins`. A run selects a loss with
`actor_rollout_ref.actor.policy_loss.loss_mode=grpo_fused_vanilla`; configuration, aggregation,
divisors and metrics are those of verl. Each loss corresponds to verl's loss of the same name:

    grpo_fused_vanilla    Clip with clip_ratio_low, clip_ratio_high and the dual clip clip_ratio_c
    grpo_fused_gspo       Clip of sequence ratios (GSPO-token)
    grpo_fused_sapo       Sapo with tau_pos, tau_neg; always seq-mean-token-mean, as in verl
    grpo_fused_cispo      Cispo with weights in [1 - clip_ratio_low, 1 + clip_ratio_high]
    grpo_fused_geo_mean   Gmpo with clip_ratio; always seq-mean-token-mean
    grpo_fused_gpg        PolicyGradient
    grpo_fused_dppo_tv    DppoTv with clip_ratio_low, clip_ratio_high, clip_ratio_c; and dppo_kl
    grpo_fused_dro        Dro with policy_loss.dro_beta
    grpo_fused_clip_cov   ClipCov with policy_loss.clip_cov_*, which draws nothing at random
    grpo_fused_kl_cov     KlCov with policy_loss.kl_cov_ratio, ppo_kl_coef
    grpo_fused_vespo      Vespo, which verl does not have
    grpo_fused_bypass_mode    Clip over the rollout, or PolicyGradient with its importance weights,
                          by policy_loss.rollout_correction.loss_type

verl computes log-probabilities and entropies before it calls a loss; `verl_kernels` replaces those
functions.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from verl.trainer.ppo.core_algos import register_policy_loss

from grpo_fused import (
    Cispo,
    Clip,
    ClipCov,
    DppoKl,
    DppoTv,
    Dro,
    Gmpo,
    KlCov,
    LossOutput,
    PolicyGradient,
    Sapo,
    Vespo,
    grpo_loss_from_logps,
)
from grpo_fused.checks import check_choice
from grpo_fused.integrations.verl_bypass import Correction, correct, correction_options
from grpo_fused.losses.objectives import Objective
from grpo_fused.selections import large_covariances
from grpo_fused.sequences import Padded

if TYPE_CHECKING:
    from verl.workers.config import ActorConfig

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
LIMIT = 20.0  # verl clamps log-ratios of tokens to +-20


class Told(NamedTuple):
    """What metrics are made of: (B, T) each, 0 under the mask.

    Attributes:
        log_ratio: clamped by the limit of the recipe.
        advantages, logps: of the tokens.
        active: bool.
    """

    log_ratio: torch.Tensor
    advantages: torch.Tensor
    logps: torch.Tensor
    active: torch.Tensor


def _clipped_by_objective(told):
    """Return None: `metrics` then reports the clip ratio of the objective."""
    return None


def _never_clipped(told):
    return torch.zeros_like(told.log_ratio)


class Recipe(NamedTuple):
    """A policy loss of verl, expressed with the objectives of this package.

    Attributes:
        objective: objective of `grpo_loss_from_logps`.
        level: its importance_sampling_level.
        bounds: its log_ratio_bounds, which clamp the log-ratio at that level.
        limit: clamp of the token log-ratios that enter the metrics, such as actor/ppo_kl.
        aggregation: the loss_agg_mode of a loss that supports only one; None = the configured one.
        upper: `Told` -> (B, T) indicator of the tokens that actor/pg_clipfrac counts; None instead
            of a tensor = the clip ratio of the objective.
        lower: the same for actor/pg_clipfrac_lower.
        kl: log-ratios -> the values of which actor/ppo_kl is the mean.
        correct: (log_prob, old_log_prob, response_mask) -> `Correction`, whose mask and weights
            replace those of the call; None = no correction.
    """

    objective: Objective
    level: str = "token"
    bounds: tuple[float, float] | None = (-LIMIT, LIMIT)
    limit: float = LIMIT
    aggregation: str | None = None
    upper: Callable[[Told], torch.Tensor | None] = _clipped_by_objective
    lower: Callable[[Told], torch.Tensor] = _never_clipped
    kl: Callable[[torch.Tensor], torch.Tensor] = torch.neg
    correct: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Correction] | None = None


def clip_ratios(config: "ActorConfig") -> tuple[float, float]:
    """Return (low, high) of an actor's configuration; clip_ratio replaces a missing one."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return (
        config.clip_ratio if low is None else low,
        config.clip_ratio if high is None else high,
    )


def vanilla(config: "ActorConfig") -> Recipe:
    low, high = clip_ratios(config)
    cap = config.get("clip_ratio_c", 3.0)
    # verl caps the ratio only where A < 0, Clip for both signs: equal for caps from 1 + high on.
    if not (cap > 1 and cap >= 1 + high):
        raise ValueError(
            f"clip_ratio_c must be > 1 and at least 1 + clip_ratio_high = {1 + high}, got {cap}"
        )
    return Recipe(
        Clip(low, high, cap),
        lower=lambda told: ((told.log_ratio > math.log(cap)) & (told.advantages < 0)).float(),
    )


def gspo(config: "ActorConfig") -> Recipe:
    return Recipe(Clip(*clip_ratios(config)), "sequence_token", (-math.inf, 10.0), math.inf)


def sapo(config: "ActorConfig") -> Recipe:
    objective = Sapo(config.tau_pos, config.tau_neg)
    return Recipe(objective, aggregation="seq-mean-token-mean", upper=_never_clipped)


def cispo(config: "ActorConfig") -> Recipe:
    low, high = clip_ratios(config)
    log_low = max(math.log(1 - low), -LIMIT) if low < 1 else -LIMIT
    log_high = math.log1p(high)
    return Recipe(
        Cispo(1 + high, max(1 - low, 0.0)),
        upper=lambda told: ((told.log_ratio < log_low) | (told.log_ratio > log_high)).float(),
    )


def geo_mean(config: "ActorConfig") -> Recipe:
    low, high = clip_ratios(config)
    if low != high:
        raise ValueError(
            f"clip_ratio_low and clip_ratio_high must be equal for Gmpo, got {low} and {high}"
        )
    return Recipe(
        Gmpo(low),
        level="sequence",
        bounds=None,
        limit=math.inf,
        aggregation="seq-mean-token-mean",
        upper=lambda told: ((told.log_ratio.abs() > low) & (told.advantages > 0)).float(),
        lower=lambda told: ((told.log_ratio.abs() > low) & (told.advantages < 0)).float(),
    )


def gpg(config: "ActorConfig") -> Recipe:
    return Recipe(PolicyGradient(), upper=_never_clipped)


def _dppo(objective):
    def outside(told):
        # verl counts tokens without an advantage as it does those below 0.
        advantages = torch.where(told.advantages == 0, -1.0, told.advantages)
        return objective.evaluate(told.logps, told.log_ratio, advantages)[2] != 0

    def capped(told):
        return ((told.log_ratio > math.log(objective.max_ratio)) & ~outside(told)).float()

    return Recipe(objective, bounds=None, upper=lambda told: outside(told).float(), lower=capped)


def dppo_tv(config: "ActorConfig") -> Recipe:
    return _dppo(DppoTv(*clip_ratios(config), config.get("clip_ratio_c", 20.0)))


def dppo_kl(config: "ActorConfig") -> Recipe:
    return _dppo(DppoKl(*clip_ratios(config), config.get("clip_ratio_c", 20.0)))


def dro(config: "ActorConfig") -> Recipe:
    strength = config.policy_loss.dro_beta
    if strength is None or strength <= 0:
        raise ValueError(f"policy_loss.dro_beta must be > 0, got {strength}")
    return Recipe(Dro(strength), bounds=None, limit=math.inf, upper=_never_clipped)


def _given(options, **defaults):
    """Values of a configuration, or their defaults where it has None."""
    found = {name: getattr(options, name) for name in defaults}
    return (defaults[name] if value is None else value for name, value in found.items())


def clip_cov(config: "ActorConfig") -> Recipe:
    shares = _given(config.policy_loss, clip_cov_ratio=2e-4, clip_cov_lb=1.0, clip_cov_ub=5.0)
    objective = ClipCov(*clip_ratios(config), *shares)
    clip = Clip(objective.epsilon_low, objective.epsilon_high)

    def selected(told):
        clipped = clip.evaluate(told.logps, told.log_ratio, told.advantages)[2]
        bounds = (objective.share, objective.low, objective.high)
        arguments = (told.advantages, told.logps, told.active, *bounds)
        return large_covariances(*arguments, eligible=clipped == 0).float()

    return Recipe(objective, bounds=None, limit=math.inf, upper=selected)


def kl_cov(config: "ActorConfig") -> Recipe:
    share, strength = _given(config.policy_loss, kl_cov_ratio=2e-4, ppo_kl_coef=1.0)
    return Recipe(
        KlCov(share, strength), bounds=None, limit=math.inf, upper=_never_clipped, kl=torch.abs
    )


def vespo(config: "ActorConfig") -> Recipe:
    return Recipe(Vespo(), upper=_never_clipped)


def bypass_mode(config: "ActorConfig") -> Recipe:
    options = correction_options(config)
    if options.get("loss_type", "ppo_clip") == "reinforce":
        recipe = Recipe(PolicyGradient(), limit=math.inf, upper=_never_clipped)
        return recipe._replace(correct=partial(correct, options))

    def without_weights(*arguments):  # the clipped ratio is one over the rollout itself
        return correct(options, *arguments)._replace(weights=None)

    return vanilla(config)._replace(correct=without_weights)


RECIPES: dict[str, Callable[["ActorConfig"], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        *(vanilla, gspo, sapo, cispo, geo_mean, gpg),
        *(dppo_tv, dppo_kl, dro, clip_cov, kl_cov, vespo, bypass_mode),
    )
}


def policy_loss(
    recipe: Callable[["ActorConfig"], Recipe],
) -> Callable[..., tuple[torch.Tensor, dict[str, float]]]:
    """Make a policy loss with verl's signature, for verl's `register_policy_loss`.

    Args:
        recipe: maps the configuration of the actor to a `Recipe`.

    Returns:
        loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
        rollout_is_weights) -> (loss, metrics), as verl calls it. Tensors are (B, T); masked values
        may be anything. The loss is () float32, a differentiable 0 if no token is active. The
        metrics are the floats actor/pg_clipfrac, actor/ppo_kl and actor/pg_clipfrac_lower, which
        take one device-to-host copy, and those of a correction. It raises ValueError without a
        config, for an unknown loss_agg_mode, for a missing global divisor if dp_size > 1, and as
        `grpo_loss_from_logps`.

    Example:
        register_policy_loss("my_sapo")(policy_loss(lambda config: Recipe(Sapo(0.9, 1.2))))

    References:
        verl 0.9.1, verl/trainer/ppo/core_algos.py: compute_policy_loss_* and agg_loss.
    """

    def loss(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = "token-mean",
        config: "ActorConfig | None" = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        if config is None:
            raise ValueError("config must be the configuration of the actor, got None")
        configured = recipe(config)
        weights: torch.Tensor | None = rollout_is_weights
        told: dict[str, float] = {}
        if configured.correct is not None:
            corrected = configured.correct(log_prob.detach(), old_log_prob, response_mask)
            response_mask, weights, told = corrected
        sequences = Padded(response_mask.shape, response_mask)
        if weights is not None and isinstance(configured.objective, Gmpo):
            # The ratio of GMPO is a geometric mean over tokens; so is its correction.
            weights = sequences.mean(weights.float().clamp(min=1e-10).log()).exp()
        normalizer, dp_size, divisors = aggregation(
            configured.aggregation or loss_agg_mode, response_mask, **config.global_batch_info
        )
        out = grpo_loss_from_logps(
            log_prob,
            response_mask,
            advantages,
            old_logps=old_log_prob,
            importance_sampling_ratio=weights,
            objective=configured.objective,
            importance_sampling_level=configured.level,
            log_ratio_bounds=configured.bounds,
            normalizer=normalizer,
            **divisors,
        )
        told = told | metrics(configured, out, old_log_prob, advantages, sequences)
        return out.loss * dp_size, told

    return loss


def aggregation(
    loss_agg_mode: str,
    response_mask: torch.Tensor,
    *,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[str, int, dict[str, Any]]:
    """Translate the arguments of verl's `agg_loss`.

    Without global_batch_size, verl counts only sequences with an active token. It multiplies the
    loss by dp_size, because gradients are averaged over ranks.

    Args:
        loss_agg_mode: one of AGGREGATIONS.
        response_mask: (B, T), nonzero = active.
        dp_size, batch_num_tokens, global_batch_size, loss_scale_factor: as verl's.

    Returns:
        (normalizer, factor of the loss, divisors as keywords of `grpo_loss_from_logps`).

    Raises:
        ValueError: unknown loss_agg_mode; dp_size > 1 without the global divisor of the mode.
    """
    check_choice("loss_agg_mode", loss_agg_mode, AGGREGATIONS)
    number, name = batch_num_tokens, "batch_num_tokens"
    if loss_agg_mode.startswith("seq-mean"):
        number, name = global_batch_size, "global_batch_size"
    if number is None and dp_size > 1 and loss_agg_mode != "token-sum":
        raise ValueError(f"{name} is required for {loss_agg_mode} if dp_size > 1, got None")
    with_tokens = (response_mask != 0).any(1).sum().clamp(min=1)
    divisors = {
        "num_items_in_batch": batch_num_tokens,
        "num_sequences_in_batch": with_tokens if global_batch_size is None else global_batch_size,
        "max_completion_length": loss_scale_factor,
    }
    return loss_agg_mode, dp_size, divisors


@torch.no_grad()
def metrics(
    recipe: Recipe,
    out: LossOutput,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    sequences: Padded,
) -> dict[str, float]:
    """Compute verl's metrics, means over active tokens."""
    log_ratio = sequences.select(out.logps - old_log_prob.float())
    log_ratio = log_ratio.clamp(-recipe.limit, recipe.limit)

    def mean(values):
        return sequences.select(values).sum() / sequences.total.clamp(min=1)

    told = Told(log_ratio, sequences.select(advantages), out.logps, sequences.active)
    upper = recipe.upper(told)
    region = out.metrics["clip_ratio/region_mean"] if upper is None else mean(upper)
    values = (region, mean(recipe.kl(log_ratio)), mean(recipe.lower(told)))
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    return dict(zip(names, torch.stack(values).tolist(), strict=True))


POLICY_LOSSES = {
    name: register_policy_loss(f"grpo_fused_{name}")(policy_loss(recipe))
    for name, recipe in RECIPES.items()
}
