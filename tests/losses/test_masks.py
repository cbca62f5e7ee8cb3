"""Masks of every shape and dtype; what is masked is never read."""

import pytest
import torch
from batches import make_batch, relative_error

import oracle
from grpo_fused import LOSSES, grpo_loss, selective_log_softmax

B, T = 4, 6


def masks():
    prefix = torch.arange(T) < torch.tensor([6, 4, 1, 3])[:, None]
    holes = prefix.clone()
    holes[0, 1:4] = False
    suffix = prefix.flip(1)
    one_row_masked = prefix.clone()
    one_row_masked[2] = False
    one_token = torch.zeros(B, T, dtype=torch.bool)
    one_token[3, 2] = True
    return {
        "prefix": prefix,
        "holes": holes,
        "suffix": suffix,
        "one sequence masked": one_row_masked,
        "one token": one_token,
        "all active": torch.ones(B, T, dtype=torch.bool),
    }


def run(batch, mask, implementation, loss_type="dapo"):
    logits = batch.leaf()
    out = grpo_loss(
        logits,
        batch.ids,
        mask,
        batch.advantages,
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        beta=0.1,
        loss_type=loss_type,
        compute_entropy=True,
        implementation=implementation,
    )
    out.loss.backward()
    return out, logits.grad


@pytest.mark.parametrize("shape", masks())
@pytest.mark.parametrize("loss_type", LOSSES)
def test_shapes(shape, loss_type, implementation, device):
    batch = make_batch(B, T, mask=masks()[shape].long(), device=device)
    out, grad = run(batch, batch.mask, implementation, loss_type)
    truth = oracle.grpo_loss(
        batch.logits,
        batch.ids,
        batch.mask,
        batch.advantages,
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        beta=0.1,
        loss_type=loss_type,
    )
    terms = oracle.token_weights(batch.mask, LOSSES[loss_type].normalizer).sum().item()
    assert out.loss.item() == pytest.approx(truth.loss, rel=1e-5, abs=2e-7 * terms)
    assert relative_error(grad, truth.dlogits) < 2e-6
    hidden = batch.mask == 0
    assert (grad[:, :T][hidden] == 0).all() and (grad[:, T:] == 0).all()
    assert (out.logps[hidden] == 0).all() and (out.entropies[hidden] == 0).all()


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16]
)
def test_dtypes(dtype, implementation, device):
    batch = make_batch(B, T, device=device)
    want, want_grad = run(batch, batch.mask, implementation)
    values = batch.mask.to(dtype) * (1 if dtype == torch.bool else 3)  # nonzero is active, not 1
    out, grad = run(batch, values.to(dtype), implementation)
    assert torch.equal(out.loss, want.loss) and torch.equal(grad, want_grad)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_none_is_all_active(loss_type, implementation, device):
    batch = make_batch(B, T, mask=torch.ones(B, T), device=device)
    want, want_grad = run(batch, batch.mask, implementation, loss_type)
    out, grad = run(batch, None, implementation, loss_type)
    assert torch.equal(out.loss, want.loss) and torch.equal(grad, want_grad)
    assert torch.equal(out.sums, want.sums) and out.metrics == want.metrics


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_garbage_under_the_mask_changes_nothing(garbage, implementation, device):
    """Not one bit: in logits, ids, advantages, old and reference log-probabilities."""
    mask = masks()["holes"].long()
    batch = make_batch(B, T, mask=mask, per_token=True, device=device)
    want, want_grad = run(batch, batch.mask, implementation)
    hidden = batch.mask == 0
    batch.logits[:, :T][hidden] = garbage
    batch.logits[:, T:] = garbage
    for tensor in (batch.advantages, batch.old_logps, batch.ref_logps):
        tensor[hidden] = garbage
    batch.ids[hidden] = 2**40
    out, grad = run(batch, batch.mask, implementation)
    assert torch.equal(out.loss, want.loss) and torch.equal(grad, want_grad)
    assert torch.equal(out.sums, want.sums)
    logps, entropies = selective_log_softmax(
        batch.logits, batch.ids, batch.mask, compute_entropy=True, implementation=implementation
    )
    assert (logps[hidden] == 0).all() and (entropies[hidden] == 0).all()
    assert torch.isfinite(logps).all() and torch.isfinite(entropies).all()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_nothing_active_is_a_differentiable_zero(loss_type, implementation, device):
    batch = make_batch(B, T, mask=torch.zeros(B, T), device=device)
    out, grad = run(batch, batch.mask, implementation, loss_type)
    assert out.loss.item() == 0.0 and out.loss.requires_grad
    assert (grad == 0).all()
    of_sequences = LOSSES[loss_type].level == "sequence" and loss_type != "gmpo"
    for name, value in out.metrics.items():  # a sequence without tokens has ratio 1
        assert value.item() == float(of_sequences and name.startswith("ratio/")), name


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("sizes", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty_batches(sizes, loss_type, implementation, device):
    b, t = sizes
    logits = torch.randn(b, t, 11, device=device, requires_grad=True)
    ids = torch.zeros(b, t, dtype=torch.long, device=device)
    out = grpo_loss(
        logits,
        ids,
        None,
        torch.zeros(b, device=device),
        loss_type=loss_type,
        implementation=implementation,
    )
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert all(value.isfinite() for value in out.metrics.values())
    assert logits.grad.shape == logits.shape
    assert out.logps.shape == (b, t)
    logps, _ = selective_log_softmax(logits, ids, implementation=implementation)
    logps.sum().backward()
    assert logps.shape == (b, t)


@pytest.mark.parametrize("ends", [[0], [0, 0, 0]], ids=str)
def test_empty_packed_batches(ends, implementation, device):
    """No sequence at all, and sequences without a token."""
    ids = torch.zeros(0, dtype=torch.long, device=device)
    for loss_type in ("grpo", "gspo", "gmpo"):
        logits = torch.zeros(0, 11, device=device, requires_grad=True)
        out = grpo_loss(
            *(logits, ids, ids, torch.zeros(len(ends) - 1, device=device)),
            cu_seqlens=torch.tensor(ends, device=device),
            loss_type=loss_type,
            implementation=implementation,
        )
        out.loss.backward()
        assert out.loss.item() == 0.0 and out.logps.shape == (0,)
        assert all(value.isfinite() for value in out.metrics.values())


def test_last_of_t_plus_one_positions_alone(implementation, device):
    """T = 0 with one position more than tokens: nothing to learn, a gradient of zeros."""
    logits = torch.full((2, 1, 11), torch.nan, device=device, requires_grad=True)
    ids = torch.zeros(2, 0, dtype=torch.long, device=device)
    out = grpo_loss(logits, ids, None, torch.zeros(2, device=device), implementation=implementation)
    out.loss.backward()
    assert out.loss.item() == 0.0 and (logits.grad == 0).all()
