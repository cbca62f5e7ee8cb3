"""Bit for bit: the same again, and the same whatever batch a row came in."""

import pytest
import torch
from batches import make_batch

from grpo_fused import grpo_loss, selective_log_softmax


def results(batch, rows, implementation, positions=slice(None)):
    logits = batch.logits[rows][:, positions].clone().requires_grad_(True)
    out = grpo_loss(
        logits,
        batch.ids[rows][:, positions],
        batch.mask[rows][:, positions],
        batch.advantages[rows],
        old_logps=batch.old_logps[rows][:, positions],
        ref_logps=batch.ref_logps[rows][:, positions],
        beta=0.1,
        normalizer="token-sum",
        compute_entropy=True,
        implementation=implementation,
    )
    out.loss.backward()
    return logits.grad, out.logps, out.entropies


@pytest.mark.parametrize("V", [97, 1536, 1538])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_repeatable(V, dtype, implementation, device):
    batch = make_batch(V=V, dtype=dtype, device=device)
    first = results(batch, slice(None), implementation)
    second = results(batch, slice(None), implementation)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("V", [97, 1536, 1538])
@pytest.mark.parametrize("rows", [[2], [3, 1], [2, 2, 0, 3, 1, 2]], ids=str)
def test_a_row_does_not_know_its_batch(V, rows, implementation, device):
    batch = make_batch(V=V, device=device)
    alone = results(batch, slice(None), implementation)
    among = results(batch, rows, implementation)
    for a, b in zip(alone, among, strict=True):
        assert torch.equal(a[rows], b)


@pytest.fixture
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("V", [1999, 33_001])
def test_threads_that_share_a_row(V, three_threads):
    """Where torch cuts the work is its own affair: of one row, of a few, of many."""
    batch = make_batch(B=1, T=23, V=V)

    whole = results(batch, slice(None), "torch")
    cuts = [*zip(range(8), range(1, 9), strict=True), (0, 2), (1, 4), (2, 6), (5, 12), (3, 20)]
    for rows in (slice(*cut) for cut in cuts):
        few = results(batch, slice(None), "torch", rows)
        assert all(torch.equal(a[:, rows], b) for a, b in zip(whole, few, strict=True))


def test_more_rows_than_programs(implementation, device):
    """A persistent grid shares the rows; how many programs there are must not show."""
    batch = make_batch(B=3, T=50, V=33, device=device)
    whole = results(batch, slice(None), implementation)
    for row in range(3):
        single = results(batch, [row], implementation)
        assert all(torch.equal(a[row], b[0]) for a, b in zip(whole, single, strict=True))


def test_permuted_sequences_permute_results(implementation, device):
    batch = make_batch(device=device)
    order = [2, 0, 3, 1]
    whole = results(batch, slice(None), implementation)
    for a, b in zip(whole, results(batch, order, implementation), strict=True):
        assert torch.equal(a[order], b)


def test_loss_and_log_probabilities_are_one_arithmetic(implementation, device):
    """Old log-probabilities come from one function, new ones from the other: ratio exactly 1."""
    batch = make_batch(V=1536, device=device)
    logps, entropies = selective_log_softmax(
        batch.logits, batch.ids, batch.mask, compute_entropy=True, implementation=implementation
    )
    _, loss_logps, loss_entropies = results(batch, slice(None), implementation)
    assert torch.equal(logps, loss_logps) and torch.equal(entropies, loss_entropies)


def test_statistics_do_not_depend_on_where_the_gradient_goes(implementation, device):
    """Padded rows of an odd vocabulary are aligned; their fresh gradient is not."""
    batch = make_batch(V=1537, device=device)
    padded = torch.zeros(4, 7, 1544, device=device)
    padded[..., :1537] = batch.logits
    padded.requires_grad_(True)
    results = []
    for inplace in (None, False, True):
        out = grpo_loss(
            (padded.detach() if inplace is None else padded * 1)[..., :1537],
            batch.ids,
            batch.mask,
            batch.advantages,
            inplace=bool(inplace),
            implementation=implementation,
        )
        grad = None if inplace is None else torch.autograd.grad(out.loss, padded)[0]
        results.append((out.logps, grad))
    (without, _), (fresh, fresh_grad), (inplace, inplace_grad) = results
    assert torch.equal(without, fresh) and torch.equal(without, inplace)
    assert torch.equal(fresh_grad, inplace_grad)
