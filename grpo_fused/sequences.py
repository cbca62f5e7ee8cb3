"""Sequences of a padded or packed batch, behind one interface for sequence-level losses.

Per-token tensors are (B, T), or (1, N) for a packed batch of N tokens. Masked values are replaced
by torch.where, never multiplied by 0, which would turn inf into NaN.
"""

import torch
import torch.nn.functional as F

from grpo_fused.checks import check_cu_seqlens, check_tensor
from grpo_fused.collectives import check_group, sum_over_ranks


class once:
    """A cached property. functools.cached_property takes a lock, which Dynamo cannot trace."""

    def __init__(self, compute):
        self.compute, self.name = compute, compute.__name__

    def __get__(self, instance, owner):
        value = self.compute(instance)
        setattr(instance, self.name, value)
        return value


class Padded:
    """One sequence per row: tokens (B, T).

    Args:
        shape: (B, T).
        mask: (B, T), nonzero = active; None = all active.
        device: of the tokens; None = that of the mask.

    Attributes:
        active: (B, T) bool, or None if all tokens are active.
        number: B, number of sequences.
        length: T.
        tokens: B T, active or not.
        counts: number of active tokens per sequence: (B,), or a float if all tokens are active.
        total: number of active tokens: a 0-d tensor, or a float if all tokens are active.
        group: None, the ranks that share the sequences: see `OverRanks`.
        local: the tokens of this rank as sequences of their own.
    """

    group = None

    def __init__(self, shape, mask, device=None):
        self.active = None if mask is None else _as_bool(mask)
        self.shape = self.number, self.length = tuple(shape)
        self.tokens = self.number * self.length
        self.device = mask.device if device is None else device

    @property
    def local(self):
        return self

    @once
    def counts(self):
        return float(self.length) if self.active is None else self.active.sum(1)

    @once
    def total(self):
        return float(self.tokens) if self.active is None else self.active.sum()

    def select(self, values):
        """Per-token values, 0 where masked."""
        return values if self.active is None else torch.where(self.active, values, 0.0)

    def spread(self, values):
        """Per-sequence values (B,), expanded to broadcast against tokens; others unchanged."""
        return values[:, None] if values.dim() == 1 else values

    def broadcast(self, values):
        """Values per sequence (B,), or broadcastable to tokens, as a contiguous (B, T) tensor."""
        return self.spread(values).expand(*self.shape).contiguous()

    def padded_length(self):
        """T, the common length of padded sequences."""
        return float(self.length)

    @property
    def ends(self):
        """The column where the sequence of a token ends: T, packed (1, N)."""
        return self.length

    def sum(self, values):
        """Sums (B,) over the active tokens of each sequence."""
        return self.select(values).sum(1)

    def mean(self, values):
        """Means (B,) over the active tokens of each sequence; 0 without active tokens."""
        counts = self.counts
        least = counts.clamp(min=1) if isinstance(counts, torch.Tensor) else max(counts, 1.0)
        return self.sum(values) / least

    def discounted(self, values, decay):
        """Sums (B, T) from every token on, the k-th active token after it times decay^k.

        By doubling: after n steps a sum spans 2^n positions.
        """
        values = self.select(values)
        rate = torch.full_like(values, decay)
        rate = rate if self.active is None else torch.where(self.active, rate, 1.0)
        rate = torch.where(self.is_last(), 0.0, rate)
        step = 1
        while step < values.shape[1]:
            later, further = (F.pad(x[:, step:], (0, step)) for x in (values, rate))
            values = values + torch.where(rate == 0, 0.0, rate * later)
            rate, step = rate * further, 2 * step
        return values

    def is_last(self):
        """Where sequences end, broadcastable to (B, T) bool."""
        return torch.arange(1, self.length + 1, device=self.device) == self.length


