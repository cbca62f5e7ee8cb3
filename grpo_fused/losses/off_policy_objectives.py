"""Policy objectives for data of another policy: trust regions, bands, penalties, and no bound."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grpo_fused.kernels.objective import clamped_exp as jit_clamped_exp
from grpo_fused.kernels.objective import exp, greater, jit, lesser, tl
from grpo_fused.losses.objectives import LEVELS, Objective, check_params, clamped_exp

TINY = 1e-8  # of a probability, in the logarithms of DPPO's divergence


@dataclass(frozen=True)
class ImportanceSampling(Objective):
    """Policy gradient with the importance ratio, and no clip.

        -rho A

    References:
        The loss importance_sampling of Tinker, https://tinker-docs.thinkingmachines.ai/losses.
    """

    levels: ClassVar[tuple[str, ...]] = LEVELS

    def evaluate(
        self, logp: Tensor, log_ratio: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ratio, dratio = clamped_exp(log_ratio)
        return -ratio * advantage, -dratio * advantage, torch.zeros_like(ratio)

    @staticmethod
    @jit
    def per_token(logp, log_ratio, advantage):
        ratio, dratio = jit_clamped_exp(log_ratio)
        return -ratio * advantage, -dratio * advantage, 0.0 * ratio


@dataclass(frozen=True)
class _Dppo(Objective):
    """What both divergences of DPPO share.

        -sg(min(rho, max_ratio) 1[inside]) A logp

    A token is outside if A pushes its probability p on from p_old and the divergence has passed
    its bound: epsilon_high for A > 0, epsilon_low otherwise. Such tokens have no gradient, and
    count as clipped.

    Attributes:
        epsilon_low, epsilon_high: bounds of the divergence, by the sign of A.
        max_ratio: cap of the weight.

    Raises:
        ValueError: a parameter is not a finite number > 0.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    max_ratio: float = 20.0

    def __post_init__(self) -> None:
        check_params(self, "epsilon_low", "epsilon_high", "max_ratio")

    def _evaluate(self, logp, log_ratio, advantage, above, below):
        ratio = clamped_exp(log_ratio)[0].detach()
        above, below = above & (advantage > 0), below & (advantage < 0)
        derivative = -ratio.clamp(max=self.max_ratio) * advantage
        derivative = torch.where(above | below, 0.0, derivative)
        # torch.where: the loss is 0 without a gradient even if logp is -inf.
        loss = torch.where(derivative == 0, 0.0, derivative * logp)
        return loss, derivative, above.float() - below.float()


@jit
def _weighted(logp, log_ratio, advantage, above, below, max_ratio):
    """`_Dppo._evaluate` in the kernels."""
    ratio = jit_clamped_exp(log_ratio)[0]
    above = above & (advantage > 0)
    below = below & (advantage < 0)
    derivative = tl.where(above | below, 0.0, -lesser(ratio, max_ratio) * advantage)
    loss = tl.where(derivative == 0.0, 0.0, derivative * logp)
    return loss, derivative, above.to(tl.float32) - below.to(tl.float32)


