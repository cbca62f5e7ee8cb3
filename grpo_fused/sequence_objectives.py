"""Objectives that look at a whole sequence at once: written once, in torch, on log-probabilities.

They need every log-probability of a sequence before the first gradient, so they never run inside
the kernels; autograd gives their derivative.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from grpo_fused.objectives import Objective, by_sign, check_knobs, clamped_exp


class SequenceObjective(Objective):
    """A policy objective whose value at a token depends on all tokens of its sequence.

    A subclass is a frozen dataclass with its knobs as fields, and

        evaluate(self, logp, log_ratio, advantage, correction, sequences) -> (loss, clipped)

    on (B, T) tensors, 0 where masked; `sequences` sums over tokens and spreads to them, see
    `grpo_fused.sequences`. correction is the rollout weight per sequence (B,) or token (B, T), or
    None.

    Attributes:
        uses_correction: whether the rollout weight enters `evaluate`; otherwise the loss is
            multiplied by it.
    """

    uses_correction: ClassVar[bool] = False


@dataclass(frozen=True)
class Vespo(SequenceObjective):
    """Policy gradient under a gamma-shaped weight of the whole sequence's importance weight.

        -phi A logp,   phi = sg(exp(lambda + k S - lambda e^S))
        S = clamp(sum_t clamp(logp - old_logp, -20, 20) + W, log 1e-8, 20)

    with W = sum log clamp(w, 1e-8, e^20) of the rollout weight w: over the active tokens if it is
    given per token, once if per sequence. The weight enters here and nowhere else.

    Attributes:
        k_pos, lambda_pos, k_neg, lambda_neg: shape of the weight for A >= 0 and for A < 0.

    Raises:
        ValueError: a knob that is not a finite number > 0.

    References:
        VESPO, https://arxiv.org/abs/2602.10693; the clamps are those of its authors' code and TRL.
    """

    levels: ClassVar = ("token",)
    uses_correction: ClassVar = True
    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self):
        check_knobs(self, "k_pos", "lambda_pos", "k_neg", "lambda_neg")

    def evaluate(self, logp, log_ratio, advantage, correction, sequences):
        lowest = math.log(1e-8)
        log_weight = sequences.sum(log_ratio.detach().clamp(-20.0, 20.0))
        if correction is not None:
            log_correction = correction.clamp(1e-8, math.exp(20.0)).log()
            per_sequence = correction.dim() == 1
            log_weight = log_weight + (
                log_correction if per_sequence else sequences.sum(log_correction)
            )
        s = sequences.spread(log_weight.clamp(lowest, 20.0))
        positive = advantage >= 0
        k = by_sign(positive, self.k_pos, self.k_neg, advantage)
        rate = by_sign(positive, self.lambda_pos, self.lambda_neg, advantage)
        phi = torch.exp(rate + k * s - rate * s.exp())
        nothing = advantage == 0
        weight = torch.where(nothing, 0.0, -phi * advantage)
        return torch.where(nothing, 0.0, weight * logp), torch.zeros_like(phi)


@dataclass(frozen=True)
class Gmpo(SequenceObjective):
    """Geometric mean of clipped token ratios in place of their arithmetic mean.

        -exp(mean_t z) A,   z = min(d, clamp(d, -epsilon, epsilon)) if A > 0, else max(...)

    with d = logp - old_logp: clipping is one-sided, per token, in log space.

    Attributes:
        epsilon: bound of the log-ratio; the paper's range is (e^-0.4, e^0.4).

    Raises:
        ValueError: epsilon not a finite number > 0.

    References:
        GMPO, https://arxiv.org/abs/2507.20673.
    """

    levels: ClassVar = ("sequence",)
    epsilon: float = 0.4

    def __post_init__(self):
        check_knobs(self, "epsilon")

    def evaluate(self, logp, log_ratio, advantage, correction, sequences):
        bounded = log_ratio.clamp(-self.epsilon, self.epsilon)
        gains = advantage > 0
        lower, upper = log_ratio < bounded, log_ratio > bounded
        stopped = torch.where(gains, upper, lower)
        used = torch.where(stopped, bounded.detach(), log_ratio)
        loss = -sequences.spread(clamped_exp(sequences.mean(used))[0]) * advantage
        clipped = (upper & gains).float() - (lower & (advantage < 0)).float()
        return loss, clipped
