"""Rows of logits in torch: blocks of a few megabytes, their statistics and their gradient.

No temporary is as large as the logits; the exponentials are computed once, relative to the row's
maximum. They are powers of 2, as in the kernels: `torch.exp` takes four times as long.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from grpo_fused.bundles import per_token
from grpo_fused.torch_backend.pages import is_unwritten

BLOCK_BYTES = 8 << 20  # float32 scratch of a block of rows; see benchmarks/NOTES.md
GAP_ELEMENTS = 1 << 14  # masked rows worth this little are computed with their neighbours
START = -1.0e30  # stands for the maximum of columns that are all -inf
FLOOR = -1.0e4  # 2^z is exactly 0 below this, and 0 * FLOOR is 0 where 0 * -inf would be NaN
VECTOR, THREAD_ELEMENTS = 32, 1 << 15  # on a CPU: torch's vectors, and its least share of a thread
LOG2E, LN2 = math.log2(math.e), math.log(2.0)


def _active_blocks(active, N, V):
    """Cut N rows into (start, stop) blocks: runs of active (N,) ones on CPU, all elsewhere.

    Only on CPU can active rows be listed without waiting for the device; elsewhere every row is
    computed and the masked ones are selected away.
    """
    limit = max(1, BLOCK_BYTES // (4 * V))
    runs = [(0, N)]
    if active is not None and active.device.type == "cpu":
        rows = active.nonzero().flatten()
        cuts = (rows.diff() > 1 + GAP_ELEMENTS // V).nonzero().flatten() + 1
        runs = [(run[0].item(), run[-1].item() + 1) for run in rows.tensor_split(cuts) if len(run)]
    return [
        (start, min(start + limit, stop))
        for first, stop in runs
        for start in range(first, stop, limit)
    ]


def _matrices(*tensors):
    """(B, L, V) tensors as matrices of rows: one if the rows are evenly spaced, else B."""
    if all(t is None or t.stride(0) == t.stride(1) * t.shape[1] for t in tensors):
        return [tuple(None if t is None else t.flatten(0, 1) for t in tensors)]
    return list(zip(*([None] * len(tensors[0]) if t is None else t for t in tensors), strict=True))


def blocks(logits, dlogits, active):
    """Yield (slice of the rows, block of logits, block of dlogits, rows to mask or None).

    Rows of dlogits that are in no block are masked and zero afterwards. Pages that nobody has
    written are zero, and stay without memory. `active` is (N,) bool, or None: all rows are.
    """
    start = 0
    clears = dlogits is not None and (
        dlogits.data_ptr() == logits.data_ptr() or not is_unwritten(dlogits)
    )
    for x, dx in _matrices(logits, dlogits):
        rows = None if active is None else active[start : start + len(x)]
        done = 0
        for first, stop in _active_blocks(rows, *x.shape):
            if clears:
                dx[done:first].zero_()
            done = stop
            masked = None if rows is None else ~rows[first:stop]
            if rows is not None and masked.device.type == "cpu" and not masked.any():
                masked = None
            block = slice(start + first, start + stop)
            yield block, x[first:stop], None if dx is None else dx[first:stop], masked
        if clears:
            dx[done:].zero_()
        start += len(x)


def active_rows(tokens, positions):
    """(B * positions,) bool, or None: all rows are active."""
    active, shape = tokens.active, tokens.ids.shape
    if positions == shape[1]:
        if active is None or (active.device.type == "cpu" and bool(active.all())):
            return None
    active = torch.ones_like(tokens.ids, dtype=torch.bool) if active is None else active
    return _of_rows(active, positions)


def _of_rows(value, positions):
    """A value per token (B, T) as one per row (B * positions,); others as they are."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if positions != value.shape[1]:
        value = F.pad(value, (0, positions - value.shape[1]))
    return value.flatten()


def spread(bundle, positions):
    """A bundle with one value per row of logits in the place of each value per token."""
    return per_token(lambda value: _of_rows(value, positions), bundle)


def at(bundle, block):
    """Of a bundle from `spread` the rows of a block."""
    return per_token(lambda v: v[block] if isinstance(v, torch.Tensor) and v.dim() else v, bundle)


def output_rows(outputs, positions, active):
    """Memory (B * positions,) for every output (B, T): the output itself if it has room for all.

    If not all rows are active, values that `store` does not write are 0.
    """

    def memory(output):
        if output.shape[1] != positions:
            return output.new_zeros(len(output) * positions)
        rows = output.view(-1)
        return rows if active is None else rows.zero_()

    return [None if output is None else memory(output) for output in outputs]


def collect(outputs, rows, positions):
    """Copy rows, one value per row of logits, into the (B, T) outputs of their tokens."""
    for output, values in zip(outputs, rows, strict=False):
        if output is not None and output.shape[1] != positions:
            output.copy_(values.view(len(output), positions)[:, : output.shape[1]])


def store(outputs, block, values, masked):
    """Write values (n,), masked ones as 0, into the block of every output that is wanted."""
    for output, value in zip(outputs, values, strict=True):
        if output is not None:
            output[block] = value if masked is None else value.masked_fill(masked, 0.0)


class Scratch:
    """float32 blocks for intermediate results, allocated once and used again for every block."""

    def __init__(self, device):
        self.device = device
        self.buffers = {}

    def __call__(self, name, shape):
        size = math.prod(shape)
        needed = size + VECTOR * torch.get_num_threads()  # of them the last for `exp2_`
        if name not in self.buffers or len(self.buffers[name]) < needed:
            memory = torch.empty(needed, dtype=torch.float32, device=self.device)
            self.buffers[name] = memory
        return self.buffers[name][:size].view(shape)


