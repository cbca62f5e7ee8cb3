"""Run one LM head through TRL's and Liger's chunked functions, the oracle and ours."""

import functools
from typing import NamedTuple

import pytest
import torch
from batches import Batch, relative_error
from peers import (
    EPSILON_HIGH,
    EPSILON_LOW,
    OBJECTIVES,
    drifted_batch,
    harmless,
    require,
)

from grpo_fused import Clip, linear_grpo_loss
from oracle import grpo_loss as oracle_loss

ROW_BYTES = 160  # one row of 37 float32 logits, padded to 40 columns
CHUNK_BYTES = (None, 7 * ROW_BYTES, 4 * ROW_BYTES, 1)  # all rows, a sequence, part of one, a row


class Case(NamedTuple):
    """A batch with hidden states and an LM head that give its logits; NaN where it is masked."""

    batch: Batch
    hidden: torch.Tensor  # (B, T, H)
    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)

    def leaves(self, fill=torch.nan):
        """Copy hidden states (`fill` under the mask), weight and bias to leaves."""
        hidden = self.hidden.masked_fill((self.batch.mask == 0)[..., None], fill)
        parameters = (None if t is None else t.clone() for t in (hidden, self.weight, self.bias))
        return [None if t is None else t.requires_grad_() for t in parameters]


class Found(NamedTuple):
    """Value, gradients of hidden states, weight and bias, and metrics."""

    loss: torch.Tensor
    gradients: dict
    metrics: dict


def with_head(batch, H=64, *, bias=True, dtype=torch.float32):
    """Make a head and hidden states whose logits are those of the batch."""
    generator = torch.Generator().manual_seed(H)
    B, T = batch.ids.shape
    V, device = batch.logits.shape[-1], batch.logits.device
    weight = torch.randn(V, H, generator=generator) / H**0.5
    bias = torch.randn(V, generator=generator) if bias else None
    wanted = batch.logits[:, :T].float().cpu().nan_to_num(0.0) - (0.0 if bias is None else bias)
    hidden = wanted @ torch.linalg.pinv(weight).T
    return Case(
        batch, *(None if t is None else t.to(device, dtype) for t in (hidden, weight, bias))
    )


def drifted_case(seed=0, *, bias=True, device="cpu"):
    return with_head(drifted_batch(seed, device=device), bias=bias)


def sampled_case(B, T, V, *, H, dtype, device="cpu"):
    """Make a case without mask and bias, its ids sampled from the head, in any dtype."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(V, H, generator=generator) / H**0.5).to(dtype)
    hidden = (2.5 * torch.randn(B, T, H, generator=generator)).to(dtype)
    logp = (hidden.double() @ weight.double().T).log_softmax(-1)
    ids = torch.multinomial(logp.exp().flatten(0, 1), 1, generator=generator).view(B, T)
    chosen = logp.gather(-1, ids[..., None])[..., 0].float()
    old_logps = chosen + 0.3 * torch.randn(B, T, generator=generator)
    advantages = torch.randn(B, generator=generator)
    tensors = (logp, ids, torch.ones_like(ids), advantages, old_logps, chosen, old_logps)
    batch = Batch(*(tensor.to(device) for tensor in tensors))
    return Case(batch, hidden.to(device), weight.to(device), None)


def gradients_of(hidden, weight, bias=None):
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    return {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}


def linear_loss(
    case,
    implementation="auto",
    *,
    loss_type,
    level="token",
    delta=None,
    upstream=1.0,
    create_graph=False,
    **options,
):
    """Run linear_grpo_loss and its backward with an upstream gradient."""
    batch, leaves = case.batch, case.leaves()
    out = linear_grpo_loss(
        *leaves[:2],
        batch.ids,
        batch.mask,
        batch.advantages,
        bias=leaves[2],
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        loss_type=loss_type,
        objective=OBJECTIVES.get(loss_type, Clip(EPSILON_LOW, 0.28, delta)),
        importance_sampling_level=level,
        implementation=implementation,
        **options,
    )
    (upstream * out.loss).backward(create_graph=create_graph)
    return Found(out.loss.detach(), gradients_of(*leaves), out.metrics)


@functools.cache
def trl_function():
    require("trl", "1.16")
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction


def trl_logps(
    hidden,
    weight,
    ids,
    mask,
    *,
    bias=None,
    chunk_size=1 << 15,
    temperature=1.0,
    logit_softcap=None,
    logit_scale=1.0,
    compute_entropy=True,
):
    """Run TRL's chunked head over all positions, `chunk_size` columns per tile: (logps, entropies).

    As in TRL without Triton, masked labels are 0, and so are the results there.
    """
    rest = (temperature, chunk_size, logit_softcap, logit_scale)
    outputs = ("entropy",) if compute_entropy else ()
    rows, labels = hidden.flatten(0, 1), ids.masked_fill(mask == 0, 0).flatten()
    results = trl_function().apply(rows, weight, bias, labels, *rest, outputs)[:2]
    return [None if t is None else t.view(mask.shape).masked_fill(mask == 0, 0) for t in results]


def exact_logps(
    hidden,
    weight,
    ids,
    mask,
    *,
    bias=None,
    temperature=1.0,
    logit_softcap=None,
    logit_scale=1.0,
    logits_dtype=torch.float64,
):
    """Compute (logps, entropies) from float64 logits, 0 where masked; see exact_linear_loss."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    # Round the value, not the gradient.
    x = (logits + (logits.to(logits_dtype).double() - logits).detach()) * logit_scale
    if logit_softcap is not None:
        x = logit_softcap * torch.tanh(x / logit_softcap)
    logp = (x / temperature).log_softmax(-1)
    chosen = logp.gather(-1, ids.masked_fill(mask == 0, 0)[..., None])[..., 0]
    entropies = -(logp.exp() * logp).sum(-1)
    return [t.masked_fill(mask == 0, 0) for t in (chosen, entropies)]


