"""The clipped loss of a value model against a loop over tokens in float64."""

import math

import pytest
import torch
from batches import relative_error
from packing import cu_seqlens, pack, unpack
from ppo_oracle import LENGTHS, ppo_batch, value_loss_equation, weight_equation
from torch.autograd import gradcheck

from grpo_fused import token_weights, value_loss, value_metrics
from grpo_fused.losses.weights import RULES

NAN = math.nan
DIVISORS = {
    "num_items_in_batch": 71.0,
    "num_sequences_in_batch": 9,
    "max_completion_length": torch.tensor(50.0),
}


@pytest.mark.parametrize("clips", [False, True], ids=["free", "clipped"])
@pytest.mark.parametrize("divisors", [{}, DIVISORS], ids=["local", "global"])
@pytest.mark.parametrize("normalizer", RULES)
def test_value_loss(normalizer, divisors, clips):
    mask, _, values, old_values, returns, *_ = ppo_batch()
    old_values = old_values if clips else None
    weights = weight_equation(mask, normalizer, *map(float, divisors.values()))
    losses, gradients, metrics = value_loss_equation(
        values, returns, mask, old_values, 0.25, weights
    )
    options = {"cliprange": 0.25, "normalizer": normalizer, **divisors}
    leaf = values.clone().requires_grad_()
    got = value_loss(leaf, returns, mask, old_values=old_values, **options)
    got.loss.backward()
    assert got.loss.item() == pytest.approx((losses * weights).sum().item(), rel=3e-7)
    assert relative_error(leaf.grad, gradients) < 3e-7 and (leaf.grad[~mask] == 0).all()
    assert got.metrics == value_metrics(got.sums) and metrics.keys() == got.metrics.keys()
    for name, value in got.metrics.items():
        assert value.item() == pytest.approx(metrics[name], rel=1e-6), name
    assert not got.sums.requires_grad and metrics["value/clip_ratio"] == 0 or clips
    assert not clips or 0.1 < metrics["value/clip_ratio"] < 0.9

    packed = pack(LENGTHS, values, returns, mask, old_values)
    length = {} if divisors else {"max_completion_length": 37}
    packed, packed_old = [packed[0].requires_grad_(), *packed[1:3]], packed[3]
    ends = cu_seqlens(LENGTHS, "cpu")
    again = value_loss(*packed, old_values=packed_old, cu_seqlens=ends, **options | length)
    again.loss.backward()
    assert again.loss.item() == pytest.approx(got.loss.item(), rel=3e-7)
    assert relative_error(unpack(LENGTHS, 37, packed[0].grad), leaf.grad) < 3e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_value_losses_per_token(dtype):
    mask, _, *tensors = ppo_batch()
    values, old_values, returns = (tensor.to(dtype) for tensor in tensors[:3])
    ones = torch.ones(mask.shape)
    want, gradients, _ = value_loss_equation(values, returns, mask, old_values, 0.2, ones)
    leaf = values.clone().requires_grad_()
    options = {"old_values": old_values, "reduction": "none"}
    got = value_loss(leaf, returns, mask.float(), **options)
    assert got.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(got.loss, want) < 3e-7 and (got.loss[~mask] == 0).all()
    got.loss.sum().backward()
    assert relative_error(leaf.grad, gradients) < (4e-3 if dtype == torch.bfloat16 else 3e-7)
    packed = pack(LENGTHS, values, returns, mask)
    options["old_values"] = pack(LENGTHS, old_values)[0]
    packed = value_loss(*packed, **options, cu_seqlens=cu_seqlens(LENGTHS, "cpu"))
    assert torch.equal(unpack(LENGTHS, 37, packed.loss), got.loss)


def test_value_loss_agrees_with_finite_differences():
    mask, _, values, old_values, returns, *_ = ppo_batch()
    values, old_values, returns = (
        x.nan_to_num(9.0).double() for x in (values, old_values, returns)
    )

    def loss(values):
        return value_loss(values, returns, mask, old_values=old_values, cliprange=0.3).loss

    assert gradcheck(loss, values.requires_grad_(), atol=0, rtol=1e-6)


