"""Losses on log-probabilities, for all that one launch cannot do: statistics, this, gradient.

Ratios of whole sequences, objectives that couple tokens, per-token losses with any upstream
gradient. Plain torch on (B, T) tensors, differentiated by autograd; the logits are read twice and
written once.
"""

from typing import NamedTuple

import torch

from grpo_fused.divergences import DIVERGENCES, corrected, weighted
from grpo_fused.metrics import total
from grpo_fused.objectives import Objective, clamped_exp
from grpo_fused.sequence_objectives import SequenceObjective
from grpo_fused.weights import per_token


class CoupledFormula(NamedTuple):
    """What is computed of log-probabilities."""

    beta: float | torch.Tensor
    objective: Objective
    level: str
    divergence: str
    bias_correction: bool
    reduction: str
    log_ratio_bounds: tuple[float, float] | None = None


class _Derivative(torch.autograd.Function):
    """A value whose derivative in x is what it is told."""

    @staticmethod
    def forward(ctx, x, value, derivative):
        ctx.save_for_backward(derivative)
        return value.clone()

    @staticmethod
    def backward(ctx, grad_output):
        (derivative,) = ctx.saved_tensors
        return grad_output * derivative, None, None


def _selected(tokens, sequences):
    """Tokens whose masked values are 0: NaN there would come back as 0 * NaN in backward."""

    def select(values):
        return values if values is None or values.dim() == 1 else sequences.select(values)

    constants = (tokens.advantages, tokens.old_logps, tokens.ref_logps, tokens.ratios)
    advantages, old_logps, ref_logps, ratios = (select(values) for values in constants)
    return tokens._replace(
        advantages=advantages, old_logps=old_logps, ref_logps=ref_logps, ratios=ratios
    )


def _log_ratios(logps, tokens, formula, sequences):
    """(log-ratio of tokens, log-ratio of the level), (B, T), differentiable in logps.

    That of the level within the formula's bounds, outside of which it has no gradient.
    """
    if tokens.old_logps is None:
        zero = torch.where(logps.isnan(), logps, 0.0).detach()
        log_ratio = _Derivative.apply(logps, zero, torch.ones_like(logps))
    else:
        log_ratio = logps - tokens.old_logps
    log_ratio = level_log_ratio = sequences.select(log_ratio)
    if formula.level != "token":
        mean = sequences.spread(sequences.mean(log_ratio)).expand_as(log_ratio)
        level_log_ratio = mean
    if formula.level == "sequence_token":
        level_log_ratio = _Derivative.apply(log_ratio, mean.detach(), torch.ones_like(mean))
    if formula.log_ratio_bounds is not None:
        level_log_ratio = level_log_ratio.clamp(*formula.log_ratio_bounds)
    return log_ratio, level_log_ratio


def _policy(logps, log_ratio, level_log_ratio, tokens, formula, sequences):
    """(loss, clipped) of the policy term, (B, T): objective, correction, mask."""
    advantages = sequences.select(sequences.spread(tokens.advantages).float().expand_as(logps))
    objective, correction, on = formula.objective, tokens.ratios, None
    if tokens.policy_mask is not None:
        # NaN that is only selected away behind the objective would come back in backward. Signs
        # stay: they tell which bound was reached.
        on = (sequences.spread(tokens.policy_mask) != 0).expand_as(logps)
        advantages = torch.where(on, advantages, advantages.sign().nan_to_num())
        known = on | ~level_log_ratio.isnan()
        level_log_ratio = torch.where(known, level_log_ratio, 0.0)
    if isinstance(objective, SequenceObjective):
        loss, clipped = objective.evaluate(logps, log_ratio, advantages, correction, sequences)
        correction = None if objective.uses_correction else correction
    else:
        loss, _, clipped = objective.evaluate(logps, level_log_ratio, advantages)
    if correction is not None:
        correction = sequences.spread(correction)
        loss = loss * (correction if on is None else torch.where(on, correction, 0.0))
    return (loss if on is None else torch.where(on, loss, 0.0)), clipped


def _penalty(logps, level_log_ratio, tokens, formula):
    """(KL, beta KL), (B, T), the second differentiable; exactly 0 where beta is."""
    ratio, dratio = clamped_exp(level_log_ratio)
    of_own_token = formula.bias_correction and formula.level != "sequence"
    divergence, difference = DIVERGENCES[formula.divergence], tokens.ref_logps - logps.detach()
    if of_own_token:
        value, slope = corrected(divergence, difference, ratio.detach(), dratio.detach())
    else:
        value, slope, _ = divergence(difference)
    # Weighted before autograd sees them: 0 times an infinite derivative would be NaN.
    terms = (weighted(formula.beta, term) for term in (value, slope))
    penalty = _Derivative.apply(logps, *terms)
    if formula.bias_correction and not of_own_token:
        value, penalty = value * ratio.detach(), penalty * ratio
    return value, penalty


def coupled_loss(logps, entropies, tokens, weights, formula, sequences):
    """(loss, sums, metrics) of `grpo_loss` from log-probabilities and entropies (B, T).

    The loss is () or, for reduction="none", (B, T); sums and metrics are detached.
    """
    tokens = _selected(tokens, sequences)
    log_ratio, level_log_ratio = _log_ratios(logps, tokens, formula, sequences)
    policy, clipped = _policy(logps, log_ratio, level_log_ratio, tokens, formula, sequences)
    kl = penalty = torch.zeros_like(logps)
    if tokens.ref_logps is not None:
        kl, penalty = _penalty(logps, level_log_ratio, tokens, formula)
        kl = sequences.select(kl)
    bonus = 0.0
    if weights.entropy_coef is not None:
        bonus = weights.entropy_coef * entropies
    if formula.reduction == "none":
        loss = sequences.select(policy + penalty - bonus)
    else:
        terms = per_token(weights.items, weights.divisor, sequences) * policy
        terms = terms + per_token(weights.kl_items, weights.kl_divisor, sequences) * penalty
        if weights.entropy_coef is not None:
            terms = terms - per_token(weights.entropy_items, 1.0, sequences) * bonus
        loss = sequences.select(terms).sum()

    with torch.no_grad():
        active = torch.ones_like(logps, dtype=torch.bool)
        active = active if sequences.active is None else sequences.active
        ratio, clipped = clamped_exp(level_log_ratio)[0], sequences.select(clipped)
        units = active
        if isinstance(formula.objective, SequenceObjective):
            ratio = clamped_exp(log_ratio)[0]
        elif formula.level == "sequence" and tokens.advantages.dim() == 1:
            units = torch.ones(sequences.number, dtype=torch.bool, device=logps.device)
            ratio = clamped_exp(sequences.mean(log_ratio))[0]
            clipped = sequences.mean(clipped)
        ratio = torch.where(units, ratio, 0.0)
        entropy = None if entropies is None else entropies.detach()
        counts = (x.sum().float() for x in (active, units))
        sums, metrics = total(loss.detach(), kl.detach(), entropy, clipped, ratio, *counts)
    return loss, sums, metrics
