"""Supports: the tokens that a sampler kept of every row of logits, as compressed rows.

A support is a pair (offsets, ids): the kept tokens of row n are ids[offsets[n] : offsets[n + 1]].
These functions track no gradient. They synchronise with the device, because the number of kept
tokens is the size of a tensor.
"""

from numbers import Integral, Real

import torch
from torch import Tensor

from grpo_fused import checks
from grpo_fused.checks import check_tensor

INTEGERS = (torch.int32, torch.int64)


@torch.no_grad()
def support_from_mask(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Support of the tokens that a mask keeps.

    Args:
        kept: (B, T, V) or (N, V), nonzero = kept, e.g. `scores > -inf` of processed scores.

    Returns:
        (offsets, ids): (B T + 1,) int64 and (K,) int32, ids rising within a row.

    Raises:
        ValueError: a mask that is not (B, T, V) or (N, V).
    """
    check_tensor("kept", kept)
    if kept.dim() not in (2, 3):
        raise ValueError(f"kept must be (B, T, V) or (N, V), got {tuple(kept.shape)}")
    rows = kept.reshape(-1, kept.shape[-1]) != 0
    offsets = torch.zeros(len(rows) + 1, dtype=torch.int64, device=kept.device)
    torch.cumsum(rows.sum(1), 0, out=offsets[1:])
    return offsets, rows.nonzero()[:, 1].int()


@torch.no_grad()
def sampling_support(
    logits: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Support of a sampler with top-k, then top-p, then min-p, in the order of transformers.

        top_k: logits no lower than the k-th highest, ties with it included
        top_p: the fewest most likely tokens whose probabilities add up to top_p or more
        min_p: probabilities no lower than min_p times the highest

    The most likely token is always kept.

    Args:
        logits: (B, T, V) or (N, V) float, of the policy that sampled.
        top_k: at least 1; None, or V and more, keeps all.
        top_p: in (0, 1]; None or 1 keeps all.
        min_p: in [0, 1]; None or 0 keeps all.
        temperature: number > 0, of the sampler.

    Returns:
        (offsets, ids) as `support_from_mask`.

    Raises:
        ValueError: logits of another shape; a parameter out of its range.

    References:
        Top-p: The Curious Case of Neural Text Degeneration, https://arxiv.org/abs/1904.09751.
        Min-p: Turning Up the Heat, https://arxiv.org/abs/2407.01082.
    """
    check_tensor("logits", logits)
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits must be (B, T, V) or (N, V), got {tuple(logits.shape)}")
    _check_sampling(top_k, top_p, min_p, temperature)
    x = logits.reshape(-1, logits.shape[-1]).float() / temperature
    if top_k is not None and top_k < x.shape[1]:
        least = x.topk(int(top_k), 1).values[:, -1:]
        x = x.masked_fill(x < least, -torch.inf)
    if top_p is not None and top_p < 1:
        highest, order = x.sort(dim=1, descending=True, stable=True)
        p = highest.softmax(1)
        dropped = p.cumsum(1) - p >= top_p  # what is more likely adds up to top_p
        dropped[:, 0] = False
        x = x.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)
    if min_p:
        p = x.softmax(1)
        x = x.masked_fill(p < min_p * p.amax(1, keepdim=True), -torch.inf)
    return support_from_mask(x > -torch.inf)


def _check_sampling(top_k, top_p, min_p, temperature):
    whole = isinstance(top_k, Integral) and not isinstance(top_k, bool)
    if top_k is not None and not (whole and top_k >= 1):
        raise ValueError(f"top_k must be an integer >= 1 or None, got {top_k!r}")
    for name, value, fits, wanted in (
        ("top_p", top_p, lambda p: 0 < p <= 1, "in (0, 1] or None"),
        ("min_p", min_p, lambda p: 0 <= p <= 1, "in [0, 1] or None"),
        ("temperature", temperature, lambda t: 0 < t < float("inf"), "a finite number > 0"),
    ):
        if value is None and name != "temperature":
            continue
        if not isinstance(value, Real) or not fits(value):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_support(source, layout, sequences, support):
    """Check (offsets, ids) of `grpo_loss`; return them. Values are read on the CPU only."""
    pair = isinstance(support, tuple | list) and len(support) == 2
    if not pair or not all(isinstance(t, Tensor) for t in support):
        got = [type(part).__name__ for part in support] if pair else type(support).__name__
        raise ValueError(f"support must be a pair of tensors (offsets, ids), got {got}")
    offsets, ids = support
    tokens = sequences.local.tokens
    for name, tensor, shape in (("offsets", offsets, (tokens + 1,)), ("ids", ids, None)):
        name, found = f"support {name}", tuple(tensor.shape)
        if tensor.dtype not in INTEGERS:
            raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")
        if found != shape if shape is not None else len(found) != 1:
            wanted = f"{shape} for {tokens} tokens" if shape else "(K,)"
            raise ValueError(f"{name} must have shape {wanted}, got {found}")
        if tensor.device != layout.device:
            raise ValueError(f"{name} is on {tensor.device}, {source.name} are on {layout.device}")
    ids = ids.contiguous()
    if checks.is_readable(ids.device):
        _check_values(source, sequences, offsets.long(), ids.long())
    return offsets, ids


def _check_values(source, sequences, offsets, ids):
    lengths, K = offsets.diff(), len(ids)
    if offsets[0] != 0 or offsets[-1] != K or bool((lengths < 0).any()):
        raise ValueError(
            f"support offsets must be nondecreasing from 0 to {K}, the number of ids, got "
            f"{offsets[0].item()} to {offsets[-1].item()}"
        )
    rows = torch.repeat_interleave(lengths)
    active = torch.ones(len(lengths), dtype=torch.bool)
    if sequences.active is not None:
        active = sequences.active.flatten()
    counts = active[rows]
    V = source.vocabulary
    outside = counts & ((ids < 0) | (ids >= (1 << 31 if V is None else V)))
    if outside.any():
        found = ids[outside][0].item()
        bound = "the vocabulary" if V is None else f"[0, {V})"
        raise ValueError(f"support ids must lie in {bound} for active tokens, got {found}")
    has_target = torch.zeros(len(lengths), dtype=torch.bool)
    has_target[rows[ids == source.ids.flatten()[rows]]] = True
    missing = active & ~has_target
    if missing.any():
        row = int(missing.nonzero()[0])
        raise ValueError(
            f"support must have the target of every active token, but {int(missing.sum())} rows "
            f"lack theirs; row {row} lacks {source.ids.flatten()[row].item()}"
        )
    if not bool(((ids.diff() > 0) | (rows.diff() > 0)).all()):  # not rising within rows
        keys = (rows * (int(ids.max()) + 1) + ids)[counts]
        if len(keys.unique()) < len(keys):
            raise ValueError("support ids must be distinct within the row of an active token")
