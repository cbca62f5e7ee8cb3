"""Policy objectives that couple the tokens of a batch.

They leave out, or penalise, tokens that `grpo_fused.selections` chooses by a statistic of all
tokens of the call: of a micro-batch, if the batch is cut. For a selection over a whole batch pass
the masks of `selections` as policy_mask, with an objective per token. They run in torch on
log-probabilities, and autograd differentiates them; the selection has no gradient.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grpo_fused.losses.objectives import Clip, Objective, check_params, clamped_exp
from grpo_fused.selections import (
    check_band,
    check_share,
    large_covariances,
    pushed_further,
    within_second_moment,
)


class BatchObjective(Objective):
    """Base class of objectives whose value at a token depends on all tokens of the call.

    A subclass is a frozen dataclass of its parameters and implements

        evaluate(self, logp, log_ratio, advantage, counted) -> (loss, clipped)

    on (B, T) tensors that are 0 where masked. `counted` (B, T) bool are the tokens whose policy
    term is on, active and with a weight; None = all.
    """

    couples: ClassVar[str] = "batch"
    over_ranks: ClassVar[bool] = False


@dataclass(frozen=True)
class ClipCov(BatchObjective):
    """The clip, without some of the tokens whose advantage and log-probability vary together.

        0 where selected, else -min(rho A, clamp(rho, 1 - epsilon_low, 1 + epsilon_high) A)

    Selected are tokens with low < (A - mean A)(logp - mean logp) < high that are not clipped
    already: of them those with the largest covariance, max(floor(share N), 1) of N tokens. They
    count as clipped, above where A > 0, below where A < 0.

    Attributes:
        epsilon_low, epsilon_high: bounds of the clip, as in `Clip`.
        share: fraction of the tokens of the call that are left out.
        low, high: bounds of the covariance.

    Raises:
        ValueError: an epsilon that is negative or not finite; a share outside (0, 1]; bounds
            without low < high.

    References:
        https://arxiv.org/abs/2505.22617, eq. 10 to 12, with the clip and the defaults of its code
        (verl's clip_cov, which is at least one token too). There the tokens are drawn at random
        between the bounds; here the same call selects the same ones. `covariance_mask` draws.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    share: float = 2e-4
    low: float = 1.0
    high: float = 5.0

    def __post_init__(self) -> None:
        check_params(self, "epsilon_low", "epsilon_high", zero=True)
        check_share(self.share)
        check_band(self.low, self.high)

    def evaluate(
        self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, counted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        clip = Clip(self.epsilon_low, self.epsilon_high)
        loss, _, clipped = clip.evaluate(logp, log_ratio, advantage)
        bounds = (self.share, self.low, self.high)
        arguments = (advantage, logp.detach(), counted, *bounds)
        selected = large_covariances(*arguments, eligible=clipped == 0)
        clipped = torch.where(selected, advantage.sign(), clipped)
        return torch.where(selected, 0.0, loss), clipped


@dataclass(frozen=True)
class KlCov(BatchObjective):
    """Importance sampling, with a penalty where advantage and log-probability vary most together.

        -rho A + strength abs(log rho) where selected, else -rho A

    Selected are the max(floor(share N), 1) of N tokens with the largest covariance
    (A - mean A)(logp - mean logp). Tokens without an advantage may be among them.

    Attributes:
        share: fraction of the tokens of the call that are penalised.
        strength: of the penalty.

    Raises:
        ValueError: a share outside (0, 1]; a strength that is not a finite number > 0.

    References:
        https://arxiv.org/abs/2505.22617, eq. 10, 13 and 14, and listing 1 for the absolute value;
        share for 32B, 2e-3 for 7B. verl's kl_cov has a strength of 0.1 in its configuration, and
        at least one token, too.
    """

    needs_advantage: ClassVar[bool] = False
    share: float = 2e-4
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_share(self.share)
        check_params(self, "strength")

    def evaluate(
        self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, counted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ratio = clamped_exp(log_ratio)[0]
        bounds = (self.share, -math.inf, math.inf)
        selected = large_covariances(advantage, logp.detach(), counted, *bounds)
        penalty = torch.where(selected, self.strength * log_ratio.abs(), 0.0)
        return penalty - ratio * advantage, torch.zeros_like(ratio)


@dataclass(frozen=True)
class M2po(BatchObjective):
    """Importance sampling, without the tokens that make the second moment of log rho large.

        -rho A where kept, else 0

    Of the tokens that A pushes further from the old policy (A > 0 and rho > 1, or A < 0 and
    rho < 1) those with the largest log(rho)^2 are left out, until its mean over the remaining ones
    is at most the threshold. They count as clipped.

    Attributes:
        threshold: bound of the second moment.

    Raises:
        ValueError: threshold is not a finite number > 0.

    References:
        M2PO, https://arxiv.org/abs/2510.01161, eq. 5 and algorithm 1. The authors' code clips at
        the bound that this selection ends at instead, and never within (0.7, 1.5). AReaL selects
        among all tokens, by the ratio of the proximal policy over the sampler, and clips as well:
        `second_moment_mask` with `Clip`.
    """

    threshold: float = 0.04

    def __post_init__(self) -> None:
        check_params(self, "threshold")

    def evaluate(
        self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, counted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ratio, moved = clamped_exp(log_ratio)[0], log_ratio.detach()
        pushed = pushed_further(moved, advantage, counted)
        kept = within_second_moment(moved, pushed, self.threshold)
        return (
            torch.where(kept, -ratio * advantage, 0.0),
            torch.where(kept, 0.0, advantage.sign()),
        )
