"""The four launchers in plain torch: the default on CPU and wherever Triton is not.

Rows are taken in blocks of a few megabytes, so no temporary is as large as the logits; the
exponentials are computed once and turned into the gradient in place. Statistics are relative to
the row's maximum, as in the kernels, here in base e.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from grpo_fused.kernels.library import launcher
from grpo_fused.objectives import Objective, clamped_exp, k3

BLOCK_BYTES = 8 << 20  # float32 scratch of a block of rows; "Measured facts" in CONTRIBUTING.md
GAP_ELEMENTS = 1 << 14  # masked rows worth this little are computed with their neighbours
FLOOR = -1.0e4  # e^z is exactly 0 below this, and 0 * FLOOR is 0 where 0 * -inf would be NaN


def _active_blocks(active, V):
    """Cut rows (N,) bool into (start, stop) blocks: runs of active ones on CPU, all elsewhere.

    Only on CPU can active rows be listed without waiting for the device; elsewhere every row is
    computed and the masked ones are selected away.
    """
    limit = max(1, BLOCK_BYTES // (4 * V))
    if active.device.type == "cpu":
        rows = active.nonzero().flatten()
        cuts = (rows.diff() > 1 + GAP_ELEMENTS // V).nonzero().flatten() + 1
        runs = [(run[0].item(), run[-1].item() + 1) for run in rows.tensor_split(cuts) if len(run)]
    else:
        runs = [(0, len(active))]
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


def _blocks(logits, dlogits, active):
    """Yield (slice of the rows, block of logits, block of dlogits, rows to select away or None).

    Rows of dlogits that are in no block are masked and zeroed here.
    """
    start = 0
    for x, dx in _matrices(logits, dlogits):
        rows = active[start : start + len(x)]
        done = 0
        for first, stop in _active_blocks(rows, x.shape[1]):
            if dx is not None:
                dx[done:first].zero_()
            done = stop
            masked = ~rows[first:stop]
            if masked.device.type == "cpu" and not masked.any():
                masked = None
            block = slice(start + first, start + stop)
            yield block, x[first:stop], None if dx is None else dx[first:stop], masked
        if dx is not None:
            dx[done:].zero_()
        start += len(x)


def _rows(values, positions):
    """(B, T) values of tokens as one value per row of logits (B, positions, V)."""
    return F.pad(values, (0, positions - values.shape[1])).flatten()


def _tokens(outputs, rows, positions):
    """Write rows, one value per row of logits, into the (B, T) outputs of their tokens."""
    for output, values in zip(outputs, rows, strict=True):
        if output is not None:
            output.copy_(values.view(len(output), positions)[:, : output.shape[1]])


class _Scratch:
    """float32 blocks for intermediate results, allocated once and used again for every block."""

    def __init__(self, device):
        self.device = device
        self.buffers = {}

    def __call__(self, name, shape):
        if name not in self.buffers or len(self.buffers[name]) < shape[0]:
            self.buffers[name] = torch.empty(shape, dtype=torch.float32, device=self.device)
        return self.buffers[name][: shape[0]]


def _targets(ids, V):
    """Ids (n,) as (n, 1) column indices that are always in range, and which of them were."""
    known = (ids >= 0) & (ids < V)
    return torch.where(known, ids, 0).long()[:, None], known


def _centered(x, maximum, temperature, out):
    """out = (x - maximum) / temperature in float32; out may be x."""
    if x.dtype == torch.float32:
        torch.sub(x, maximum[:, None], out=out)
    else:
        out.copy_(x).sub_(maximum[:, None])
    if isinstance(temperature, torch.Tensor) or temperature != 1.0:
        out.div_(temperature)
    return out


class _Statistics(NamedTuple):
    exponentials: torch.Tensor  # (n, V), e^((x - maximum) / temperature)
    maximum: torch.Tensor  # (n,)
    total: torch.Tensor  # (n,), their sum
    logp: torch.Tensor  # (n,)
    entropy: torch.Tensor | None  # (n,)


def _statistics(x, target, known, temperature, out, scratch):
    """Softmax statistics of rows x (n, V); out (n, V) holds the exponentials afterwards.

    With scratch (n, V) the entropy too.
    """
    maximum = x.amax(1).float()
    z = _centered(x, maximum, temperature, out)
    chosen = z.gather(1, target)[:, 0].masked_fill(~known, torch.nan)
    if scratch is not None:
        scratch.copy_(z).clamp_(min=FLOOR)
    exponentials = z.exp_()
    total = exponentials.sum(1)
    entropy = None
    if scratch is not None:
        entropy = (total.log() - scratch.mul_(exponentials).sum(1) / total).clamp(min=0.0)
    return _Statistics(exponentials, maximum, total, chosen - total.log(), entropy)


def _write_gradient(gradient, dlogits, target, dtarget, masked):
    """Set the target's column, clear masked rows, and convert into dlogits if that is not it."""
    gradient.scatter_(1, target, dtarget[:, None])
    if masked is not None:
        gradient.masked_fill_(masked[:, None], 0.0)
    if gradient.data_ptr() != dlogits.data_ptr():
        dlogits.copy_(gradient)


def _store(outputs, block, values, masked):
    """Write values (n,), masked ones as 0, into the block of every output that is wanted."""
    for output, value in zip(outputs, values, strict=True):
        if output is not None:
            output[block] = value if masked is None else value.masked_fill(masked, 0.0)