@functools.cache
def liger_module():
    require("liger-kernel", "0.8.5")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss


def liger_linear_loss(
    case,
    *,
    loss_type,
    level="token",
    beta=0.0,
    importance_sampling_ratio=None,
    num_items_in_batch=None,
    fill=0.0,
    upstream=1.0,
    create_graph=False,
    **options,
):
    """Run Liger's LigerFusedLinearGRPOLoss, `chunk_size` sequences at a time."""
    batch, leaves = case.batch, case.leaves(fill)
    ratio = importance_sampling_ratio
    module = liger_module()(
        beta=beta,
        compiled=False,
        use_ref_model=beta != 0,
        epsilon_low=EPSILON_LOW,
        epsilon_high=EPSILON_HIGH.get(loss_type, 0.28),
        loss_type=loss_type,
        importance_sampling_level=level,
        **{"max_completion_length": batch.ids.shape[1]} | options,
    )
    loss, metrics = module(
        *leaves[:2],
        batch.ids.masked_fill(batch.mask == 0, 0),
        batch.mask,
        harmless(batch, batch.advantages),
        bias=leaves[2],
        ref_per_token_logps=harmless(batch, batch.ref_logps),
        old_per_token_logps=None if batch.old_logps is None else harmless(batch, batch.old_logps),
        vllm_is_ratio=None if ratio is None else harmless(batch, ratio, fill=1.0),
        num_items_in_batch=num_items_in_batch,
    )
    (upstream * loss).backward(create_graph=create_graph)
    names = ("kl", "clip_ratio/region_mean")[-len(metrics) :]
    return Found(loss.detach(), gradients_of(*leaves), dict(zip(names, metrics, strict=True)))


def exact_linear_loss(
    case, *, loss_type, level="token", delta=None, logits_dtype=torch.float64, **options
):
    """Run the oracle on float64 logits of the same hidden states and head.

    Implementations in bfloat16 round the logits first; `logits_dtype` rounds those of the oracle.
    """
    batch = case.batch
    hidden, weight, bias = (None if t is None else t.detach().double().cpu() for t in case[1:])
    hidden = hidden.masked_fill((batch.mask == 0).cpu()[..., None], 0.0)
    logits = (hidden @ weight.T + (0.0 if bias is None else bias)).to(logits_dtype)
    parameters = vars(OBJECTIVES.get(loss_type, Clip(EPSILON_LOW, 0.28, delta)))
    tensors = (batch.ids, batch.mask, batch.advantages, batch.old_logps, batch.ref_logps)
    ids, mask, advantages, old_logps, ref_logps = (None if t is None else t.cpu() for t in tensors)
    result = oracle_loss(
        *(logits, ids, mask, advantages),
        old_logps=old_logps,
        ref_logps=ref_logps,
        loss_type=loss_type,
        knobs=parameters,
        importance_sampling_level=level,
        **options,
    )
    dlogits = result.dlogits
    gradients = {
        "hidden": dlogits @ weight,
        "weight": dlogits.flatten(0, 1).T @ hidden.flatten(0, 1),
        "bias": dlogits.sum((0, 1)),
    }
    if bias is None:
        del gradients["bias"]
    return Found(torch.tensor(result.loss), gradients, result.metrics)


def label_rows(ids, V):
    """Mark the rows of the head that are the label of an active token, (V,) bool."""
    labels = torch.zeros(V, dtype=torch.bool)
    labels[ids[ids >= 0].cpu()] = True
    return labels


def errors(got, want, ids):
    """Compute relative errors of gradients by name, rows of labels and other rows apart."""
    found = {}
    for name in want:
        g, w = got[name].cpu(), want[name].cpu()
        if name == "hidden":
            found[name] = relative_error(g, w)
            continue
        labels = label_rows(ids, len(w))
        found[f"{name}, labels"] = relative_error(g[labels], w[labels])
        found[f"{name}, others"] = relative_error(g[~labels], w[~labels])
    return found


def assert_parity(ours, peer, ids, *, value=2e-6, gradient=5e-6, metrics=1e-5):
    """Compare value, gradients and the metrics that both report.

    The loss is a sum of terms of both signs: its error is measured against their size.
    """
    size = peer.loss.abs() + sum(g.norm() for g in peer.gradients.values())
    error = ((ours.loss.double().cpu() - peer.loss.double().cpu()).abs() / size).item()
    assert error < value, f"value: error {error:.2e} of its terms"
    for name, error in errors(ours.gradients, peer.gradients, ids).items():
        assert error < gradient, f"gradient of {name}: relative error {error:.2e}"
    for name in peer.metrics.keys() & ours.metrics.keys():
        wanted = pytest.approx(float(peer.metrics[name]), rel=metrics, abs=1e-7)
        assert ours.metrics[name].item() == wanted, name
