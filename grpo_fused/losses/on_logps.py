"""The loss on log-probabilities, for losses that one launch cannot compute.

Sequence-level ratios, objectives over whole sequences, per-token losses with any upstream gradient.
Plain torch on (B, T) tensors, differentiated by autograd; over logits it takes a second read of
them.
"""

from typing import NamedTuple

import torch

from grpo_fused.bundles import LossResults, OverSupport
from grpo_fused.losses.kl import KL_ESTIMATORS, corrected, weighted
from grpo_fused.losses.metrics import Terms, total, without_ratios
from grpo_fused.losses.objectives import OF_SEQUENCES, Objective, clamped_exp


class LogpsFormula(NamedTuple):
    """Which loss is computed from log-probabilities."""

    objective: Objective
    level: str  # importance sampling level
    kl_estimator: str
    bias_correction: bool
    reduction: str  # "sum" or "none"
    log_ratio_bounds: tuple[float, float] | None = None
    over: OverSupport = OverSupport()

    @property
    def couples_tokens(self):
        """Whether the loss of a token depends on other tokens of its sequence."""
        return self.level != "token" or self.objective.couples == "sequence"

    @property
    def needs_level(self):
        """Whether the log-ratio of the level is read: `SequenceObjective`s make their own."""
        return self.bias_correction or self.objective.couples != "sequence"


class Derivative(torch.autograd.Function):
    """A value with a given derivative in x."""

    @staticmethod
    def forward(ctx, x, value, derivative):
        ctx.save_for_backward(derivative)
        return value.clone()

    @staticmethod
    def backward(ctx, grad_output):
        (derivative,) = ctx.saved_tensors
        return grad_output * derivative, None, None


def _without_masked(tokens, sequences):
    """Tokens whose masked values are 0: a NaN there would come back as 0 * NaN in backward."""

    def select(values):
        per_token = isinstance(values, torch.Tensor) and values.dim() == 2
        return sequences.select(values) if per_token else values

    names = ("advantages", "old_logps", "ref_logps", "sampling_logps", "correction")
    names += ("w_policy", "w_kl", "w_entropy")
    return tokens._replace(**{name: select(getattr(tokens, name)) for name in names})


def _log_ratios(logps, tokens, formula, sequences):
    """(log-ratio of tokens, of the level, both (B, T), of sequences), differentiable in logps.

    The log-ratio of the level lies within the formula's bounds; outside it has no gradient. Those
    of sequences (B,), means or at level "sequence_sum" sums, are None at level "token".
    """
    if tokens.old_logps is None:
        zero = torch.where(logps.isnan(), logps, 0.0).detach()
        log_ratio = Derivative.apply(logps, zero, torch.ones_like(logps))
    else:
        log_ratio = logps - tokens.old_logps
    log_ratio = level_log_ratio = sequences.select(log_ratio)
    of_sequences = None
    if formula.level != "token" and formula.needs_level:
        reduce = sequences.sum if formula.level == "sequence_sum" else sequences.mean
        of_sequences = reduce(log_ratio)
        level_log_ratio = spread = sequences.spread(of_sequences).expand_as(log_ratio)
    if formula.level == "sequence_token":
        level_log_ratio = Derivative.apply(log_ratio, spread.detach(), torch.ones_like(spread))
    if formula.log_ratio_bounds is not None:
        level_log_ratio = level_log_ratio.clamp(*formula.log_ratio_bounds)
    return log_ratio, level_log_ratio, of_sequences


def _policy(logps, log_ratio, level_log_ratio, tokens, formula, sequences):
    """(weighted loss, clipped) of the policy term, (B, T)."""
    advantages = sequences.select(sequences.spread(tokens.advantages).expand_as(logps))
    weight, objective, on = tokens.w_policy, formula.objective, None
    if isinstance(weight, torch.Tensor) and weight.dim():
        # A NaN that is selected away only after the objective would come back in backward. Signs
        # stay, because they decide which bound counts as reached.
        on = weight != 0
        advantages = torch.where(on, advantages, advantages.sign().nan_to_num())
        level_log_ratio = torch.where(on | ~level_log_ratio.isnan(), level_log_ratio, 0.0)
        log_ratio = torch.where(on | ~log_ratio.isnan(), log_ratio, 0.0)
    if objective.couples == "sequence":
        arguments = (logps, log_ratio, advantages, tokens.correction, sequences)
        loss, clipped = objective.evaluate(*arguments)
    elif objective.couples == "batch":
        counted = sequences.active if on is None else sequences.select(on).bool()
        loss, clipped = objective.evaluate(logps, level_log_ratio, advantages, counted)
    else:
        arguments = (logps, level_log_ratio, advantages, tokens.sampling_logps)
        loss, _, clipped = objective.of_tokens(*arguments)
    return weighted(weight, loss), clipped


