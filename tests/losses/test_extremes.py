"""Values at the edge: fills of masked vocabularies, NaN, infinities, rows far apart in memory."""

import itertools

import pytest
import torch
from batches import assert_gradients_agree, make_batch, relative_error

import grpo_fused.validation as validation
import oracle
from grpo_fused import grpo_loss, selective_log_softmax

FILLS = (-1e4, -1e8, -1e9, -1e10, -1e20, -1e30, "least", "half of least")
FAST = {(torch.float32, fill) for fill in FILLS} | {(torch.bfloat16, x) for x in (-1e10, "least")}


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
        for case in itertools.product((torch.float32, torch.bfloat16), FILLS)
    ],
)
def test_masked_vocabularies(fill, dtype, implementation, device):
    """The rounding of a maximum of -1e10 is 512: a thread that saw nothing else summed 2^512."""
    batch = make_batch(V=3000, extra=0, mask=torch.ones(4, 6), dtype=dtype, device=device)
    least = torch.finfo(dtype).min
    fill = {"least": least, "half of least": least / 2}.get(fill, fill)
    filled = torch.zeros(3000, dtype=torch.bool, device=device)
    filled[:1500] = True
    filled[2000::3] = True
    filled = filled.expand_as(batch.logits).scatter(2, batch.ids[..., None], False)
    batch.logits[filled] = fill
    upstream = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    truth = oracle.selective_log_softmax(
        batch.logits, batch.ids, dlogps=upstream[0], dentropies=upstream[1]
    )
    leaf = batch.leaf()
    outputs = selective_log_softmax(
        leaf, batch.ids, compute_entropy=True, implementation=implementation
    )
    torch.autograd.backward(outputs, list(upstream.to(device)))
    assert relative_error(outputs[0], truth[0]) < 1e-6
    assert relative_error(outputs[1], truth[1]) < 2e-6
    tolerance = 2e-6 if dtype == torch.float32 else 6e-3
    assert_gradients_agree(leaf.grad, truth[2], batch.ids, tolerance)


@pytest.mark.parametrize("where", ["logits", "old_logps", "ref_logps", "advantages"])
def test_nan_is_not_swallowed(where, implementation, device):
    """In an active token it reaches the loss and its own row, and no other."""
    batch = make_batch(extra=0, mask=torch.ones(4, 6), per_token=True, device=device)
    getattr(batch, where)[2, 3] = torch.nan
    logits = batch.leaf()
    out = grpo_loss(
        logits,
        batch.ids,
        batch.mask,
        batch.advantages,
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        beta=0.1,
        implementation=implementation,
    )
    out.loss.backward()
    assert torch.isnan(out.loss)
    broken = torch.isnan(logits.grad).all(-1)
    assert broken[2, 3] and broken.sum() == 1
    assert torch.isfinite(logits.grad[~broken]).all()


def test_entropy_gradient_of_a_target_at_minus_infinity(implementation, device):
    logits = torch.randn(1, 2, 50, generator=torch.Generator().manual_seed(0)).to(device)
    ids = torch.tensor([[7, 8]], device=device)
    logits[0, 0, 7] = -torch.inf
    leaf = logits.clone().requires_grad_(True)
    _, entropies = selective_log_softmax(
        leaf, ids, compute_entropy=True, implementation=implementation
    )
    entropies.sum().backward()
    finite = torch.isfinite(logits)
    truth = logits.double().masked_fill(~finite, -1e4).requires_grad_(True)
    p = truth.log_softmax(-1)
    (-(p.exp() * p).sum()).backward()
    assert relative_error(leaf.grad, truth.grad) < 2e-6


def test_certain_rows_stay_within_bounds(implementation, device):
    """A logp of 0 or an entropy of 0 may not be a rounding on the wrong side of it."""
    logits = torch.zeros(1, 64, 301, device=device)
    ids = torch.arange(64, device=device)[None]
    logits.scatter_(2, ids[..., None], 30.0 + torch.rand(1, 64, 1, device=device) * 100)
    logps, entropies = selective_log_softmax(
        logits, ids, compute_entropy=True, implementation=implementation
    )
    assert (entropies >= 0).all() and (logps <= 0).all()
    assert (entropies < 1e-6).all()


def test_rows_more_than_two_to_the_31_elements_apart(implementation):
    """Row offsets are 64-bit; only the pages that are touched exist."""
    batch = make_batch(B=2, T=3, V=97, extra=0, mask=torch.ones(2, 3), dtype=torch.bfloat16)
    memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    logits = memory.as_strided((2, 3, 97), (2**31, 97, 1))
    logits.copy_(batch.logits)
    want, _ = selective_log_softmax(batch.logits, batch.ids, implementation=implementation)
    got, _ = selective_log_softmax(logits, batch.ids, implementation=implementation)
    assert relative_error(got, want) < 5e-7


def test_unknown_ids_make_their_gradient_nan(implementation, device, monkeypatch):
    monkeypatch.setattr(validation, "check_ids", lambda *args: None)
    if implementation == "torch" and device == "cuda":
        pytest.skip("checked with the kernels")
    logits = torch.randn(1, 2, 50, device=device, requires_grad=True)
    ids = torch.tensor([[7, 50]], device=device)
    logps, _ = selective_log_softmax(logits, ids, implementation=implementation)
    logps.sum().backward()
    assert torch.isnan(logps[0, 1]) and torch.isnan(logits.grad[0, 1]).all()
    assert torch.isfinite(logps[0, 0]) and torch.isfinite(logits.grad[0, 0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "gmpo"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_results_are_float32_whatever_the_default(packed, loss_type, dtype, implementation, device):
    batch = make_batch(B=2, T=5, V=17, extra=0, device=device)
    arguments = [batch.logits, batch.ids, batch.mask]
    options = {"compute_entropy": True, "loss_type": loss_type, "implementation": implementation}
    if packed:
        arguments = [t.flatten(0, 1) for t in arguments]
        options["cu_seqlens"] = torch.tensor([0, 5, 10], device=device)
    arguments.append(batch.advantages)
    want = grpo_loss(*arguments, **options)
    torch.set_default_dtype(dtype)
    try:
        got = grpo_loss(*arguments, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.loss.dtype == got.sums.dtype == torch.float32
    assert torch.equal(got.loss, want.loss) and torch.equal(got.logps, want.logps)


def test_a_scale_changed_before_backward_is_noticed(implementation, device):
    batch = make_batch(device=device)
    scale = torch.tensor(2.0, device=device)
    out = grpo_loss(
        batch.leaf(),
        batch.ids,
        batch.mask,
        batch.advantages,
        grad_scale=scale,
        implementation=implementation,
    )
    scale.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_advantages_that_want_a_gradient_without_grad_of_logits(implementation, device):
    batch = make_batch(device=device)
    batch.advantages.requires_grad_(True)
    arguments = (batch.logits, batch.ids, batch.mask, batch.advantages)
    out = grpo_loss(*arguments, implementation=implementation)
    assert not out.loss.requires_grad and torch.isfinite(out.loss)
