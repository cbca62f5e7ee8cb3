"""Vocabulary-parallel logits: every rank of a group holds some columns of each row.

Ranks exchange the softmax statistics of their columns, 12 bytes a token, 16 with entropies, and
merge them in rank order, so that all have the same bits. Gradients stay in the shard.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fused import checks
from grpo_fused.bundles import Statistics
from grpo_fused.torch_backend.rows import LN2, LOG2E, sharpness


class Shards(NamedTuple):
    """Where the columns of this rank lie in the vocabulary.

    Attributes:
        group: the ranks that hold one vocabulary, in the order of their columns.
        start: the first column of this rank.
        size: columns of all ranks; None = not known without an exchange.
        reduces: whether gradients of hidden states are summed over the ranks.
    """

    group: "torch.distributed.ProcessGroup"
    start: int
    size: int | None
    reduces: bool = True


def find_shards(name, tensor, dimension, group, vocab_start):
    """(local tensor, `Shards` or None) of logits or a weight, a DTensor or the shard of this rank.

    Args:
        name, tensor: the argument of a public function.
        dimension: that of the vocabulary.
        group, vocab_start: as `selective_log_softmax`.

    Raises:
        ValueError: a DTensor that is not sharded over the vocabulary alone, or given with a group;
            a group or vocab_start of the wrong kind.
    """
    placed = _is_dtensor(tensor)
    if group is None and not placed:
        if vocab_start is not None:
            raise ValueError("vocab_start requires vocab_parallel_group, got None")
        return tensor, None
    if placed:
        if group is not None:
            raise ValueError(
                f"vocab_parallel_group must be None if {name} is a DTensor: it has one"
            )
        return _of_dtensor(name, tensor, dimension % tensor.dim())
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(f"vocab_parallel_group must be a ProcessGroup or None, got {group!r}")
    if vocab_start is None:
        return tensor, _exchange_sizes(tensor, dimension, group)
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int) or vocab_start < 0:
        raise ValueError(f"vocab_start must be a nonnegative integer or None, got {vocab_start!r}")
    return tensor, Shards(group, vocab_start, None)


def _is_dtensor(tensor):
    if type(tensor) in (Tensor, torch.nn.Parameter) or not isinstance(tensor, Tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _of_dtensor(name, tensor, dimension):
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = tensor.device_mesh, tensor.placements
    sharded = [i for i, placement in enumerate(placements) if placement == Shard(dimension)]
    others = [p for p in placements if p not in (Shard(dimension), Replicate())]
    if len(sharded) != 1 or others:
        raise ValueError(
            f"{name} must be sharded over its dimension {dimension}, the vocabulary, and "
            f"replicated over other dimensions of its mesh, got {list(placements)}: "
            "redistribute() it"
        )
    group, size = mesh.get_group(sharded[0]), tensor.shape[dimension]
    share = math.ceil(size / group.size())  # of all ranks but the last, as torch.chunk cuts
    return tensor.to_local(), Shards(group, min(share * group.rank(), size), size)


def _gather(tensor, group):
    """The tensors of all ranks, one behind the other in the first dimension."""
    dist = torch.distributed
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch < 2.13
    gathered = tensor.new_empty(group.size() * len(tensor), *tensor.shape[1:])
    gather(gathered, tensor, group=group)
    return gathered


def _exchange_sizes(tensor, dimension, group):
    size = torch.tensor([tensor.shape[dimension]], device=tensor.device)
    sizes = _gather(size, group).tolist()
    return Shards(group, sum(sizes[: group.rank()]), sum(sizes))


def merge(shards, local, tokens, scales, backend):
    """`Statistics` (B, T) of whole rows, from those of the columns of every rank.

    Args:
        local: `Statistics` of this rank, written by `logprob_fwd` with `shard`: in the place of
            log-probabilities log(2^z) of the target, NaN if its column is elsewhere, in the place
            of entropies the sums of 2^z z; z is relative to the maxima.
        tokens, scales, backend: those of the rows.

    Raises:
        ValueError: on the CPU, an active target that no rank has.
    """
    parts = torch.stack([part for part in local if part is not None])
    gathered = _gather(parts, shards.group).unflatten(0, (-1, len(parts)))
    targets, *weighted, maxima, totals = gathered.unbind(1)
    maximum = maxima.amax(0)  # NaN if one is
    # Of the torch backend, maxima are logits; of the kernels, exponents of 2.
    unit = sharpness(tokens.temperature, scales) * LOG2E if backend == "torch" else 1.0
    shifts = (maxima - maximum) * unit
    totals = totals * torch.exp2(shifts)
    total = totals.sum(0)
    chosen = targets + shifts * LN2
    owned = ~targets.isnan()
    known = owned.any(0)
    logp = torch.where(owned, chosen, 0.0).sum(0) - total.log()
    logp = logp.clamp(max=0.0).masked_fill(~known, torch.nan)
    entropy = None
    if weighted:
        sums = weighted[0] * torch.exp2(shifts) + totals * shifts
        entropy = (total.log() - sums.sum(0) / total * LN2).clamp(min=0.0)
    if checks.is_readable(logp.device):
        _check_known(known | maximum.isnan(), tokens)
    if tokens.active is not None:
        logp = torch.where(tokens.active, logp, 0.0)
        entropy = None if entropy is None else torch.where(tokens.active, entropy, 0.0)
    return Statistics(logp, entropy, maximum, total)


def sum_over_ranks(shards, dhidden):
    """Sum the gradients of hidden states, to which every rank's columns add, in place."""
    if shards.reduces:
        torch.distributed.all_reduce(dhidden, group=shards.group)


def _check_known(known, tokens):
    wrong = ~known if tokens.active is None else ~known & tokens.active
    if wrong.any():
        b, t = wrong.nonzero()[0].tolist()
        raise ValueError(f"the id of token {t} of sequence {b} lies in the vocabulary of no rank")
