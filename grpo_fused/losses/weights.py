"""Normalizers as token weights, which depend on the mask and counts alone."""

import math

import torch
from torch import Tensor

from grpo_fused import checks
from grpo_fused.bundles import Number, Weight
from grpo_fused.checks import NUMBERS, check_choice, check_tensor
from grpo_fused.collectives import check_group
from grpo_fused.sequences import Padded, over_ranks

RULES = (
    "seq-mean-token-mean",
    "token-mean-local",
    "token-mean",
    "seq-mean-token-sum-norm",
    "seq-mean-token-sum",
    "token-sum",
)


def token_weights(
    mask: Tensor,
    rule: str,
    *,
    num_items_in_batch: Number | None = None,
    num_sequences_in_batch: Number | None = None,
    max_completion_length: Number | None = None,
    sequence_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Weights w of a normalizer: the loss is sum_bt w[b, t] * loss[b, t].

        seq-mean-token-mean       m / max(n_b, 1) / B       GRPO
        token-mean-local          m / max(sum m, 1)         BNPO
        token-mean                m / max(N, 1)             DAPO
        seq-mean-token-sum-norm   m / (B L)                 Dr. GRPO
        seq-mean-token-sum        m / B                     LUSPO
        token-sum                 m

    with m the mask, n_b = sum_t m[b, t], L = max_completion_length and N = num_items_in_batch.
    Given the divisors of the full batch, losses and gradients of micro-batches add up to those of
    the full batch, for every rule except token-mean-local. Divisors that the rule does not use are
    ignored.

    Args:
        mask: (B, T) bool, integer or float, nonzero = active.
        rule: one of RULES.
        num_items_in_batch: N, number or 0-d tensor; None = sum m. If gradients are averaged over
            ranks, pass the number of all ranks divided by the world size.
        num_sequences_in_batch: B, number or 0-d tensor; None = mask.shape[0], which includes fully
            masked sequences.
        max_completion_length: L, number or 0-d tensor; None = T, but needed with sequence_group.
        sequence_group: the ranks that hold the tokens of the same sequences, as in `grpo_loss`.

    Returns:
        (B, T) float32, exactly 0 where the mask is 0.

    Raises:
        ValueError: an unknown rule; a mask that is not (B, T); a divisor that is not finite and
            positive (num_items_in_batch may be 0).

    References:
        The papers of LOSSES. Names as in verl's loss_agg_mode.
    """
    check_tensor("mask", mask)
    if mask.dim() != 2:
        raise ValueError(f"mask must be (B, T), got shape {tuple(mask.shape)}")
    check_group("sequence_group", sequence_group)
    sequences = over_ranks(Padded(mask.shape, mask), sequence_group)
    weight = rule_weight(
        sequences,
        rule,
        num_items_in_batch=num_items_in_batch,
        num_sequences_in_batch=num_sequences_in_batch,
        max_completion_length=max_completion_length,
    )
    ones = torch.ones(mask.shape, dtype=torch.float32, device=mask.device)
    return sequences.select(ones * evaluate(weight, sequences))


def rule_weight(
    sequences,
    rule,
    coefficient=1.0,
    *,
    num_items_in_batch=None,
    num_sequences_in_batch=None,
    max_completion_length=None,
):
    """The `Weight` of a rule, times a coefficient; arguments and errors as `token_weights`."""
    check_choice("normalizer", rule, RULES)
    items = check_divisor("num_items_in_batch", num_items_in_batch, sequences, at_least=0)
    number = check_divisor("num_sequences_in_batch", num_sequences_in_batch, sequences)
    length = check_divisor("max_completion_length", max_completion_length, sequences)
    number = float(sequences.number or 1) if number is None else number
    if rule == "seq-mean-token-mean":
        return Weight(coefficient, sequences.counts, number)
    if rule == "token-mean" and items is not None:
        return Weight(coefficient, items, 1.0)
    if rule in ("token-mean", "token-mean-local"):
        return Weight(coefficient, sequences.total, 1.0)
    if rule == "seq-mean-token-sum-norm":
        length = max(sequences.padded_length(), 1.0) if length is None else length
        return Weight(coefficient, 1.0, number * length)
    if rule == "seq-mean-token-sum":
        return Weight(coefficient, 1.0, number)
    return Weight(coefficient, 1.0, 1.0)


def is_number(weight):
    """Whether a weight is a number, known without reading a tensor."""
    coefficient, items, divisor = weight
    return not (
        isinstance(coefficient, torch.Tensor)
        or isinstance(items, torch.Tensor)
        or isinstance(divisor, torch.Tensor)
    )


def evaluate(weight, sequences, policy_mask=None):
    """A `Weight` times the policy mask, as a number, a 0-d tensor or (B, T) float32."""
    if not is_number(weight):
        weight = [sequences.spread(v) if isinstance(v, torch.Tensor) else v for v in weight]
    coefficient, items, divisor = weight
    items = items.float().clamp(min=1) if isinstance(items, torch.Tensor) else max(items, 1.0)
    weight = coefficient / (items * divisor)
    if policy_mask is not None:  # no product: a masked coefficient may be NaN
        weight = torch.where(sequences.spread(policy_mask) != 0, weight, 0.0)
    if not isinstance(weight, torch.Tensor):
        return weight
    return sequences.broadcast(weight.float()) if weight.dim() else weight.float()


def check_divisor(name, value, sequences, at_least=None):
    """Check a divisor; return None, a float or a 0-d tensor. Reads tensors on the CPU only."""
    if value is None:
        return None
    device = sequences.device
    if isinstance(value, torch.Tensor):
        if value.dim() != 0 or value.device not in (device, torch.device("cpu")):
            found = f"shape {tuple(value.shape)} on {value.device}"
            raise ValueError(f"{name} must be a number or a 0-d tensor, got {found}")
        value = value.detach()
        if not checks.is_readable(value.device):
            return value.to(device)
    elif not isinstance(value, NUMBERS):
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {value!r}")
    if not (value < math.inf and (value > 0 if at_least is None else value >= at_least)):
        bound = "> 0" if at_least is None else f">= {at_least}"
        raise ValueError(f"{name} must be {bound} and finite, got {value}")
    return value.to(device) if isinstance(value, torch.Tensor) else float(value)
