"""DPPO, an objective defined outside of the package, as a user would write it."""

from dataclasses import dataclass

import triton
import triton.language as tl

from grpo_fused.losses.objectives import Objective


@dataclass(frozen=True)
class DppoTv(Objective):
    """DPPO with a trust region in binary total variation, as implemented in verl.

        -sg(min(rho, cap) 1[inside]) A logp

    inside: p - p_old <= high where A > 0, >= -low elsewhere. https://arxiv.org/abs/2602.04879
    """

    levels = ("token",)
    low: float = 0.2
    high: float = 0.2
    cap: float = 20.0

    def evaluate(self, logp, log_ratio, advantage):
        ratio = log_ratio.clamp(-20.0, 20.0).exp()
        moved = logp.exp() - (logp - log_ratio).exp()
        above = (advantage > 0) & (moved > self.high)
        below = (advantage <= 0) & (moved < -self.low)
        derivative = -ratio.clamp(max=self.cap) * advantage
        derivative = derivative.masked_fill(above | below, 0.0).detach()
        clipped = above.float() - (below & (advantage < 0)).float()
        return derivative * logp, derivative, clipped

    @staticmethod
    @triton.jit
    def per_token(logp, log_ratio, advantage, low, high, cap):
        ratio = tl.exp(tl.minimum(tl.maximum(log_ratio, -20.0), 20.0))
        moved = tl.exp(logp) - tl.exp(logp - log_ratio)
        above = (advantage > 0) & (moved > high)
        below = (advantage <= 0) & (moved < -low)
        derivative = tl.where(above | below, 0.0, -tl.minimum(ratio, cap) * advantage)
        clipped = above.to(tl.float32) - (below & (advantage < 0)).to(tl.float32)
        return derivative * logp, derivative, clipped
