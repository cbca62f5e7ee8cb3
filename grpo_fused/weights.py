"""Reductions: every mean of the family is a sum with weights that mask and counts decide."""

import math
from typing import NamedTuple

import torch

from grpo_fused.checks import NUMBERS, check_choice, check_tensor
from grpo_fused.sequences import Padded

RULES = (
    "seq-mean-token-mean",
    "token-mean-local",
    "token-mean",
    "seq-mean-token-sum-norm",
    "seq-mean-token-sum",
    "token-sum",
)


def token_weights(
    mask,
    rule,
    *,
    num_items_in_batch=None,
    num_sequences_in_batch=None,
    max_completion_length=None,
):
    """Weights w with which a loss of the family is sum_bt w[b, t] * loss[b, t].

        seq-mean-token-mean       m / max(n_b, 1) / B       GRPO
        token-mean-local          m / max(sum m, 1)         BNPO
        token-mean                m / max(N, 1)             DAPO
        seq-mean-token-sum-norm   m / (B L)                 Dr. GRPO
        seq-mean-token-sum        m / B                     LUSPO
        token-sum                 m

    with m the mask, n_b = sum_t m[b, t], L = max_completion_length and N = num_items_in_batch.
    A micro-batch that is given the divisors of the whole batch contributes its share: the shares'
    losses and gradients add up to the batch's, for every rule but token-mean-local.

    Args:
        mask: (B, T) bool, integer or float, nonzero = active.
        rule: one of RULES.
        num_items_in_batch: number or 0-d tensor, N; None = sum m. Callers fold the world size in
            where gradients are averaged over ranks.
        num_sequences_in_batch: number or 0-d tensor that replaces B; None = mask.shape[0], which
            counts fully masked sequences too.
        max_completion_length: number, L; None = T.
        Divisors that the rule does not use are ignored.

    Returns:
        (B, T) float32, exactly 0 where the mask is 0.

    Raises:
        ValueError: an unknown rule, a mask that is not (B, T), a divisor that is not positive.

    References:
        The papers of LOSSES; the names are verl's loss_agg_mode.
    """
    check_tensor("mask", mask)
    if mask.dim() != 2:
        raise ValueError(f"mask must be (B, T), got shape {tuple(mask.shape)}")
    sequences = Padded(mask, mask)
    items, divisor = divisors(
        sequences,
        rule,
        num_items_in_batch=num_items_in_batch,
        num_sequences_in_batch=num_sequences_in_batch,
        max_completion_length=max_completion_length,
    )
    return sequences.select(per_token(items, divisor, sequences))


class Divisors(NamedTuple):
    """Weight of an active token: 1 / (max(items, 1) divisor).

    Attributes:
        items: number, or tensor () or per sequence (B,), counts of tokens.
        divisor: float or 0-d tensor.
    """

    items: float | torch.Tensor
    divisor: float | torch.Tensor


def divisors(
    sequences,
    rule,
    *,
    num_items_in_batch=None,
    num_sequences_in_batch=None,
    max_completion_length=None,
):
    """Divisors of a rule for tokens in sequences; arguments and errors as `token_weights`."""
    check_choice("normalizer", rule, RULES)
    items = _divisor("num_items_in_batch", num_items_in_batch, sequences, at_least=0)
    number = _divisor("num_sequences_in_batch", num_sequences_in_batch, sequences)
    length = _divisor("max_completion_length", max_completion_length, sequences)
    number = float(sequences.number or 1) if number is None else number
    if rule == "seq-mean-token-mean":
        return Divisors(sequences.counts, number)
    if rule == "token-mean" and items is not None:
        return Divisors(items, 1.0)
    if rule in ("token-mean", "token-mean-local"):
        return Divisors(sequences.total, 1.0)
    if rule == "seq-mean-token-sum-norm":
        length = max(sequences.padded_length(), 1.0) if length is None else length
        return Divisors(1.0, number * length)
    if rule == "seq-mean-token-sum":
        return Divisors(1.0, number)
    return Divisors(1.0, 1.0)


def per_token(items, divisor, sequences):
    """The weight of `Divisors` as a tensor that broadcasts against tokens, float32."""
    if not isinstance(items, torch.Tensor):
        items = torch.full((), items, dtype=torch.float32, device=sequences.device)
    return 1.0 / (sequences.spread(items).float().clamp(min=1) * divisor)


def _divisor(name, value, sequences, at_least=None):
    """None, a float or a 0-d tensor; its value is looked at unless that waits for a device."""
    if value is None:
        return None
    device = sequences.device
    if isinstance(value, torch.Tensor):
        if value.dim() != 0 or value.device not in (device, torch.device("cpu")):
            found = f"shape {tuple(value.shape)} on {value.device}"
            raise ValueError(f"{name} must be a number or a 0-d tensor, got {found}")
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return value.to(device)
    elif not isinstance(value, NUMBERS):
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {value!r}")
    if not (value < math.inf and (value > 0 if at_least is None else value >= at_least)):
        bound = "> 0" if at_least is None else f">= {at_least}"
        raise ValueError(f"{name} must be {bound} and finite, got {value}")
    return value.to(device) if isinstance(value, torch.Tensor) else float(value)
