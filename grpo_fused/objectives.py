"""THE per-token objectives and LOSSES, the table in which a loss is a row.

An objective is spelled twice, side by side: in plain torch, which the reference runs and the paper
is read against, and as a jit function for the kernels. A generated test holds the two spellings
together and their derivative to autograd.
"""

import math
from dataclasses import astuple, dataclass
from typing import ClassVar

import torch

from grpo_fused.kernels.objective import OBJECTIVES, greater, jit, lesser, tl
from grpo_fused.kernels.objective import clamped_exp as jit_clamped_exp


def clamped_exp(x):
    """(e^clamp(x, -80, 80), its derivative): the derivative is 0 outside the clamp."""
    value = torch.exp(x.clamp(-80.0, 80.0))
    return value, torch.where(x.abs() <= 80.0, value, 0.0)


def k3(difference):
    """Schulman's k3 estimator e^d - d - 1 of d = ref - logp; its derivative in logp, 1 - e^d."""
    inside = difference.abs() <= 80.0
    growth = torch.expm1(difference.clamp(-80.0, 80.0))  # keeps the digits of a small divergence
    return growth - difference, torch.where(inside, -growth, 1.0)


@dataclass(frozen=True)
class Objective:
    """A policy objective per token. Fields are its knobs: floats, None meaning infinity.

    A subclass gives the same mathematics twice:

        evaluate(self, logp, log_ratio, advantage)         in torch, on float tensors of one shape
        per_token(logp, log_ratio, advantage, *knobs)      as @staticmethod @jit, on scalars

    Both return (loss, d loss / d logp, clipped). log_ratio = logp - old_logp has derivative 1 in
    logp; `clipped` is -1 or +1 where the lower or the upper bound stopped the gradient, else 0.
    """

    by_name: ClassVar[dict[str, type["Objective"]]] = {}

    def __init_subclass__(cls):
        cls.by_name[cls.name()] = cls
        OBJECTIVES[cls.name()] = cls.per_token

    @classmethod
    def name(cls):
        """Key under which ops, whose arguments are strings and numbers, find the objective."""
        return f"{cls.__module__}.{cls.__qualname__}"

    def knobs(self):
        """The fields as floats, in order."""
        return [math.inf if knob is None else float(knob) for knob in astuple(self)]


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

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None

    def __post_init__(self):
        for field in ("epsilon_low", "epsilon_high"):
            value = getattr(self, field)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{field} must be a finite number >= 0, got {value!r}")
        if self.delta is not None and not self.delta > 0:
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
class Loss:
    """A row of LOSSES: which objective, how it is averaged, and where it comes from."""

    objective: Objective
    normalizer: str
    paper: str
    url: str
    equation: str


LOSSES = {
    "grpo": Loss(
        Clip(),
        "seq-mean-token-mean",
        "DeepSeekMath",
        "https://arxiv.org/abs/2402.03300",
        "eq. 3",
    ),
    "bnpo": Loss(
        Clip(),
        "token-mean-local",
        "TRL",
        "https://huggingface.co/docs/trl/grpo_trainer",
        "loss_type bnpo",
    ),
    "dapo": Loss(
        Clip(epsilon_high=0.28),
        "token-mean",
        "DAPO",
        "https://arxiv.org/abs/2503.14476",
        "eq. 8",
    ),
    "dr_grpo": Loss(
        Clip(),
        "seq-mean-token-sum-norm",
        "Dr. GRPO",
        "https://arxiv.org/abs/2503.20783",
        "section 3.2",
    ),
}
