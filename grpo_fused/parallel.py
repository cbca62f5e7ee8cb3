"""Vocabulary-parallel logits: every rank of a group holds some columns of each row.

Ranks exchange the softmax statistics of their columns, 12 bytes a token, 16 with entropies, and
merge them in rank order, so that all have the same bits; with a support as much again. Gradients
stay in the shard.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fused import checks
from grpo_fused.bundles import Statistics
from grpo_fused.collectives import check_group, gather, reduce_over_ranks, start_gather
from grpo_fused.torch_backend.rows import LN2, LOG2E, sharpness


class Shards(NamedTuple):
    """Where the columns of this rank lie in the vocabulary.

    Attributes:
        group: the ranks that hold one vocabulary, in the order of their columns.
        start: the first column of this rank.
        size: columns of all ranks; None = not known without an exchange.
        largest: columns of the rank that has most of them; None as for size.
        reduces: whether gradients of hidden states are summed over the ranks.
    """

    group: "torch.distributed.ProcessGroup"
    start: int
    size: int | None = None
    largest: int | None = None
    reduces: bool = True


def find_shards(name, tensor, dimension, group, vocab_start):
    """(local tensor, `Shards` or None) of logits or a weight, a DTensor or the shard of this rank.

    Args:
        name, tensor: the argument of a public function.
        dimension: that of the vocabulary.
        group, vocab_start: as `selective_log_softmax`.

    Raises:
        ValueError: a DTensor that is not sharded over the vocabulary alone, or over other ranks
            than those of the group; a group or vocab_start of the wrong kind.
    """
    check_group("vocab_parallel_group", group)
    placed = is_dtensor(tensor)
    if group is None and not placed:
        if vocab_start is not None:
            raise ValueError("vocab_start requires vocab_parallel_group, got None")
        return tensor, None
    if placed:
        if vocab_start is not None:
            raise ValueError(f"vocab_start must be None if {name} is a DTensor: it knows its own")
        return _of_dtensor(name, tensor, dimension % tensor.dim(), group)
    if vocab_start is None:
        return tensor, _exchange_sizes(group, tensor.shape[dimension], tensor.device)
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int) or vocab_start < 0:
        raise ValueError(f"vocab_start must be a nonnegative integer or None, got {vocab_start!r}")
    return tensor, Shards(group, vocab_start)


def find_head_shards(weight, bias, group, vocab_start):
    """(weight, bias, `Shards`) of an LM head that is sharded, both local to this rank.

    A weight sharded over the vocabulary looks like one that FSDP has sharded over data-parallel
    ranks, so only a mesh dimension named "tp", or the group, says which it is.

    Raises:
        ValueError: as `find_shards`; a DTensor that may be sharded over data-parallel ranks; a
            weight or bias on other ranks than the other.
    """
    if is_dtensor(weight) and weight.device_mesh.ndim > 1:
        raise ValueError(
            f"weight must be on a mesh of one dimension, got {weight.device_mesh}: who sums its "
            "gradient over the others is not known; pass to_local() and a vocab_parallel_group"
        )
    if is_dtensor(weight) and group is None and not is_vocab_parallel(weight):
        raise ValueError(
            f"weight is a DTensor {list(weight.placements)} on the mesh "
            f"{weight.device_mesh.mesh_dim_names}: only [Shard(0)] on ('tp',) says that its "
            "vocabulary is parallel; of other tensor-parallel ranks pass their "
            "vocab_parallel_group; sharded by FSDP, call the function within the forward of the "
            "module that owns it, where FSDP has gathered it, or pass full_tensor() with "
            'grad_placements=[Partial("avg")]'
        )
    if is_dtensor(bias):
        if not is_dtensor(weight) or bias.device_mesh != weight.device_mesh:
            raise ValueError("bias is a DTensor, weight is not, or it is on other ranks")
        bias = _of_dtensor("bias", bias, 0, group)[0]
    weight, shards = find_shards("weight", weight, 0, group, vocab_start)
    return weight, bias, shards


def is_vocab_parallel(weight):
    """Whether a DTensor weight (V, H) says by itself that its vocabulary is parallel."""
    from torch.distributed.tensor import Shard

    named = weight.device_mesh.mesh_dim_names == ("tp",)
    return named and weight.placements in ((Shard(0),), (Shard(-2),))


def is_dtensor(tensor):
    if type(tensor) in (Tensor, torch.nn.Parameter) or not isinstance(tensor, Tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def dtensor_group(tensor):
    """The ranks of the one mesh dimension over which a DTensor is sharded, or None."""
    sharded = [i for i, p in enumerate(tensor.placements) if p.is_shard()]
    return tensor.device_mesh.get_group(sharded[0]) if len(sharded) == 1 else None


def _of_dtensor(name, tensor, dimension, group):
    from torch.distributed.tensor import Replicate, Shard

    placements = tensor.placements
    others = [p for p in placements if p not in (Shard(dimension), Replicate())]
    if placements.count(Shard(dimension)) != 1 or others:
        raise ValueError(
            f"{name} must be sharded over its dimension {dimension}, the vocabulary, and "
            f"replicated over other dimensions of its mesh, got {list(placements)}: "
            "redistribute() it"
        )
    own, size = dtensor_group(tensor), tensor.shape[dimension]
    if group is not None and ranks_of(group) != ranks_of(own):
        raise ValueError(
            f"vocab_parallel_group must have the ranks of {name}, {ranks_of(own)}, "
            f"got {ranks_of(group)}"
        )
    share = math.ceil(size / own.size())  # of all ranks but the last, as torch.chunk cuts
    if share * (own.size() - 1) >= size:
        raise ValueError(f"{name} must have columns on each of {own.size()} ranks, got {size}")
    return tensor.to_local(), Shards(own, share * own.rank(), size, share)


def ranks_of(group):
    return torch.distributed.get_process_group_ranks(group)


def _exchange_sizes(group, size, device):
    sizes = gather(torch.tensor([size], device=device), group).tolist()
    return Shards(group, sum(sizes[: group.rank()]), sum(sizes), max(sizes))


def largest_shard(shards, size, device):
    """Columns of the rank that has most of them, by an exchange if the shards do not tell.

    Args:
        size: columns of this rank.
    """
    if shards.largest is not None:
        return shards.largest
    return _exchange_sizes(shards.group, size, device).largest


def in_shard(shards, tokens):
    """Tokens with ids relative to the first column of this rank; themselves without shards."""
    if shards is None:
        return tokens
    support = tokens.support
    if support is not None:
        support = support._replace(ids=support.ids - shards.start)
    return tokens._replace(ids=tokens.ids - shards.start, support=support)


def exchange_statistics(shards, local):
    """Start the exchange of `Statistics` (B, T) of the columns of this rank, for `merge`.

    Args:
        local: written by `logprob_fwd` with `shard`: in the place of log-probabilities log(2^z) of
            the target, NaN if its column is elsewhere, in the place of entropies the sums of
            2^z z; z is relative to the maxima.
    """
    parts = torch.stack([part for part in local if part is not None])
    pending = start_gather(parts, shards.group)
    return pending._replace(gathered=pending.gathered.unflatten(0, (-1, len(parts))))


def merge(exchange, local, tokens, scales, backend):
    """`Statistics` (B, T) of whole rows, from those of the columns of every rank.

    Args:
        exchange: of `exchange_statistics`.
        local: what it was given.
        tokens, scales, backend: those of the rows.

    Raises:
        ValueError: on the CPU, an active target that no rank has, or has kept.
    """
    parts = iter(exchange.wait().unbind(1))
    gathered = [None if part is None else next(parts) for part in local]
    # Of the torch backend, maxima are logits; of the kernels, exponents of 2.
    unit = sharpness(tokens.temperature, scales) * LOG2E if backend == "torch" else 1.0
    found = []
    for part, where in ((gathered[:4], "the vocabulary"), (gathered[4:], "the support")):
        found += part if part[0] is None else _merge(part, unit, tokens, where)
    return Statistics(*found)


def _merge(gathered, unit, tokens, where):
    """Fields of `Statistics` over the vocabulary, or those over the support."""
    targets, weighted, maxima, totals = gathered
    maximum = maxima.amax(0)  # NaN if one is
    shifts = (maxima - maximum) * unit
    totals = totals * torch.exp2(shifts)
    total = totals.sum(0)
    chosen = targets + shifts * LN2
    owned = ~targets.isnan()
    known = owned.any(0)
    logp = torch.where(owned, chosen, 0.0).sum(0) - total.log()
    logp = logp.clamp(max=0.0).masked_fill(~known, torch.nan)
    entropy = None
    if weighted is not None:
        sums = weighted * torch.exp2(shifts) + totals * shifts
        entropy = (total.log() - sums.sum(0) / total * LN2).clamp(min=0.0)
    if checks.is_readable(logp.device):
        _check_known(known | maximum.isnan(), tokens, where)
    if tokens.active is not None:
        logp = torch.where(tokens.active, logp, 0.0)
        entropy = None if entropy is None else torch.where(tokens.active, entropy, 0.0)
    return logp, entropy, maximum, total


def reduce_hidden_grad(shards, dhidden):
    """Sum the gradients of hidden states, to which every rank's columns add, in place."""
    if shards.reduces:
        reduce_over_ranks(dhidden, shards.group)


def _check_known(known, tokens, where):
    wrong = ~known if tokens.active is None else ~known & tokens.active
    if wrong.any():
        raise ValueError(f"{int(wrong.sum())} active ids lie in {where} of no rank")