def test_value_loss_of_micro_batches_adds_up():
    """Losses, gradients and the sums of the metrics, split by sequences."""
    mask, _, values, old_values, returns, *_ = ppo_batch()
    options = {"num_items_in_batch": mask.sum()}
    whole = values.clone().requires_grad_()
    want = value_loss(whole, returns, mask, old_values=old_values, **options)
    want.loss.backward()
    leaf = values.clone().requires_grad_()
    sums = 0
    for rows in (slice(0, 2), slice(2, 5)):
        part = value_loss(
            leaf[rows], returns[rows], mask[rows], old_values=old_values[rows], **options
        )
        part.loss.backward()
        sums = sums + part.sums
    assert relative_error(leaf.grad, whole.grad) < 1e-7
    assert relative_error(sums, want.sums) < 1e-7
    assert value_metrics(sums)["value/explained_variance"].item() == pytest.approx(
        want.metrics["value/explained_variance"].item(), rel=1e-6
    )


def test_value_loss_at_the_edges():
    mask, _, values, old_values, returns, *_ = ppo_batch()
    leaf = values.clone().requires_grad_()
    nothing = value_loss(leaf, returns, torch.zeros_like(mask), old_values=old_values)
    nothing.loss.backward()
    assert nothing.loss == 0 and (leaf.grad == 0).all()
    assert [x.item() for x in nothing.metrics.values()] == [0.0, 0.0, 0.0]
    for level in (0.1, 1e4 + 0.1, 0.0):
        equal = value_loss(torch.rand(3, 7), torch.full((3, 7), level)).metrics
        assert equal["value/explained_variance"] == 0
    for level, step in ((1e4, 1.0), (0.0, 1e-5)):
        target = torch.tensor([[level, level + step]])
        assert value_loss(target, target).metrics["value/explained_variance"] == 1
    for name in ("values", "returns", "old_values"):
        tensors = {"values": values, "returns": returns, "old_values": old_values}
        tensors[name] = tensors[name].clone()
        tensors[name][0, mask[0].nonzero()[0]] = NAN
        assert value_loss(**tensors, mask=mask).loss.isnan(), name
    empty = torch.zeros(0, requires_grad=True)
    none = value_loss(empty, empty, cu_seqlens=torch.tensor([0, 0, 0]))
    none.loss.backward()
    assert none.loss == 0 and empty.grad.shape == (0,)


def test_weights_are_those_of_the_policy_losses():
    """One rule, one place: a loss of ones is the sum of token_weights."""
    mask, _, values, *_ = ppo_batch()
    targets = torch.where(mask, values, 0.0) - math.sqrt(2)
    for rule in RULES:
        got = value_loss(values, targets, mask, normalizer=rule).loss
        assert got.item() == pytest.approx(token_weights(mask, rule).sum().item(), rel=1e-6)


@pytest.mark.parametrize("where", ["meta", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_no_synchronisation(where, request):
    """Meta tensors have no values: reading one raises an error."""
    tokens, packed = torch.zeros(2, 9, device=where), torch.zeros(9, device=where)
    ends = torch.tensor([0, 4, 9], device=where)
    if where == "cuda":
        request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
        torch.cuda.set_sync_debug_mode("error")
    assert value_loss(tokens, tokens, tokens, old_values=tokens).sums.shape == (8,)
    assert value_loss(packed, packed, cu_seqlens=ends, reduction="none").loss.shape == (9,)


def critic(*rest, **options):
    return lambda: value_loss(*rest, **options)


TOKENS, ROW = torch.zeros(2, 3), torch.zeros(6)
BAD = {
    "returns": (critic(TOKENS, TOKENS.T), r"returns must have shape \(2, 3\) on cpu"),
    "old": (critic(TOKENS, TOKENS, old_values=ROW), r"old_values must have shape \(2, 3\)"),
    "cliprange": (critic(TOKENS, TOKENS, cliprange=0), "cliprange must be .* > 0, got 0"),
    "infinite": (critic(TOKENS, TOKENS, cliprange=math.inf), "cliprange must be .*got inf"),
    "kind": (critic(TOKENS.int(), TOKENS), "values must be floating point, got torch.int32"),
    "normalizer": (critic(TOKENS, TOKENS, normalizer="mean"), "normalizer must be one of"),
    "reduction": (critic(TOKENS, TOKENS, reduction="mean"), "reduction must be one of sum, none"),
    "divisor": (critic(TOKENS, TOKENS, num_items_in_batch=-1), "num_items_in_batch must be >= 0"),
    "ends": (
        critic(ROW, ROW, cu_seqlens=torch.tensor([0, 5])),
        r"cu_seqlens must be nondecreasing from 0 to N = 6, got \[0, 5\]",
    ),
    "group": (critic(TOKENS, TOKENS, sequence_group=3), "sequence_group must be a ProcessGroup"),
}


@pytest.mark.parametrize("call", BAD)
def test_invalid_arguments(call):
    with pytest.raises(ValueError, match=BAD[call][1]):
        BAD[call][0]()
