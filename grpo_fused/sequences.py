"""Which tokens make a sequence: rows of a padded batch, or stretches of a packed one.

Both answer the same questions, so a loss that couples the tokens of a sequence is written once.
Tokens are always (B, T) tensors; a packed batch of N tokens is one row, (1, N). What is not active
is selected away, never multiplied by 0.
"""

import torch


class once:
    """A property computed once. That of functools takes a lock, which Dynamo cannot trace."""

    def __init__(self, compute):
        self.compute, self.name = compute, compute.__name__

    def __get__(self, instance, owner):
        value = self.compute(instance)
        setattr(instance, self.name, value)
        return value


class Padded:
    """One sequence a row: tokens (B, T).

    Attributes:
        active: (B, T) bool, or None: all are.
        number: B. length: T. tokens: B T.
        counts: active tokens of every sequence: (B,), or a number that all of them share.
        total: active tokens of the batch: a 0-d tensor or a number.
    """

    def __init__(self, ids, mask):
        self.active = None if mask is None else _as_bool(mask)
        self.number, self.length = ids.shape
        self.tokens = ids.numel()
        self.device = ids.device

    @once
    def counts(self):
        return float(self.length) if self.active is None else self.active.sum(1)

    @once
    def total(self):
        return float(self.tokens) if self.active is None else self.active.sum()

    def select(self, values):
        """Values of tokens, 0 where masked."""
        return values if self.active is None else torch.where(self.active, values, 0.0)

    def spread(self, values):
        """Values per sequence (B,) so that they broadcast against tokens; others as they are."""
        return values[:, None] if values.dim() == 1 else values

    def argument(self, values):
        """Values as launchers take them: per sequence (B,), or per token (B, T) contiguous."""
        return values

    def padded_length(self):
        """Tokens a sequence has room for."""
        return float(self.length)

    def sum(self, values):
        """Sums (B,) over the active tokens of every sequence."""
        return self.select(values).sum(1)

    def mean(self, values):
        """Means (B,) over the active tokens of every sequence, 0 without any."""
        counts = self.counts
        least = counts.clamp(min=1) if isinstance(counts, torch.Tensor) else max(counts, 1.0)
        return self.sum(values) / least


class Packed(Padded):
    """Sequences one behind the other: tokens (1, N), cu_seqlens (B + 1,) their first tokens and N.

    Sequences may be empty. A token's sequence is found without waiting for the device; a device
    cannot be asked about wrong cu_seqlens, so they are cut to what lies inside of the tokens.

    Args:
        locate: a launcher that finds index and counts in one launch; None: torch does, in several.
    """

    def __init__(self, ids, mask, cu_seqlens, locate=None):
        super().__init__(ids, mask)
        self.number = len(cu_seqlens) - 1
        self.cu_seqlens, self.locate = cu_seqlens, locate if self.number else None

    @once
    def offsets(self):
        """(B + 1,) cu_seqlens that rise from 0 to N at most."""
        return self.cu_seqlens.long().clamp(0, self.length).cummax(0).values

    @once
    def located(self):
        """(index, counts) of a launcher."""
        index = torch.empty(self.length, dtype=torch.int64, device=self.device)
        counts = torch.empty(self.number, dtype=torch.float32, device=self.device)
        self.locate(self.cu_seqlens.contiguous(), self.active, index, counts)
        return index, counts

    @once
    def index(self):
        """(N,) number of the sequence of every token."""
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

    def argument(self, values):
        return self.spread(values).contiguous()

    def padded_length(self):
        raise ValueError(
            "max_completion_length is needed with cu_seqlens for seq-mean-token-sum-norm: packed "
            "sequences have no common length, got None"
        )

    def sum(self, values):
        return self._sum(self.select(values))

    def _sum(self, values):
        if self.number == 0:
            return values[0, :0]
        return torch.segment_reduce(values[0], "sum", offsets=self.offsets, unsafe=True)


def _as_bool(mask):
    return (mask if mask.dtype == torch.bool else mask != 0).contiguous()
