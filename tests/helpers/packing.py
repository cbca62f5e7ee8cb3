"""A padded batch, packed: its sequences one behind the other, without what was never theirs."""

import torch


def pack(lengths, *tensors):
    """(B, T, ...) tensors as (N, ...): the first lengths[b] tokens of sequence b; None stays."""
    return [
        None if t is None else torch.cat([row[:n] for row, n in zip(t, lengths, strict=True)])
        for t in tensors
    ]


def unpack(lengths, T, values):
    """(N, ...) values as (B, T, ...), 0 where a sequence has no token."""
    out = values.new_zeros(len(lengths), T, *values.shape[1:])
    for b, part in enumerate(values.split(list(lengths))):
        out[b, : len(part)] = part
    return out


def cu_seqlens(lengths, device, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)
