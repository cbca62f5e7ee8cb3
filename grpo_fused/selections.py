"""Tokens that a statistic of the whole batch selects: large covariances, large second moments.

`covariance_mask` and `second_moment_mask` make a `policy_mask` of them. The objectives that couple
the tokens of a batch select in the same way among the tokens of a call. Nothing here has a gradient
or synchronises with the device; statistics and ranks are float64.
"""

import math

import torch
from torch import Tensor

from grpo_fused.sequences import advantages_of, as_given, lay_out_sequences


@torch.no_grad()
def covariance_mask(
    advantages: Tensor,
    logps: Tensor,
    mask: Tensor | None = None,
    *,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    generator: torch.Generator | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Mask that drops some tokens whose advantage and log-probability vary together.

        c = (A - mean A) (logp - mean logp)
        drop max(floor(share N), 1) tokens with low < c < high

    with means over the N active tokens of all sequences: those of a whole batch, for the selection
    of the paper.

    Args:
        advantages: (B,), or the shape of logps. With cu_seqlens (B,) or (N,); if B = N, they are
            per sequence.
        logps: (B, T) float, or packed (N,), log-probabilities under the current policy; ignored
            where masked.
        mask: of the shape of logps, nonzero = active; None = all active.
        share: fraction of the tokens in (0, 1].
        low, high: bounds of c, numbers that may be infinite: -inf and inf select the tokens that
            KL-Cov penalises.
        generator: on the device of logps; the dropped tokens are drawn with it from all between the
            bounds, as in the paper. None = those with the largest c, the earlier of equal ones.
        cu_seqlens: (B + 1,) int32 or int64, for packed sequences: 0 and the end of each sequence;
            sequences may be empty.

    Returns:
        bool of the shape of logps, for `policy_mask`, True = keep, and where masked.

    Raises:
        ValueError: mismatched shapes or devices; a share outside (0, 1]; bounds without low < high;
            cu_seqlens that decrease or do not span 0 to N (on the CPU).

    References:
        The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models,
        https://arxiv.org/abs/2505.22617, eq. 10 and 11; at least one token, as in its code.
    """
    check_share(share)
    check_band(low, high)
    sequences, (values,) = lay_out_sequences(mask, cu_seqlens, None, logps=logps)
    advantages = advantages_of(advantages, sequences, logps)
    arguments = (advantages, values, sequences.active, share, low, high)
    return as_given(~large_covariances(*arguments, generator=generator), cu_seqlens)


@torch.no_grad()
def second_moment_mask(
    logps: Tensor,
    old_logps: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float = 0.04,
    advantages: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Mask that drops the tokens with the largest log-ratios until their second moment is small.

        drop the largest of d^2 until mean d^2 <= threshold,   d = logps - old_logps

    over the active tokens of all sequences or, with advantages, over those that A pushes further
    from the old policy (A > 0 and d > 0, or A < 0 and d < 0); the others are kept.

    Args:
        logps, old_logps: (B, T) float, or packed (N,), log-probabilities under the current and the
            sampling policy; ignored where masked.
        mask: of the shape of logps, nonzero = active; None = all active.
        threshold: number > 0.
        advantages: as in covariance_mask; None = all active tokens count, as in AReaL.
        cu_seqlens: as in covariance_mask.

    Returns:
        bool of the shape of logps, for `policy_mask`, True = keep, and where masked.

    Raises:
        ValueError: mismatched shapes or devices; a threshold that is not > 0; cu_seqlens that
            decrease or do not span 0 to N (on the CPU).

    References:
        M2PO, https://arxiv.org/abs/2510.01161, algorithm 1, with advantages. AReaL keeps one token
        where even the smallest d^2 is above the threshold; here, as in the paper, none is kept.
    """
    if not (isinstance(threshold, (int, float)) and threshold > 0):
        raise ValueError(f"threshold must be a number > 0, got {threshold!r}")
    given = {"logps": logps, "old_logps": old_logps}
    sequences, (values, old) = lay_out_sequences(mask, cu_seqlens, None, **given)
    log_ratio = values.double() - old.double()
    counted = sequences.active
    if advantages is not None:
        advantages = advantages_of(advantages, sequences, logps)
        counted = pushed_further(log_ratio, advantages, counted)
    return as_given(within_second_moment(log_ratio, counted, threshold), cu_seqlens)


def check_share(share):
    if not (isinstance(share, (int, float)) and 0 < share <= 1):
        raise ValueError(f"share must be a number in (0, 1], got {share!r}")


def check_band(low, high):
    numbers = all(isinstance(bound, (int, float)) for bound in (low, high))
    if not (numbers and low < high):
        raise ValueError(f"low must be a number below high, got {low!r} and {high!r}")


def large_covariances(
    advantages, logps, counted, share, low, high, *, eligible=None, generator=None
):
    """Tokens with a large covariance, (B, T) bool, as in `covariance_mask`.

    Args:
        advantages: (B, T) or (B, 1).
        logps: (B, T).
        counted: (B, T) bool, the tokens that there are; None = all.
        eligible: (B, T) bool, which of them may be selected; None = all.
    """
    counted = torch.ones_like(logps, dtype=torch.bool) if counted is None else counted
    number = counted.sum().double()

    def centered(values):
        values = torch.where(counted, values.double(), 0.0)
        return values - values.sum() / number.clamp(min=1)

    covariance = centered(advantages.expand_as(logps)) * centered(logps)
    inside = counted & (covariance > low) & (covariance < high)
    inside = inside if eligible is None else inside & eligible
    keys = covariance
    if generator is not None:
        like = {"dtype": torch.float64, "device": logps.device}
        keys = torch.rand(logps.shape, generator=generator, **like)
    rank = _ranks(torch.where(inside, keys, -math.inf), descending=True)
    return inside & (rank < (number * share).floor().clamp(min=1))


def pushed_further(log_ratio, advantages, counted):
    """Tokens whose advantage pushes them further from the old policy, (B, T) bool."""
    pushed = advantages * log_ratio.sign() > 0
    return pushed if counted is None else pushed & counted


def within_second_moment(log_ratio, counted, threshold):
    """Tokens to keep, (B, T) bool: those not counted, and the smallest with a mean square below."""
    squares = log_ratio.double().square()
    counted = torch.ones_like(squares, dtype=torch.bool) if counted is None else counted
    ranked = torch.where(counted, squares, math.inf)
    ascending = ranked.flatten().sort().values
    means = ascending.cumsum(0) / torch.arange(1, len(ascending) + 1, device=squares.device)
    kept = (means <= threshold).sum()  # means ascend, too
    return ~counted | (_ranks(ranked) < kept)


def _ranks(values, descending=False):
    """The place of every value in the order of all of them, the earlier of equal ones first."""
    order = values.flatten().argsort(descending=descending, stable=True)
    places = torch.arange(len(order), device=values.device)
    return torch.empty_like(order).scatter_(0, order, places).view(values.shape)
