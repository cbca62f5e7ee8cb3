"""Which rows of the logits are read and written, and where: what mutants found."""

import pytest
import torch
from batches import make_batch, relative_error

import grpo_fused.torch_backend.rows as rows
from grpo_fused import Clip, grpo_loss, selective_log_softmax
from grpo_fused.bundles import Formula, Outputs, Scales, Tokens
from grpo_fused.ops import BACKENDS


def random_logits(*shape, device):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("length", [5, 8])
def test_a_longer_run_after_a_short_one(length, implementation, device, monkeypatch):
    """Scratch of the first block does not do for the second."""
    monkeypatch.setattr(rows, "GAP_ELEMENTS", 0)
    mask = torch.tensor([[1] * 4 + [0] * 3 + [1] * length], device=device)
    logits, ids = random_logits(1, 7 + length, 40, device=device), torch.ones_like(mask)
    options = {"compute_entropy": True, "implementation": implementation}
    logps, entropies = selective_log_softmax(logits, ids, mask, **options)
    want = logits.double().log_softmax(-1)
    assert relative_error(logps, want[..., 1] * mask) < 1e-6
    assert relative_error(entropies, -(want.exp() * want).sum(-1) * mask) < 1e-6


@pytest.mark.parametrize("positions", [slice(0, 4), slice(2, 6)], ids=["first", "middle"])
def test_in_place_of_some_positions(positions, implementation, device):
    """The gradient lands in the logits that were given, not in a copy; V = L fools no one."""
    room = random_logits(2, 7, 7, device=device).requires_grad_(True)
    ids = torch.tensor([[0, 3, 6, 2], [1, 1, 5, 0]], device=device)
    advantages = torch.tensor([1.0, -2.0], device=device)
    inner, gradients = room * 1.0, []
    for logits, inplace in ((room[:, positions], False), (inner[:, positions], True)):
        room.grad = None
        grpo_loss(
            *(logits, ids, None, advantages), inplace=inplace, implementation=implementation
        ).loss.backward()
        gradients.append(room.grad)
    assert torch.equal(*gradients) and gradients[0].any()
    assert torch.equal(inner.detach()[:, positions], gradients[0][:, positions])


def test_the_first_ids_outside_of_the_vocabulary(implementation, device, monkeypatch):
    """They are refused where looking at them is free, and NaN elsewhere."""
    monkeypatch.setattr("grpo_fused.validation.check_ids", lambda *args: None)
    logits = random_logits(1, 5, 11, device=device).requires_grad_()
    ids = torch.tensor([[-1, 0, -1, 10, 11]], device=device)
    logps, _ = selective_log_softmax(logits, ids, implementation=implementation)
    logps.sum().backward()
    unknown = [[True, False, True, False, True]]
    assert logps.isnan().tolist() == logits.grad.isnan().all(2).tolist() == unknown
    assert logits.grad.isnan().any(2).tolist() == unknown  # no row of another's


def test_masked_tokens_report_zeros(implementation, device):
    """Every output of a token; the memory held something else."""
    batch = make_batch(device=device)
    active, ones = batch.mask != 0, torch.ones(4, 6, device=device)
    tokens = Tokens(batch.ids, active, 1.0, ones, batch.old_logps, batch.ref_logps, 1.0, 0.1)
    outputs = Outputs(*(torch.full((4, 6), 7.0, device=device) for _ in range(6)))
    formula = Formula(Clip().name(), Clip().params(), "k3", False, 1.0)
    BACKENDS[implementation].fused_loss(batch.logits, tokens, Scales(), formula, outputs)
    for name, values in outputs._asdict().items():
        assert values is None or (not values[~active].any() and not (values == 7.0).any()), name


def test_far_beyond_the_softcap(implementation, device):
    """The cap is flat there: no gradient, and no infinity over another."""
    logits = torch.tensor([[[1e4, -1e4, 1.0, 0.5]]], device=device, requires_grad=True)
    ids = torch.full((1, 1), 2, device=device)
    options = {"logit_softcap": 8.0, "compute_entropy": True, "implementation": implementation}
    sum(selective_log_softmax(logits, ids, **options)).backward()
    leaf = logits.detach().double().requires_grad_(True)
    logp = (8 * torch.tanh(leaf / 8)).log_softmax(-1)
    (logp[..., 2] - (logp.exp() * logp).sum(-1)).backward()
    assert relative_error(logits.grad, leaf.grad) < 1e-5
