"""Token-level policy objectives.

Each objective has two implementations: one in torch, for the torch backend and sequence-level
ratios, and a jit function for the kernels. `grpo_fused.testing.check_objective` compares them with
each other and their derivative with autograd.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from grpo_fused.kernels.objective import OBJECTIVES, exp, greater, jit, lesser, tl
from grpo_fused.kernels.objective import clamped_exp as jit_clamped_exp

LEVELS = ("token", "sequence", "sequence_sum", "sequence_token")
OF_SEQUENCES = ("sequence", "sequence_sum")  # levels at which a sequence has one ratio


def clamped_exp(x):
    """(e^clamp(x, -80, 80), its derivative): the derivative is 0 outside the clamp."""
    value = torch.exp(x.clamp(-80.0, 80.0))
    return value, torch.where(x.abs() <= 80.0, value, 0.0)


def check_params(objective, *names, zero=False):
    """Check that parameters are finite numbers > 0, or >= 0 with `zero`."""
    for name in names:
        value = getattr(objective, name)
        if not isinstance(value, Real):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if not (math.isfinite(value) and (value >= 0 if zero else value > 0)):
            bound = ">= 0" if zero else "> 0"
            raise ValueError(f"{name} must be a finite number {bound}, got {value!r}")


def by_sign(positive, parameter, other, like):
    """`parameter` where positive, else `other`, in the dtype of `like`."""
    return torch.full_like(like, other).masked_fill(positive, parameter)


@dataclass(frozen=True)
class Objective:
    """Base class of policy objectives. A subclass is a frozen dataclass of its parameters.

    Parameters are numbers, or None for infinity. Subclasses implement

        evaluate(self, logp, log_ratio, advantage)        in torch, on float tensors of one shape
        per_token(logp, log_ratio, advantage, *params)    as @staticmethod @jit, on scalars

    or, with `uses_sampling_logps`, the same with sampling_logp behind advantage. Both return
    (loss, d loss / d logp, clipped), where log_ratio = logp - old_logp has derivative 1 in
    logp and `clipped` is -1 or +1 where the lower or the upper bound is active, else 0. The loss of
    `evaluate` must also be differentiable by autograd, which sequence levels use. `per_token` is
    optional; without it, the loss is computed by `evaluate` on log-probabilities.

    Attributes:
        levels: supported importance sampling levels.
        needs_advantage: whether a token without an advantage has no gradient.
        uses_sampling_logps: whether the log-probabilities of the sampler are read.
        couples: whose tokens the loss of a token depends on: its own, "token", all of its
            "sequence", or all of the "batch".
        weighs_sampling: whether the loss contains the importance weight over the sampler.
        over_ranks: whether the tokens of a sequence may lie on several ranks.
        evaluate, per_token: see above.
    """

    by_name: ClassVar[dict[str, type["Objective"]]] = {}
    levels: ClassVar[tuple[str, ...]] = ("token",)
    needs_advantage: ClassVar[bool] = True
    uses_sampling_logps: ClassVar[bool] = False
    weighs_sampling: ClassVar[bool] = False
    couples: ClassVar[str] = "token"
    over_ranks: ClassVar[bool] = True
    evaluate: ClassVar[Callable[..., tuple[Tensor, ...]]]
    per_token: ClassVar[Callable]
    _name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        # A class defined again, e.g. in a notebook, gets a new name: instances of both may exist.
        plain = f"{cls.__module__}.{cls.__qualname__}"
        cls._name, number = plain, 1
        while cls._name in cls.by_name:
            number += 1
            cls._name = f"{plain}#{number}"
        cls.by_name[cls._name] = cls
        if hasattr(cls, "per_token"):
            OBJECTIVES[cls._name] = cls.per_token

    @classmethod
    def name(cls) -> str:
        """Key in `by_name`, which identifies the class in torch.library ops."""
        return cls._name

    def params(self) -> list[float]:
        """The parameters as floats, in the order of the fields."""
        names: tuple[str, ...] = self.__match_args__
        params = (getattr(self, name) for name in names)
        return [math.inf if parameter is None else float(parameter) for parameter in params]

    def of_tokens(
        self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, sampling_logp: Tensor | None
    ) -> tuple[Tensor, ...]:
        """`evaluate`, with what it takes; a sampling_logp of None is that of the policy itself."""
        if not self.uses_sampling_logps:
            return self.evaluate(logp, log_ratio, advantage)
        own = logp.detach()
        if sampling_logp is not None:  # NaN: not known, as in `rollout_weights`
            own = torch.where(sampling_logp.isnan(), own, sampling_logp)
        sampling_logp = own
        return self.evaluate(logp, log_ratio, advantage, sampling_logp)


@dataclass(frozen=True)
class Clip(Objective):
    """PPO's clipped surrogate, with DAPO's two bounds and the dual clip.

        -min(min(rho, delta) A, clamp(rho, 1 - epsilon_low, 1 + epsilon_high) A)

    Attributes:
        epsilon_low: distance of the lower bound from 1; it clips ratios with A < 0.
        epsilon_high: distance of the upper bound from 1; it clips ratios with A > 0.
        delta: cap of the unclipped ratio, usually above 1 + epsilon_high; None = no cap.

    Raises:
        ValueError: an epsilon that is negative or not finite; a delta that is not positive.

    References:
        PPO, https://arxiv.org/abs/1707.06347, eq. 7. DAPO, https://arxiv.org/abs/2503.14476, eq. 8.
        Dual clip, https://arxiv.org/abs/1912.09729, eq. 5; with a cap on both signs of A,
        INTELLECT-2, https://arxiv.org/abs/2505.07291, section 3.4.
    """

    levels: ClassVar[tuple[str, ...]] = LEVELS
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None

    def __post_init__(self) -> None:
        check_params(self, "epsilon_low", "epsilon_high", zero=True)
        if self.delta is not None and not (isinstance(self.delta, Real) and self.delta > 0):
            raise ValueError(f"delta must be None or a number > 0, got {self.delta!r}")

    def evaluate(
        self, logp: Tensor, log_ratio: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        ratio, dratio = clamped_exp(log_ratio)
        capped = ratio if self.delta is None else ratio.clamp(max=self.delta)
        bounded = ratio.clamp(low, high)
        used = torch.where(capped * advantage <= bounded * advantage, capped, bounded)
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
        capped = lesser(ratio, delta)
        bounded = lesser(greater(ratio, low), high)
        used = tl.where(capped * advantage <= bounded * advantage, capped, bounded)
        below = (ratio < low) & (advantage < 0)
        above = (ratio > high) & (advantage > 0)
        return (
            -used * advantage,
            tl.where(used == ratio, -dratio * advantage, 0.0),
            above.to(tl.float32) - below.to(tl.float32),
        )


@dataclass(frozen=True)
class Cispo(Objective):
    """Policy gradient with capped importance weights; capped tokens keep their gradient.

        -sg(clamp(rho, min_ratio, max_ratio)) A logp

    Attributes:
        max_ratio: cap of the weight, named epsilon_high in TRL. As there, only tokens above it
            with A > 0 count as clipped.
        min_ratio: lower bound of the weight, which the paper does not have; verl and slime do.

    Raises:
        ValueError: max_ratio is not a finite number > 0, or min_ratio is not one >= 0.

    References:
        MiniMax-M1, https://arxiv.org/abs/2506.13585, eq. 4 and 5.
    """

    levels: ClassVar[tuple[str, ...]] = LEVELS
    max_ratio: float = 5.0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_params(self, "max_ratio")
        check_params(self, "min_ratio", zero=True)

    def evaluate(
        self, logp: Tensor, log_ratio: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ratio = clamped_exp(log_ratio)[0].detach()
        derivative = -ratio.clamp(self.min_ratio, self.max_ratio) * advantage
        # torch.where: the loss is 0 without an advantage even if logp is -inf.
        loss = torch.where(advantage == 0, 0.0, derivative * logp)
        return loss, derivative, ((ratio > self.max_ratio) & (advantage > 0)).float()

    @staticmethod
    @jit
    def per_token(logp, log_ratio, advantage, max_ratio, min_ratio):
        ratio = jit_clamped_exp(log_ratio)[0]
        derivative = -lesser(greater(ratio, min_ratio), max_ratio) * advantage
        loss = tl.where(advantage == 0.0, 0.0, derivative * logp)
        return loss, derivative, ((ratio > max_ratio) & (advantage > 0)).to(tl.float32)


@dataclass(frozen=True)
class Sapo(Objective):
    """Sigmoid gate instead of a clip: the gradient decays smoothly as the ratio moves from 1.

        -(4 / t) sigmoid(t (rho - 1)) A,   t = temperature_pos if A > 0 else temperature_neg

    Attributes:
        temperature_pos, temperature_neg: rate of the decay, by sign of the advantage.

    Raises:
        ValueError: a temperature is not a finite number > 0.

    References:
        Soft Adaptive Policy Optimization, https://arxiv.org/abs/2511.20347.
    """

    levels: ClassVar[tuple[str, ...]] = LEVELS
    temperature_pos: float = 1.0
    temperature_neg: float = 1.05

    def __post_init__(self) -> None:
        check_params(self, "temperature_pos", "temperature_neg")

    def evaluate(
        self, logp: Tensor, log_ratio: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
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
        # gate and 1 - gate from a decaying exponential: e^x overflows for x > 88, and the
        # difference 1 - gate would cancel.
        fall = exp(greater(-tl.abs(t * (ratio - 1.0)), -200.0))  # underflows to 0 below -104
        small = fall / (1.0 + fall)
        large = 1.0 / (1.0 + fall)
        gate = tl.where(ratio > 1.0, large, small)
        derivative = -4.0 * small * large * dratio * advantage
        return -(4.0 / t) * gate * advantage, derivative, 0.0 * gate


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """REINFORCE, or GPG: no importance ratio and no clip.

        -A logp

    References:
        GPG, https://arxiv.org/abs/2504.02546. REINFORCE, Williams 1992.
    """

    def evaluate(
        self, logp: Tensor, log_ratio: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss = torch.where(advantage == 0, 0.0, -advantage * logp)
        return loss, -advantage, torch.zeros_like(advantage)

    @staticmethod
    @jit
    def per_token(logp, log_ratio, advantage):
        loss = tl.where(advantage == 0.0, 0.0, -advantage * logp)
        return loss, -advantage, 0.0 * advantage