@launcher
def fused_loss(
    logits,
    ids,
    weights,
    advantages,
    old_logps,
    ref_logps,
    temperature,
    beta,
    grad_scale,
    objective,
    knobs,
    terms,
    logps,
    entropies,
    maxima,
    totals,
    dlogps,
    dlogits,
):
    """As `grpo_fused.kernels.fused_loss.fused_loss`."""
    positions, V = logits.shape[1:]
    evaluate = Objective.by_name[objective](*knobs).evaluate
    ids, weights, advantages = (_rows(value, positions) for value in (ids, weights, advantages))
    old_logps, ref_logps = (
        None if value is None else _rows(value, positions) for value in (old_logps, ref_logps)
    )
    outputs = (*terms, logps, entropies, maxima, totals, dlogps)
    rows = [None if output is None else torch.zeros_like(weights) for output in outputs]
    buffers = _Scratch(logits.device)
    for block, x, dx, masked in _blocks(logits, dlogits, weights != 0):
        target, known = _targets(ids[block], V)
        out = dx if dx is not None and dx.dtype == torch.float32 else buffers("out", x.shape)
        scratch = None if entropies is None else buffers("scratch", x.shape)
        row = _statistics(x, target, known, temperature, out, scratch)
        weight, advantage = weights[block], advantages[block].float()
        log_ratio = torch.zeros_like(weight) if old_logps is None else row.logp - old_logps[block]
        ratio = clamped_exp(log_ratio)[0]
        loss, dlogp, clipped = evaluate(row.logp, log_ratio, advantage)
        kl = torch.zeros_like(weight)
        if ref_logps is not None:
            kl, dkl = k3(ref_logps[block] - row.logp)
            penalty = beta * kl
            if isinstance(beta, torch.Tensor):
                penalty = penalty.masked_fill(beta == 0.0, 0.0)
            elif beta == 0.0:
                penalty = torch.zeros_like(kl)  # an infinite KL without weight is no loss
            loss, dlogp = loss + penalty, dlogp + beta * dkl
        loss = (weight * loss).masked_fill(~known, torch.nan)
        dlogp = (weight * dlogp * grad_scale).masked_fill(loss.isnan(), torch.nan)
        values = (
            *(loss, torch.ones_like(weight), kl),
            torch.zeros_like(weight) if row.entropy is None else row.entropy,
            *((clipped < 0).float(), (clipped > 0).float(), ratio),
            *(row.logp, row.entropy, row.maximum, row.total, dlogp),
        )
        _store(rows, block, values, masked)
        if dx is not None:
            g = dlogp / temperature
            gradient = row.exponentials.mul_((-g / row.total)[:, None])
            _write_gradient(gradient, dx, target, g * -torch.expm1(row.logp), masked)
    _tokens(outputs, rows, positions)


@launcher
def logprob_fwd(logits, ids, active, temperature, logps, entropies, maxima, totals):
    """As `grpo_fused.kernels.logprob.logprob_fwd`."""
    positions, V = logits.shape[1:]
    active = _rows(torch.ones_like(ids) if active is None else active, positions) != 0
    ids = _rows(ids, positions)
    outputs = (logps, entropies, maxima, totals)
    rows = [None if output is None else logps.new_zeros(len(ids)) for output in outputs]
    buffers = _Scratch(logits.device)
    for block, x, _, masked in _blocks(logits, None, active):
        target, known = _targets(ids[block], V)
        scratch = None if entropies is None else buffers("scratch", x.shape)
        row = _statistics(x, target, known, temperature, buffers("out", x.shape), scratch)
        _store(rows, block, (row.logp, row.entropy, row.maximum, row.total), masked)
    _tokens(outputs, rows, positions)


@launcher
def logprob_bwd(
    logits, ids, active, temperature, logps, entropies, maxima, totals, dlogps, dentropies, dlogits
):
    """As `grpo_fused.kernels.logprob.logprob_bwd`."""
    positions, V = logits.shape[1:]
    active = _rows(torch.ones_like(ids) if active is None else active, positions) != 0
    ids, logps, maxima, totals, dlogps = (
        _rows(value, positions) for value in (ids, logps, maxima, totals, dlogps)
    )
    if dentropies is not None:
        entropies, dentropies = _rows(entropies, positions), _rows(dentropies, positions)
    buffers = _Scratch(logits.device)
    for block, x, dx, masked in _blocks(logits, dlogits, active):
        target, known = _targets(ids[block], V)
        out = dx if dx.dtype == torch.float32 else buffers("out", x.shape)
        logp, total = logps[block], totals[block]
        g = (dlogps[block] / temperature).masked_fill(~known, torch.nan)
        z = _centered(x, maxima[block], temperature, out)
        dtarget = g * -torch.expm1(logp)
        if dentropies is None:
            gradient = z.exp_().mul_((-g / total)[:, None])
        else:
            h, entropy = dentropies[block] / temperature, entropies[block]
            scratch = buffers("scratch", x.shape).copy_(z).clamp_(min=FLOOR)
            scratch.mul_((-h / total)[:, None]).sub_(
                ((g + h * (entropy - total.log())) / total)[:, None]
            )
            gradient = z.exp_().mul_(scratch)
            dtarget -= torch.where(logp > FLOOR, h * logp.exp() * (logp + entropy), 0.0)
        _write_gradient(gradient, dx, target, dtarget, masked)


@launcher
def rescale(dlogits, grad_output, grad_scale):
    """As `grpo_fused.kernels.rescale.rescale`; waits for nothing but a number on the CPU."""
    factor = grad_output / grad_scale
    if factor.device.type != "cpu" or factor != 1.0:
        dlogits.mul_(factor)
