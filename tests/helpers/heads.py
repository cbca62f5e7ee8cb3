"""Batches of hidden states and heads, and what the functions over logits make of them."""

from dataclasses import dataclass

import torch
from batches import Batch, make_batch, relative_error

import oracle
from grpo_fused import linear_grpo_loss, linear_selective_log_softmax


@dataclass
class HeadBatch:
    """Arguments of linear_grpo_loss; hidden states are NaN wherever the mask is 0."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    batch: Batch  # logits: those of the head, NaN under the mask

    def leaves(self, wanted="hwb"):
        """(hidden, weight, bias) as leaves; those of `wanted` require a gradient."""
        tensors = (self.hidden, self.weight, self.bias)
        return [
            None if t is None else t.detach().clone().requires_grad_(name in wanted)
            for name, t in zip("hwb", tensors, strict=True)
        ]


def make_head_batch(
    B=4, T=6, V=53, H=16, *, extra=1, bias=True, dtype=torch.float32, device="cpu", seed=0, **more
):
    """A batch whose logits are hidden weight^T + bias, as peaked as those of `make_batch`."""
    batch = make_batch(B, T, V, extra=extra, seed=seed, **more)
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, weight = normal(B, T + extra, H), 2.5 * H**-0.5 * normal(V, H)
    offset = 0.5 * normal(V) if bias else None
    logits = hidden.double() @ weight.double().T
    logits = logits if offset is None else logits + offset.double()
    chosen = logits[:, :T].log_softmax(-1).gather(-1, batch.ids.clamp(min=0)[..., None])[..., 0]
    batch.old_logps = (chosen + 0.3 * torch.randn(B, T, generator=generator)).float()
    batch.ref_logps = (chosen + 0.4 * torch.randn(B, T, generator=generator)).float()
    masked = batch.mask == 0
    for tensor in (hidden[:, :T], logits[:, :T], batch.old_logps, batch.ref_logps):
        tensor[masked] = torch.nan
    hidden[:, T:] = logits[:, T:] = torch.nan
    batch.logits = logits
    moved = {name: tensor.to(device) for name, tensor in vars(batch).items() if name != "logits"}
    offset = None if offset is None else offset.to(device)
    batch = Batch(logits=logits, **moved)
    return HeadBatch(hidden.to(device), weight.to(device), offset, batch)


def chunk_bytes(rows, V=53, itemsize=4):
    """A budget that holds so many rows of logits."""
    return rows * -(-V // 8) * 8 * itemsize


def exact(head, **options):
    """(OracleResult, float64 gradients of hidden, weight and bias) by the papers' formulas."""
    b = head.batch
    cpu = [t.cpu() for t in (b.ids, b.mask, b.advantages)]
    options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if objective := options.pop("objective", None):
        options |= {"objective": type(objective).__name__, "knobs": vars(objective)}
    truth = oracle.grpo_loss(b.logits.double(), *cpu, **options)
    return truth, head_gradients(head, truth.dlogits)


def head_gradients(head, dlogits):
    """Gradients of hidden, weight and bias from those of the logits, in float64."""
    hidden = head.hidden.double().cpu().nan_to_num()
    weight = head.weight.double().cpu()
    rows, states = dlogits.flatten(0, 1), hidden.flatten(0, 1)
    return dlogits @ weight, rows.T @ states, rows.sum(0)


def loss_of(head, implementation, leaves=None, **options):
    """(LossOutput, leaves) of linear_grpo_loss after backward."""
    b = head.batch
    hidden, weight, bias = leaves = leaves or head.leaves()
    out = linear_grpo_loss(
        *(hidden, weight, b.ids, b.mask, b.advantages),
        bias=bias,
        compute_entropy=True,
        implementation=implementation,
        **options,
    )
    return out, leaves


OPTIONS = {"chunk_bytes": chunk_bytes(7)}


def gradients(head, function, leaves=None, upstream=1.0):
    """Gradients of the leaves of a function (hidden, weight, bias) -> loss."""
    leaves = leaves or head.leaves()
    (function(*leaves) * upstream).backward()
    return [leaf.grad for leaf in leaves]


def loss(head, hidden, weight, bias, **options):
    b = head.batch
    return linear_grpo_loss(
        *(hidden, weight, b.ids, b.mask, b.advantages),
        bias=bias,
        old_logps=b.old_logps,
        **OPTIONS | options,
    ).loss


def scores(head, hidden, weight, bias, **options):
    """A loss of its own on log-probabilities and entropies."""
    b = head.batch
    logps, entropies = linear_selective_log_softmax(
        *(hidden, weight, b.ids, b.mask), bias=bias, compute_entropy=True, **OPTIONS | options
    )
    return (logps * b.advantages[:, None] - 0.1 * entropies).sum()


def assert_equal(got, want, tolerance=1e-6):
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < tolerance
