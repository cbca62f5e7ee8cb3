"""Order of the tokens that a head is applied to: with a gradient first, masked ones not at all.

Tokens whose gradient is exactly 0 are computed forward only. The counts come to the host in one
copy. Without a mask nothing is counted on a device, except the lengths of packed sequences in
sequence-level losses; on a CPU, where counting is free, it always is.
"""

from typing import NamedTuple

import torch

from grpo_fused import checks


class Order(NamedTuple):
    """Order of tokens, `Chunking.order` and `Chunking.counts`; None: all tokens as they come."""

    tokens: torch.Tensor | None
    counts: torch.Tensor | None


class SequenceOrder(NamedTuple):
    """Order of sequences, that of their tokens."""

    index: torch.Tensor | None  # type: ignore[assignment]  # (B,), or None: as they come
    lengths: torch.Tensor  # (B,) active tokens
    on_host: list[int]  # the same


def tokens_with_gradient(tokens, sequences, couples_tokens=False, needs_advantage=True):
    """(B, T) bool, or None: all. The policy term has no gradient without a weight.

    Nor has it one without an advantage, if the objective needs one. If the loss couples the tokens
    of a sequence, one token with a gradient gives it to all.
    """
    has_kl = tokens.ref_logps is not None and (_is_tensor(tokens.w_kl) or tokens.w_kl != 0)
    if has_kl or tokens.w_entropy is not None:
        return None
    if sequences.active is None and sequences.device.type != "cpu":
        return None
    weighted = _is_tensor(tokens.w_policy) and tokens.w_policy.dim() > 0
    some_have_none = needs_advantage
    if needs_advantage and checks.is_readable(sequences.device) and not weighted:
        some_have_none = not bool(tokens.advantages.all())
    if not (some_have_none or weighted):
        return None
    wanted = tokens.w_policy != 0 if weighted else True
    if needs_advantage:
        wanted = (sequences.spread(tokens.advantages) != 0) & wanted
    wanted = wanted.expand(tokens.ids.shape)
    if couples_tokens:
        wanted = sequences.spread(sequences.sum(wanted.float()) > 0).expand_as(wanted)
    return wanted


def _is_tensor(value):
    return isinstance(value, torch.Tensor)


def order_tokens(sequences, wanted=None):
    """`Order` of the active tokens of a batch, those with a `wanted` gradient first."""
    if wanted is None and (sequences.active is None or _counts_all(sequences)):
        return Order(None, None)
    wanted, active = _wanted(sequences, wanted)
    return _order(wanted, active, _totals(sequences, wanted, active).cpu())


def _counts_all(sequences):
    """Whether all tokens are active; False where checking would synchronise."""
    return checks.is_readable(sequences.device) and int(sequences.total) == sequences.tokens


def order_sequences(sequences, wanted=None):
    """(Order, SequenceOrder): sequences stay together, those with a `wanted` gradient first."""
    counts, index = sequences.counts, None
    if not isinstance(counts, torch.Tensor):
        on_host = [int(counts)] * sequences.number
        counts = torch.full((sequences.number,), int(counts), device=sequences.device)
        if wanted is None:
            return Order(None, None), SequenceOrder(None, counts, on_host)
    counts = counts.long()
    if sequences.active is None and wanted is None:
        return Order(None, None), SequenceOrder(None, counts, counts.tolist())
    if wanted is not None:
        index = (sequences.sum(wanted.float()) == 0).to(torch.uint8).argsort(stable=True)
        counts = counts[index]
    wanted, active = _wanted(sequences, wanted)
    on_host = torch.cat([_totals(sequences, wanted, active), counts]).cpu()
    order = _order(wanted, active, on_host[:2])
    index = None if order.tokens is None else index
    return order, SequenceOrder(index, counts, on_host[2:].tolist())


def _wanted(sequences, wanted):
    """Tokens (B, T) bool that have a gradient, and the active ones."""
    active = torch.ones_like(wanted) if sequences.active is None else sequences.active
    return active if wanted is None else active & wanted, active


def _totals(sequences, wanted, active):
    """(2,): how many tokens have a gradient, how many are active."""
    number = active.sum() if sequences.active is None else sequences.total
    return torch.stack([number if wanted is active else wanted.sum(), number])


def _order(wanted, active, totals):
    """`Order` of tokens. If all have a gradient, none: copies would slow down short inputs."""
    if not torch.compiler.is_compiling() and int(totals[0]) == wanted.numel():
        return Order(None, None)
    rank = 2 - active.to(torch.uint8) - wanted.to(torch.uint8)
    return Order(rank.flatten().argsort(stable=True), totals)


def group_sequences(lengths, limit):
    """Groups [first, last) of sequences, at most `limit` tokens each; None if one is longer."""
    if max(lengths, default=0) > limit:
        return None
    groups, first, size = [], 0, 0
    for k, length in enumerate(lengths):
        if size + length > limit:
            groups.append((first, k))
            first, size = k, 0
        size += length
    return [*groups, (first, len(lengths))]
