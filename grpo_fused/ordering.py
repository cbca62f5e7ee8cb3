"""Which tokens a head is applied to, and in which order: those that want a gradient first.

Masked tokens are left out, and tokens whose gradient is exactly 0 are read forward only. The counts
come to the host in one copy. Without a mask nothing is counted on a device, but for the lengths of
packed sequences whose tokens a loss couples; on a CPU, where it is free, it is.
"""

from typing import NamedTuple

import torch


class Order(NamedTuple):
    """Tokens as `kernels.linear.Head` takes them; None: all of them, as they come."""

    tokens: torch.Tensor | None  # (B * T,) indices: with gradient, active, masked
    counts: torch.Tensor | None  # (2,) on the CPU: how many want a gradient, how many are active


class SequenceOrder(NamedTuple):
    """Sequences in the order of their tokens."""

    index: torch.Tensor | None  # (B,), or None: as they come
    lengths: torch.Tensor  # (B,) active tokens
    on_host: list[int]  # the same


def tokens_with_gradient(tokens, weights, beta, sequences, *, coupled):
    """(B, T) bool, or None: all. Without advantage, or switched off, the policy term has none.

    Where the tokens of a sequence are `coupled`, one that has a gradient gives all of them one.
    """
    penalised = tokens.ref_logps is not None and (isinstance(beta, torch.Tensor) or beta != 0)
    if penalised or weights.entropy_coef is not None:
        return None
    if sequences.active is None and sequences.device.type != "cpu":
        return None
    asks = sequences.device.type == "cpu" and not torch.compiler.is_compiling()
    if asks and tokens.policy_mask is None and bool(tokens.advantages.all()):
        return None
    live = sequences.spread(tokens.advantages) != 0
    if tokens.policy_mask is not None:
        live = live & (sequences.spread(tokens.policy_mask) != 0)
    live = live.expand(tokens.ids.shape)
    if coupled:
        live = sequences.spread(sequences.sum(live.float()) > 0).expand_as(live)
    return live


def order_tokens(sequences, live=None):
    """Order of the active tokens of a batch, those that are `live` first."""
    if live is None and (sequences.active is None or _counts_all(sequences)):
        return Order(None, None)
    wanted, active = _wanted(sequences, live)
    return _order(wanted, active, _totals(sequences, wanted, active).cpu())


def _counts_all(sequences):
    """Whether no token is masked, where it is free to ask."""
    free = sequences.device.type == "cpu" and not torch.compiler.is_compiling()
    return free and int(sequences.total) == sequences.tokens


def order_sequences(sequences, live=None):
    """(Order, SequenceOrder): sequences stay whole, those that are `live` first."""
    counts, index = sequences.counts, None
    if not isinstance(counts, torch.Tensor):
        on_host = [int(counts)] * sequences.number
        counts = torch.full((sequences.number,), int(counts), device=sequences.device)
        if live is None:
            return Order(None, None), SequenceOrder(None, counts, on_host)
    counts = counts.long()
    if sequences.active is None and live is None:
        return Order(None, None), SequenceOrder(None, counts, counts.tolist())
    if live is not None:
        index = (sequences.sum(live.float()) == 0).to(torch.uint8).argsort(stable=True)
        counts = counts[index]
    wanted, active = _wanted(sequences, live)
    on_host = torch.cat([_totals(sequences, wanted, active), counts]).cpu()
    order = _order(wanted, active, on_host[:2])
    index = None if order.tokens is None else index
    return order, SequenceOrder(index, counts, on_host[2:].tolist())


def _wanted(sequences, live):
    """Tokens (B, T) bool that want a gradient, and the active ones."""
    active = torch.ones_like(live) if sequences.active is None else sequences.active
    return active if live is None else active & live, active


def _totals(sequences, wanted, active):
    """(2,): how many tokens want a gradient, how many are active."""
    number = active.sum() if sequences.active is None else sequences.total
    return torch.stack([number if wanted is active else wanted.sum(), number])


def _order(wanted, active, totals):
    """Where all tokens want a gradient there is nothing to pack: short inputs feel the copies."""
    if not torch.compiler.is_compiling() and int(totals[0]) == wanted.numel():
        return Order(None, None)
    rank = 2 - active.to(torch.uint8) - wanted.to(torch.uint8)
    return Order(rank.flatten().argsort(stable=True), totals)


def cut_at_ends(lengths, limit):
    """Groups [first, last) of sequences, at most `limit` tokens each; None: one is longer."""
    if max(lengths, default=0) > limit:
        return None
    groups, first, size = [], 0, 0
    for k, length in enumerate(lengths):
        if size + length > limit:
            groups.append((first, k))
            first, size = k, 0
        size += length
    return [*groups, (first, len(lengths))]