class Packed(Padded):
    """Concatenated sequences: tokens (1, N), cu_seqlens (B + 1,) from 0 to N.

    Sequences may be empty. To avoid synchronising with a device, invalid cu_seqlens there are
    clamped to [0, N] instead of raising an error.

    Args:
        locate: launcher that computes index and counts in one kernel; None = several torch calls.
    """

    def __init__(self, shape, mask, cu_seqlens, device=None, locate=None):
        super().__init__(shape, mask, cu_seqlens.device if device is None else device)
        self.number = len(cu_seqlens) - 1
        self.cu_seqlens, self.locate = cu_seqlens, locate if self.number else None

    @once
    def offsets(self):
        """(B + 1,) cu_seqlens, clamped to be nondecreasing within [0, N]."""
        return self.cu_seqlens.long().clamp(0, self.length).cummax(0).values

    @once
    def located(self):
        """(index, counts) from the launcher."""
        index = torch.empty(self.length, dtype=torch.int64, device=self.device)
        counts = torch.empty(self.number, dtype=torch.float32, device=self.device)
        self.locate(self.cu_seqlens.contiguous(), self.active, index, counts)
        return index, counts

    @once
    def index(self):
        """(N,) index of each token's sequence."""
        if self.locate is not None:
            return self.located[0]
        position = torch.arange(self.length, device=self.device)
        index = torch.searchsorted(self.offsets[1:], position, right=True)
        return index.clamp_(max=max(self.number - 1, 0))

    @once
    def counts(self):
        if self.locate is not None:
            return self.located[1]
        if self.active is None:
            return self.offsets.diff()
        return self._sum(self.active.to(torch.float32))

    def spread(self, values):
        return values[self.index][None] if values.dim() == 1 else values

    def padded_length(self):
        raise ValueError(
            "max_completion_length is required with cu_seqlens and seq-mean-token-sum-norm: "
            "packed sequences have no common length, got None"
        )

    @property
    def ends(self):
        return self.spread(self.offsets[1:])

    def sum(self, values):
        return self._sum(self.select(values))

    def is_last(self):
        changes = self.index[1:] != self.index[:-1]
        return F.pad(changes, (0, 1), value=True)

    def _sum(self, values):
        if self.number == 0:
            return values[0, :0]
        return torch.segment_reduce(values[0], "sum", offsets=self.offsets, unsafe=True)


class OverRanks:
    """Sequences whose tokens lie on several ranks, every one of which has some of each.

    Values per token are those of this rank; sums, means and counts are those of whole sequences,
    each with an exchange of one number a sequence.

    Args:
        local: `Padded` or `Packed` tokens of this rank; all ranks have the same sequences, in the
            same order.
        group: the ranks, a torch.distributed group.
    """

    def __init__(self, local, group):
        self.local, self.group = local, group

    def __getattr__(self, name):
        return getattr(self.local, name)

    @once
    def counts(self):
        counts = self.local.counts
        if not isinstance(counts, torch.Tensor):
            counts = torch.full((self.local.number,), counts, device=self.local.device)
        # Of one dtype, whether a rank has a mask or not.
        return sum_over_ranks(counts.to(torch.float32), self.group)

    @once
    def total(self):
        return self.counts.sum()

    def padded_length(self):
        raise ValueError(
            "max_completion_length is required with sequence_group and seq-mean-token-sum-norm: "
            "a rank does not know the length of the others' tokens, got None"
        )

    def sum(self, values):
        return sum_over_ranks(self.local.sum(values), self.group)

    mean = Padded.mean


def over_ranks(local, group):
    """`OverRanks` of sequences, or themselves without a group."""
    return local if group is None else OverRanks(local, group)


def lay_out_sequences(mask, cu_seqlens, group, **tensors):
    """(sequences, tensors) after checks of the tensors, given by name, (B, T) or packed (N,).

    Returned tensors are (B, T) or (1, N).
    """
    shape = device = None
    for name, tensor in tensors.items():
        check_tensor(name, tensor, shape, device)
        shape, device = tuple(tensor.shape), tensor.device
        layout = "(B, T)" if cu_seqlens is None else "(N,) with cu_seqlens"
        if len(shape) != (2 if cu_seqlens is None else 1):
            remedy = "; packed tensors need cu_seqlens" if len(shape) == 1 else ""
            raise ValueError(f"{name} must have shape {layout}, got {shape}{remedy}")
    if mask is not None:
        check_tensor("mask", mask, shape, device)
    check_group("sequence_group", group)
    tensors = list(tensors.values())
    if cu_seqlens is None:
        sequences = Padded(shape, mask, device)
    else:
        check_cu_seqlens(cu_seqlens, *shape, device)
        tensors = [tensor[None] for tensor in tensors]
        sequences = Packed((1, *shape), None if mask is None else mask[None], cu_seqlens)
    return over_ranks(sequences, group), tensors


def as_given(values, cu_seqlens):
    """Per-token values in the shape of the input; per-sequence values as (B, 1), packed (B,)."""
    if cu_seqlens is not None:
        return values.flatten()
    return values[:, None] if values.dim() == 1 else values


def advantages_of(advantages, sequences, like):
    """Advantages (B,), or of the shape of `like`, checked, as (B, T) or (B, 1), packed (1, N)."""
    check_tensor("advantages", advantages)
    wanted = ((sequences.number,), tuple(like.shape))
    if tuple(advantages.shape) not in wanted or advantages.device != like.device:
        choice = f"{wanted[0]} or {wanted[1]} on {like.device}"
        got = f"{tuple(advantages.shape)} on {advantages.device}"
        raise ValueError(f"advantages must have shape {choice}, got {got}")
    if tuple(advantages.shape) == wanted[0]:
        return sequences.spread(advantages)
    return advantages[None] if advantages.dim() == 1 else advantages


def _as_bool(mask):
    return (mask if mask.dtype == torch.bool else mask != 0).contiguous()
