"""Policy objectives that couple the tokens of a sequence.

The gradient at any token depends on the log-probabilities of all tokens, so they run in torch on
log-probabilities, outside of the kernels, and autograd differentiates them.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grpo_fused.losses.objectives import Clip, Objective, by_sign, check_params, clamped_exp
from grpo_fused.sequences import Padded


class SequenceObjective(Objective):
    """Base class of objectives whose value at a token depends on all tokens of its sequence.

    A subclass is a frozen dataclass of its parameters and implements

        evaluate(self, logp, log_ratio, advantage, correction, sequences) -> (loss, clipped)

    on (B, T) tensors that are 0 where masked. correction is the importance_sampling_ratio, (B,),
    (B, T) or None. `sequences` (`Padded` or `Packed`) reduces over the tokens of each sequence and
    broadcasts to them.

    Attributes:
        uses_correction: whether `evaluate` applies the correction; if not, the caller multiplies
            the loss by it.
    """

    couples: ClassVar[str] = "sequence"
    uses_correction: ClassVar[bool] = False


@dataclass(frozen=True)
class Vespo(SequenceObjective):
    """Policy gradient weighted by a gamma-shaped function of the sequence importance weight.

        -phi A logp,   phi = sg(exp(lambda + k S - lambda e^S))
        S = clamp(sum_t clamp(logp - old_logp, -20, 20) + W, log 1e-8, 20)

    with W = log clamp(w, 1e-8, e^20) for an importance_sampling_ratio w per sequence, or the sum
    of these logarithms over the active tokens for w per token. w has no other effect on the loss.

    Attributes:
        k_pos, lambda_pos: shape of the weight for A >= 0.
        k_neg, lambda_neg: shape of the weight for A < 0.

    Raises:
        ValueError: a k is not a finite number >= 0, or a lambda not one > 0.

    References:
        VESPO, https://arxiv.org/abs/2602.10693; clamps as in the authors' code and TRL.
    """

    levels: ClassVar[tuple[str, ...]] = ("token",)
    uses_correction: ClassVar[bool] = True
    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        check_params(self, "k_pos", "k_neg", zero=True)
        check_params(self, "lambda_pos", "lambda_neg")

    def evaluate(
        self,
        logp: Tensor,
        log_ratio: Tensor,
        advantage: Tensor,
        correction: Tensor | None,
        sequences: Padded,
    ) -> tuple[Tensor, Tensor]:
        lowest = math.log(1e-8)
        terms, log_correction = log_ratio.detach().clamp(-20.0, 20.0), None
        if correction is not None:
            log_correction = correction.clamp(1e-8, math.exp(20.0)).log()
            if correction.dim() > 1:
                terms, log_correction = terms + log_correction, None
        log_weight = sequences.sum(terms)
        if log_correction is not None:
            log_weight = log_weight + log_correction
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
    """Geometric mean of the clipped token ratios of a sequence.

        -exp(mean_t z) A,   z = min(d, clamp(d, -epsilon, epsilon)) if A > 0, else max(...)

    with d = logp - old_logp and a one-sided clip per token in log space.

    Attributes:
        epsilon: bound of the log-ratio; the paper clips ratios to (e^-0.4, e^0.4).

    Raises:
        ValueError: epsilon is not a finite number > 0.

    References:
        GMPO, https://arxiv.org/abs/2507.20673.
    """

    levels: ClassVar[tuple[str, ...]] = ("sequence",)
    epsilon: float = 0.4

    def __post_init__(self) -> None:
        check_params(self, "epsilon")

    def evaluate(
        self,
        logp: Tensor,
        log_ratio: Tensor,
        advantage: Tensor,
        correction: Tensor | None,
        sequences: Padded,
    ) -> tuple[Tensor, Tensor]:
        bounded = log_ratio.clamp(-self.epsilon, self.epsilon)
        gains = advantage > 0
        lower, upper = log_ratio < bounded, log_ratio > bounded
        stopped = torch.where(gains, upper, lower)
        used = torch.where(stopped, bounded.detach(), log_ratio)
        loss = -sequences.spread(clamped_exp(sequences.mean(used))[0]) * advantage
        clipped = (upper & gains).float() - (lower & (advantage < 0)).float()
        return loss, clipped


@dataclass(frozen=True)
class Topr(SequenceObjective):
    """Policy gradient, with truncated importance weights of sequences where the advantage is <= 0.

        -A logp if A > 0, else -sg(min(exp(sum_t (logp - old_logp)), 1)) A logp

    Every token keeps its gradient, none counts as clipped.

    References:
        TOPR, https://arxiv.org/abs/2503.14286, whose ratio is that of the trajectory. ROLL and
        Trinity-RFT take that of each token instead.
    """

    levels: ClassVar[tuple[str, ...]] = ("token",)

    def evaluate(
        self,
        logp: Tensor,
        log_ratio: Tensor,
        advantage: Tensor,
        correction: Tensor | None,
        sequences: Padded,
    ) -> tuple[Tensor, Tensor]:
        ratio = sequences.spread(sequences.sum(log_ratio.detach()).clamp(-80.0, 0.0).exp())
        derivative = torch.where(advantage > 0, -advantage, -ratio * advantage)
        loss = torch.where(advantage == 0, 0.0, derivative * logp)
        return loss, torch.zeros_like(loss)


@dataclass(frozen=True)
class Fipo(SequenceObjective):
    """The clip, with advantages scaled by how the policy has moved on the tokens that follow.

        -min(min(rho, delta) f A, clamp(rho, 1 - epsilon_low, 1 + epsilon_high) f A)
        f = sg(clamp(exp(sum over k >= t of decay^(k - t) d_k), min_weight, max_weight))

    with decay = 2^(-1 / half_life) and d = logp - old_logp, but d = 0 where A < 0 and rho > delta;
    f = 1 where A < 0 and rho > safety. Distances k - t count active tokens.

    Attributes:
        epsilon_low, epsilon_high, delta: bounds of the clip, as in `Clip`.
        half_life: distance at which a token weighs half as much; None = all weigh the same.
        min_weight, max_weight: bounds of f; the paper has (1, 1.2) for 32B and (0.8, 1.2) for 7B.
        safety: bound of the ratios of tokens with A < 0 that are scaled; 3 for 7B.

    Raises:
        ValueError: an epsilon that is negative or not finite; another parameter that is not
            positive; min_weight above max_weight.

    References:
        FIPO, https://arxiv.org/abs/2603.19835, eq. 5 to 8; delta as in table 2. The authors' code
        sets d = 0 where rho > delta whatever the sign of A, restricts f to (0.8, 1) where rho is
        above safety, and drops sequences with several tokens above delta.
    """

    levels: ClassVar[tuple[str, ...]] = ("token",)
    over_ranks: ClassVar[bool] = False
    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    delta: float = 10.0
    half_life: float | None = 32.0
    min_weight: float = 1.0
    max_weight: float = 1.2
    safety: float = 10.0

    def __post_init__(self) -> None:
        check_params(self, "epsilon_low", "epsilon_high", zero=True)
        check_params(self, "delta", "min_weight", "max_weight", "safety")
        if self.half_life is not None:
            check_params(self, "half_life")
        if self.min_weight > self.max_weight:
            bounds = f"{self.min_weight!r} and {self.max_weight!r}"
            raise ValueError(f"min_weight must be at most max_weight, got {bounds}")

    def evaluate(
        self,
        logp: Tensor,
        log_ratio: Tensor,
        advantage: Tensor,
        correction: Tensor | None,
        sequences: Padded,
    ) -> tuple[Tensor, Tensor]:
        moved, harms = log_ratio.detach(), advantage < 0
        ratio = clamped_exp(moved)[0]
        decay = 1.0 if self.half_life is None else 0.5 ** (1.0 / self.half_life)
        moved = torch.where(harms & (ratio > self.delta), 0.0, moved)
        future = clamped_exp(sequences.discounted(moved, decay))[0]
        weight = future.clamp(self.min_weight, self.max_weight)
        weight = torch.where(harms & (ratio > self.safety), 1.0, weight)
        clip = Clip(self.epsilon_low, self.epsilon_high, self.delta)
        loss, _, clipped = clip.evaluate(logp, log_ratio, weight * advantage)
        return loss, clipped