def exp2_(z):
    """2^z in place, of a block of `Scratch`.

    On a CPU torch takes other instructions, which round otherwise, for what remains of a thread's
    share after whole vectors. Here shares are whole vectors, into the slack behind the block: a
    row's bits do not depend on where it lies.
    """
    size = z.numel()
    if z.device.type == "cpu":
        whole = VECTOR * min(torch.get_num_threads(), math.ceil(size / THREAD_ELEMENTS))
        size = math.ceil(size / whole) * whole
    z.as_strided((size,), (1,)).exp2_()
    return z


def targets(ids, V):
    """Ids (n,) as (n, 1) column indices that are always in range, and which of them were."""
    known = (ids >= 0) & (ids < V)
    return torch.where(known, ids, 0).long()[:, None], known


def sharpness(temperature, scales):
    """Factor of a (softcapped) logit: 1 / temperature, times logit_scale without a softcap."""
    return (scales.logit_scale if scales.logit_softcap is None else 1.0) / temperature


def softcapped(x, scales, out):
    """(softcap tanh(x logit_scale / softcap) in out, its derivative in x); (x, None) without."""
    softcap, logit_scale = scales.logit_softcap, scales.logit_scale
    if softcap is None:
        return x, None
    v = x.float() * (logit_scale / softcap)
    e = torch.exp(v.abs().mul_(-2.0))
    torch.mul(v.tanh_(), softcap, out=out)
    return out, e.mul(4.0 * logit_scale).div_(e.add_(1.0).square_())


def _column(factor):
    return factor[:, None] if isinstance(factor, torch.Tensor) and factor.dim() else factor


def centered(u, maximum, factor, out):
    """out = (u - maximum) factor log2(e) in float32; out may be u."""
    if u.dtype == torch.float32:
        torch.sub(u, maximum[:, None], out=out)
    else:
        out.copy_(u).sub_(maximum[:, None])
    return out.mul_(_column(factor * LOG2E))


def row_sums(x):
    """Sums (n,) of rows. Those of one row alone torch would add up in another order, by threads."""
    return x.sum(1) if len(x) > 1 else x.expand(2, -1).sum(1)[:1]


class RowStatistics(NamedTuple):
    exponentials: torch.Tensor  # (n, V), 2^((u - maximum) factor log2(e))
    maximum: torch.Tensor  # (n,)
    total: torch.Tensor  # (n,), their sum
    logp: torch.Tensor  # (n,)
    entropy: torch.Tensor | None  # (n,)


def softmax_statistics(u, target, known, factor, out, z_floored, product, shard=False):
    """Softmax statistics of capped rows u (n, V); out, of `Scratch`, holds the exponentials then.

    With z_floored and product (n, V), scratch which may be the same, the entropy too; z_floored
    then holds what exponentials are of, no lower than FLOOR, unless product is the same.

    Of a `shard` of the vocabulary, logp and entropy are those of `grpo_fused.parallel.merge`.
    """
    maximum = u.amax(1).float()
    if shard:  # other columns may be finite where all of these are -inf
        maximum.clamp_(min=START)
    chosen = (u.gather(1, target)[:, 0].float() - maximum) * factor
    chosen = chosen.masked_fill(~known, torch.nan)
    z = centered(u, maximum, factor, out)
    if z_floored is not None:
        torch.clamp(z, min=FLOOR, out=z_floored)
    exponentials = exp2_(z)
    total = row_sums(exponentials)
    entropy = None
    if z_floored is not None:
        entropy = row_sums(torch.mul(z_floored, exponentials, out=product))
        if not shard:
            entropy = (total.log() - entropy / total * LN2).clamp(min=0.0)
    if shard:
        return RowStatistics(exponentials, maximum, total, chosen, entropy)
    return RowStatistics(exponentials, maximum, total, chosen - total.log(), entropy)


def write_gradient(dlogits, masked, row, z_floored, target, g, h, slope, known=None):
    """Write the gradient of rows into dlogits (n, V), masked ones as 0.

        dx_j = (g (1[j = target] - p_j) - h p_j (log p_j + H)) du_j / dx_j

    Args:
        masked: (n,) bool, or None: none are.
        row: RowStatistics, whose exponentials are overwritten; entropy is read only with h.
        z_floored: (n, V) scratch with the exponents, overwritten; read only with h.
        g, h: (n,) dL/dlogp and dL/dH times the sharpness; h may be None.
        slope: (n, V) du / dx, or None for 1.
        known: (n,) bool, whether the target is one of the columns, or None: it is.
    """
    dx = dlogits if dlogits.dtype == torch.float32 else row.exponentials
    dtarget = g * -torch.expm1(row.logp)
    if h is None:
        torch.mul(row.exponentials, (-g / row.total)[:, None], out=dx)
    else:
        constant = (g + h * (row.entropy - row.total.log())) / row.total
        z_floored.mul_((-h / row.total * LN2)[:, None]).sub_(constant[:, None])
        torch.mul(row.exponentials, z_floored, out=dx)
        unlikely = row.logp <= FLOOR
        dtarget -= (h * row.logp.exp() * (row.logp + row.entropy)).masked_fill(unlikely, 0.0)
    dtarget = dtarget[:, None]
    if known is not None:
        dtarget = torch.where(known[:, None], dtarget, dx.gather(1, target))
    dx.scatter_(1, target, dtarget)
    if slope is not None:
        dx.mul_(slope)
    if masked is not None:
        dx.masked_fill_(masked[:, None], 0.0)
    if dx is not dlogits:
        dlogits.copy_(dx)