def _penalty(logps, level_log_ratio, tokens, formula):
    """(KL, weighted KL), (B, T), the second differentiable; exactly 0 where its weight is.

    Args:
        logps: log-probabilities that are compared with the reference's.
    """
    ratio, dratio = clamped_exp(level_log_ratio)
    one_softmax = formula.over.policy == formula.over.kl
    of_own_token = formula.bias_correction and formula.level not in OF_SEQUENCES and one_softmax
    estimator, difference = KL_ESTIMATORS[formula.kl_estimator], tokens.ref_logps - logps.detach()
    if of_own_token:
        value, slope = corrected(estimator, difference, ratio.detach(), dratio.detach())
    else:
        value, slope, _ = estimator(difference)
    # Weighted before autograd sees them: 0 times an infinite derivative would be NaN.
    terms = (weighted(tokens.w_kl, term) for term in (value, slope))
    penalty = Derivative.apply(logps, *terms)
    if formula.bias_correction and not of_own_token:
        value, off = value * ratio.detach(), tokens.w_kl == 0.0
        if isinstance(off, torch.Tensor):
            penalty = penalty * torch.where(off, 0.0, ratio)
        elif not off:  # 0 times a ratio that is NaN would be NaN
            penalty = penalty * ratio
    return value, penalty


def loss_on_logps(found, tokens, formula, sequences):
    """`LossResults` of `grpo_loss` from `LogProbs` (B, T).

    The loss is () or, for reduction="none", (B, T); all else but the log-probabilities and
    entropies, which are those of the formula, is detached.
    """
    (logps, _), (_, entropies) = found.over(formula.over.policy), found.over(formula.over.entropy)
    tokens = _without_masked(tokens, sequences)
    log_ratio, level_log_ratio, of_sequences = _log_ratios(logps, tokens, formula, sequences)
    loss, clipped = _policy(logps, log_ratio, level_log_ratio, tokens, formula, sequences)
    kl = torch.zeros_like(logps)
    if tokens.ref_logps is not None:
        kl_logps, _ = found.over(formula.over.kl)
        kl, penalty = _penalty(kl_logps, level_log_ratio, tokens, formula)
        loss, kl = loss + penalty, sequences.select(kl)
    if tokens.w_entropy is not None:
        loss = loss - weighted(tokens.w_entropy, entropies)
    loss = sequences.select(loss)
    loss = loss if formula.reduction == "none" else loss.sum()

    with torch.no_grad():
        active = torch.ones_like(logps, dtype=torch.bool)
        active = active if sequences.active is None else sequences.active
        ratio, clipped = clamped_exp(level_log_ratio)[0], sequences.select(clipped)
        units = active
        if formula.objective.couples == "sequence":
            ratio = clamped_exp(log_ratio)[0]
        elif formula.level in OF_SEQUENCES and tokens.advantages.dim() == 1:
            units = torch.ones(sequences.number, dtype=torch.bool, device=logps.device)
            ratio = clamped_exp(of_sequences)[0]
            clipped = sequences.mean(clipped)
        ratio = torch.where(units, ratio, 0.0)
        entropy = 0.0 if entropies is None else entropies.detach()
        of_tokens = (loss.detach(), kl.detach(), entropy, active)
        sums, metrics = total(Terms(*of_tokens, clipped, ratio, units))
        if units is not active and sequences.group is not None and sequences.group.rank():
            sums = without_ratios(sums)  # the first rank counts the sequences
    return LossResults(loss, sums, metrics, logps, entropies)