@dataclass(frozen=True)
class DppoTv(_Dppo):
    """DPPO with the binary total variation of the chosen token, abs(p - p_old).

    Formula, attributes and errors: `_Dppo`. The defaults are verl's clip_ratio, and the 20 that its
    code falls back to; its configuration sets clip_ratio_c to 3.

    References:
        Rethinking the Trust Region in LLM Reinforcement Learning,
        https://arxiv.org/abs/2602.04879, eq. 11 to 13; max_ratio as in section 5.4.
    """

    def evaluate(
        self, logp: Tensor, log_ratio: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        moved = (logp.exp() - (logp - log_ratio).exp()).detach()
        above, below = moved > self.epsilon_high, moved < -self.epsilon_low
        return self._evaluate(logp, log_ratio, advantage, above, below)

    @staticmethod
    @jit
    def per_token(logp, log_ratio, advantage, epsilon_low, epsilon_high, max_ratio):
        moved = exp(greater(logp, -100.0)) - exp(greater(logp - log_ratio, -100.0))
        above = moved > epsilon_high
        below = moved < -epsilon_low
        return _weighted(logp, log_ratio, advantage, above, below, max_ratio)


@dataclass(frozen=True)
class DppoKl(_Dppo):
    """DPPO with the binary KL of the chosen token against all others.

        p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))

    Formula, attributes and errors: `_Dppo`; defaults as `DppoTv`.

    References:
        As `DppoTv`, eq. 14.
    """

    def evaluate(
        self, logp: Tensor, log_ratio: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = logp.detach().exp()
        p_old = (logp - log_ratio).detach().exp().clamp(max=1.0)
        others = (1.0 - p_old) * ((1.0 - p_old + TINY) / (1.0 - p + TINY)).log()
        divergence = -p_old * log_ratio.detach() + others
        above = (divergence > self.epsilon_high) & (p > p_old)
        below = (divergence > self.epsilon_low) & (p < p_old)
        return self._evaluate(logp, log_ratio, advantage, above, below)

    @staticmethod
    @jit
    def per_token(logp, log_ratio, advantage, epsilon_low, epsilon_high, max_ratio):
        p = exp(greater(logp, -100.0))
        p_old = lesser(exp(greater(logp - log_ratio, -100.0)), 1.0)
        quotient = (1.0 - p_old + 1e-8) / (1.0 - p + 1e-8)
        divergence = (1.0 - p_old) * (0.6931471805599453 * tl.log2(quotient)) - p_old * log_ratio
        above = (divergence > epsilon_high) & (p > p_old)
        below = (divergence > epsilon_low) & (p < p_old)
        return _weighted(logp, log_ratio, advantage, above, below, max_ratio)


@dataclass(frozen=True)
class Dro(Objective):
    """Policy gradient with a quadratic penalty in the place of a clip.

        -A logp + strength / 2 log(rho)^2

    The penalty has a gradient without an advantage too.

    Attributes:
        strength: of the penalty; tau in the paper, beta in Tinker, from whose example the default
            is, and dro_beta in verl, which has none.

    Raises:
        ValueError: strength is not a finite number > 0.

    References:
        Kimi k1.5, https://arxiv.org/abs/2501.12599, eq. 3, which squares the log-ratio of the whole
        response. As in Tinker and verl it is that of each token here.
    """

    needs_advantage: ClassVar[bool] = False
    strength: float = 0.05

    def __post_init__(self) -> None:
        check_params(self, "strength")

    def evaluate(
        self, logp: Tensor, log_ratio: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gain = torch.where(advantage == 0, 0.0, -advantage * logp)
        penalty = self.strength / 2 * log_ratio * log_ratio
        loss = torch.where(penalty.isinf(), penalty, gain + penalty)  # inf - inf would be NaN
        return loss, self.strength * log_ratio - advantage, torch.zeros_like(loss)

    @staticmethod
    @jit
    def per_token(logp, log_ratio, advantage, strength):
        gain = tl.where(advantage == 0.0, 0.0, -advantage * logp)
        penalty = strength / 2 * log_ratio * log_ratio
        loss = tl.where(penalty == float("inf"), penalty, gain + penalty)
        return loss, strength * log_ratio - advantage, 0.0 * advantage


@dataclass(frozen=True)
class Ipo(Objective):
    """Importance sampling within a distance from the sampler, with a quadratic penalty.

        -1[abs(p - q) <= epsilon] rho A + strength log(rho)^2

    with the probability q of the token under the sampler. Tokens outside keep the penalty, which
    has a gradient without an advantage too; they count as clipped, above or below q.

    Attributes:
        epsilon: largest distance of the probabilities.
        strength: of the penalty.

    Raises:
        ValueError: a parameter is not a finite number >= 0.

    References:
        The loss ipo of prime-rl, src/prime_rl/trainer/rl/loss.py, whose rho is that of the policy
        over the sampler: pass the sampler's log-probabilities as old_logps, and no sampling_logps.
    """

    needs_advantage: ClassVar[bool] = False
    uses_sampling_logps: ClassVar[bool] = True
    epsilon: float = 0.1
    strength: float = 1e-3

    def __post_init__(self) -> None:
        check_params(self, "epsilon", "strength", zero=True)

    def evaluate(
        self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, sampling_logp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ratio, dratio = clamped_exp(log_ratio)
        moved = (logp.exp() - sampling_logp.exp()).detach()
        outside = moved.abs() > self.epsilon
        weight = torch.where(moved.isnan(), moved, advantage)  # an unknown distance is NaN
        gain, slope = (torch.where(outside, 0.0, -x * weight) for x in (ratio, dratio))
        penalty, derivative = log_ratio * log_ratio, 2 * log_ratio
        clipped = torch.where(outside & (advantage != 0), moved.sign(), 0.0)
        return gain + self.strength * penalty, slope + self.strength * derivative, clipped

    @staticmethod
    @jit
    def per_token(logp, log_ratio, advantage, sampling_logp, epsilon, strength):
        ratio, dratio = jit_clamped_exp(log_ratio)
        moved = exp(greater(logp, -100.0)) - exp(greater(sampling_logp, -100.0))
        outside = tl.abs(moved) > epsilon
        weight = tl.where(moved == moved, advantage, moved)
        gain = tl.where(outside, 0.0, -ratio * weight)
        slope = tl.where(outside, 0.0, -dratio * weight)
        sign = tl.where(moved > 0.0, 1.0, -1.0)
        return (
            gain + strength * log_ratio * log_ratio,
            slope + strength * 2 * log_ratio,
            tl.where(outside & (advantage != 0.0), sign, 0.0),
        )


@dataclass(frozen=True)
class RolloutIs(Objective):
    """Policy gradient with the importance ratio over the sampler, and nothing out of its band.

        -sg(rho_q 1[1 - epsilon_low <= rho_q <= 1 + epsilon_high]) A logp,   rho_q = p / q

    with the probability q of the token under the sampler. Tokens outside have no gradient,
    whatever the sign of A, and count as clipped. It takes no importance_sampling_ratio of
    `rollout_weights`: the weight over the sampler is in it.

    Attributes:
        epsilon_low, epsilon_high: distances of the bounds from 1.

    Raises:
        ValueError: an epsilon is not a finite number >= 0.

    References:
        GLM-5, https://arxiv.org/abs/2602.15763, section 4.1.2; the loss rollout_is of SkyRL, whose
        band is open. verl has such bands as weights, `rollout_weights(mode="mask")`.
    """

    uses_sampling_logps: ClassVar[bool] = True
    weighs_sampling: ClassVar[bool] = True
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2

    def __post_init__(self) -> None:
        check_params(self, "epsilon_low", "epsilon_high", zero=True)

    def evaluate(
        self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, sampling_logp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        same = logp == sampling_logp  # -inf - -inf would be NaN
        ratio = clamped_exp(torch.where(same, 0.0, logp.detach() - sampling_logp))[0]
        below, above = ratio < 1 - self.epsilon_low, ratio > 1 + self.epsilon_high
        derivative = torch.where(below | above, 0.0, -ratio * advantage)
        loss = torch.where(derivative == 0, 0.0, derivative * logp)
        clipped = torch.where(advantage == 0, 0.0, above.float() - below.float())
        return loss, derivative, clipped

    @staticmethod
    @jit
    def per_token(logp, log_ratio, advantage, sampling_logp, epsilon_low, epsilon_high):
        difference = tl.where(logp == sampling_logp, 0.0, logp - sampling_logp)
        ratio = jit_clamped_exp(difference)[0]
        below = ratio < 1.0 - epsilon_low
        above = ratio > 1.0 + epsilon_high
        derivative = tl.where(below | above, 0.0, -ratio * advantage)
        loss = tl.where(derivative == 0.0, 0.0, derivative * logp)
        clipped = above.to(tl.float32) - below.to(tl.float32)
        return loss, derivative, tl.where(advantage == 0.0, 0.0, clipped)
