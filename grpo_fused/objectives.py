"""THE per-token objectives; those that couple the tokens of a sequence are in `coupled`.

An objective is spelled twice, side by side: in plain torch, which the reference runs and the paper
is read against, and as a jit function for the kernels. `grpo_fused.testing.check_objective` holds
the two spellings together and their derivative to autograd.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch

from grpo_fused.kernels.objective import OBJECTIVES, exp, greater, jit, lesser, tl
from grpo_fused.kernels.objective import clamped_exp as jit_clamped_exp

LEVELS = ("token", "sequence", "sequence_token")


def clamped_exp(x):
    """(e^clamp(x, -80, 80), its derivative): the derivative is 0 outside the clamp."""
    value = torch.exp(x.clamp(-80.0, 80.0))
    return value, torch.where(x.abs() <= 80.0, value, 0.0)


def check_knobs(objective, *names, zero=False):
    """Knobs are finite numbers > 0, or >= 0 with zero."""
    for name in names:
        value = getattr(objective, name)
        if not isinstance(value, Real):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if not (math.isfinite(value) and (value >= 0 if zero else value > 0)):
            bound = ">= 0" if zero else "> 0"
            raise ValueError(f"{name} must be a finite number {bound}, got {value!r}")


def by_sign(positive, knob, other, like):
    """knob where positive, else other, in the dtype of a tensor."""
    return torch.full_like(like, other).masked_fill(positive, knob)


@dataclass(frozen=True)
class Objective:
    """A policy objective per token. Fields are its knobs: numbers, None meaning infinity.

    Launchers take knobs as floats, and the reference makes the objective again from these.

    A subclass gives the same mathematics twice:

        evaluate(self, logp, log_ratio, advantage)         in torch, on float tensors of one shape
        per_token(logp, log_ratio, advantage, *knobs)      as @staticmethod @jit, on scalars

    Both return (loss, d loss / d logp, clipped). log_ratio = logp - old_logp has derivative 1 in
    logp; `clipped` is -1 or +1 where the lower or the upper bound acted, else 0. The loss of
    `evaluate` is differentiable by autograd too: that is what sequence levels use. Without
    `per_token` an objective runs like those, on log-probabilities.

    Attributes:
        levels: importance sampling levels at which the objective has a meaning.
    """

    by_name: ClassVar[dict[str, type["Objective"]]] = {}
    key: ClassVar[str]
    levels: ClassVar[tuple[str, ...]] = ("token",)

    def __init_subclass__(cls):
        # A class made twice, in a function or a notebook, is two: instances of both may be alive.
        plain = f"{cls.__module__}.{cls.__qualname__}"
        cls.key, number = plain, 1
        while cls.key in cls.by_name:
            number += 1
            cls.key = f"{plain}#{number}"
        cls.by_name[cls.key] = cls
        if hasattr(cls, "per_token"):
            OBJECTIVES[cls.key] = cls.per_token

    @classmethod
    def name(cls):
        """Key under which ops, whose arguments are strings and numbers, find the objective."""
        return cls.key

    def knobs(self):
        """The fields as floats, in order."""
        knobs = (getattr(self, name) for name in self.__match_args__)
        return [math.inf if knob is None else float(knob) for knob in knobs]


@dataclass(frozen=True)
class Clip(Objective):
    """PPO's clipped surrogate, with DAPO's two bounds and the dual clip.

        -min(min(rho, delta) A, clamp(rho, 1 - epsilon_low, 1 + epsilon_high) A)

    Attributes:
        epsilon_low: how far below 1 the ratio still carries a gradient when A < 0.
        epsilon_high: how far above 1 it does when A > 0.
        delta: cap of the unclipped ratio, above 1 + epsilon_high as a rule; None leaves it free.

    Raises:
        ValueError: a knob that is negative, not finite or (delta) not positive.

    References:
        PPO, https://arxiv.org/abs/1707.06347, eq. 7. DAPO, https://arxiv.org/abs/2503.14476, eq. 8.
        Dual clip, https://arxiv.org/abs/1912.09729, eq. 5; with a cap on both signs of A,
        INTELLECT-2, https://arxiv.org/abs/2505.07291, section 3.4.
    """

    levels: ClassVar = LEVELS
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None

    def __post_init__(self):
        check_knobs(self, "epsilon_low", "epsilon_high", zero=True)
        if self.delta is not None and not (isinstance(self.delta, Real) and self.delta > 0):
            raise ValueError(f"delta must be None or a number > 0, got {self.delta!r}")

    def evaluate(self, logp, log_ratio, advantage):
        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        ratio, dratio = clamped_exp(log_ratio)
        free = ratio if self.delta is None else ratio.clamp(max=self.delta)
        bounded = ratio.clamp(low, high)
        used = torch.where(free * advantage <= bounded * advantage, free, bounded)
        below = (ratio < low) & (advantage < 0)
        above = (ratio > high) & (advantage > 0)
        return (
            -used * advantage,
            torch.where(used == ratio, -dratio * advantage, 0.0),
            above.float() - below.float(),
        )

    @staticmethod
    @jit
    def per_token(logp, log_ratio, advantage, epsilon_low, epsilon_high, delta):
        low = 1.0 - epsilon_low
        high = 1.0 + epsilon_high
        ratio, dratio = jit_clamped_exp(log_ratio)
        free = lesser(ratio, delta)
        bounded = lesser(greater(ratio, low), high)
        used = tl.where(free * advantage <= bounded * advantage, free, bounded)
        below = (ratio < low) & (advantage < 0)
        above = (ratio > high) & (advantage > 0)
        return (
            -used * advantage,
            tl.where(used == ratio, -dratio * advantage, 0.0),
            above.to(tl.float32) - below.to(tl.float32),
        )


@dataclass(frozen=True)
class Cispo(Objective):
    """Clipped importance weights on the policy gradient: no token loses its gradient.

        -sg(min(rho, max_ratio)) A logp

    Attributes:
        max_ratio: cap of the weight (TRL calls it epsilon_high). Tokens above it with A > 0 are
            reported as clipped high, as TRL does.

    Raises:
        ValueError: max_ratio not a finite number > 0.

    References:
        MiniMax-M1, https://arxiv.org/abs/2506.13585, eq. 4 and 5.
    """

    levels: ClassVar = LEVELS
    max_ratio: float = 5.0

    def __post_init__(self):
        check_knobs(self, "max_ratio")

    def evaluate(self, logp, log_ratio, advantage):
        ratio = clamped_exp(log_ratio)[0].detach()
        derivative = -ratio.clamp(max=self.max_ratio) * advantage
        # Selected, so that no advantage is no loss also where logp is -inf.
        loss = torch.where(advantage == 0, 0.0, derivative * logp)
        return loss, derivative, ((ratio > self.max_ratio) & (advantage > 0)).float()

    @staticmethod
    @jit
    def per_token(logp, log_ratio, advantage, max_ratio):
        ratio = jit_clamped_exp(log_ratio)[0]
        derivative = -lesser(ratio, max_ratio) * advantage
        loss = tl.where(advantage == 0.0, 0.0, derivative * logp)
        return loss, derivative, ((ratio > max_ratio) & (advantage > 0)).to(tl.float32)


@dataclass(frozen=True)
class Sapo(Objective):
    """A soft gate in place of the clip: the gradient fades as the ratio leaves 1.

        -(4 / t) sigmoid(t (rho - 1)) A,   t = temperature_pos if A > 0 else temperature_neg

    Attributes:
        temperature_pos, temperature_neg: how fast it fades, for each sign of the advantage.

    Raises:
        ValueError: a temperature that is not a finite number > 0.

    References:
        Soft Adaptive Policy Optimization, https://arxiv.org/abs/2511.20347.
    """

    levels: ClassVar = LEVELS
    temperature_pos: float = 1.0
    temperature_neg: float = 1.05

    def __post_init__(self):
        check_knobs(self, "temperature_pos", "temperature_neg")

    def evaluate(self, logp, log_ratio, advantage):
        t = by_sign(advantage > 0, self.temperature_pos, self.temperature_neg, advantage)
        ratio, dratio = clamped_exp(log_ratio)
        gate = torch.sigmoid(t * (ratio - 1))
        derivative = -4 * gate * torch.sigmoid(t * (1 - ratio)) * dratio * advantage
        return -(4 / t) * gate * advantage, derivative, torch.zeros_like(gate)

    @staticmethod
    @jit
    def per_token(logp, log_ratio, advantage, temperature_pos, temperature_neg):
        t = tl.where(advantage > 0.0, temperature_pos, temperature_neg)
        ratio, dratio = jit_clamped_exp(log_ratio)
        # Of the smaller side first: e^x overflows for x > 88, and then 1 - gate would be lost.
        fall = exp(greater(-tl.abs(t * (ratio - 1.0)), -200.0))  # 0 from -104 on
        small = fall / (1.0 + fall)
        large = 1.0 / (1.0 + fall)
        gate = tl.where(ratio > 1.0, large, small)
        derivative = -4.0 * small * large * dratio * advantage
        return -(4.0 / t) * gate * advantage, derivative, 0.0 * gate


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """REINFORCE with whatever advantages it is given, also known as GPG: no ratio, no clip.

        -A logp

    References:
        GPG, https://arxiv.org/abs/2504.02546. REINFORCE, Williams 1992.
    """

    def evaluate(self, logp, log_ratio, advantage):
        loss = torch.where(advantage == 0, 0.0, -advantage * logp)
        return loss, -advantage, torch.zeros_like(advantage)

    @staticmethod
    @jit
    def per_token(logp, log_ratio, advantage):
        loss = tl.where(advantage == 0.0, 0.0, -advantage * logp)
        return loss, -advantage, 0.0 * advantage
