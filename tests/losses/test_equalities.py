"""The same batch in another shape gives the same loss, for every row of LOSSES."""

import pytest
import torch
from batches import make_batch, relative_error
from packing import cu_seqlens, pack, unpack

from grpo_fused import LOSSES, grpo_loss, token_weights

FAMILY = pytest.mark.parametrize("loss_type", LOSSES)
B, T = 4, 5


def batch_of(device, **options):
    return make_batch(B, T, 33, device=device, **options)


def arguments(batch):
    """Every option that comes per token or per sequence, and scalars that are not neutral."""
    generator = torch.Generator().manual_seed(3)
    device = batch.logits.device
    ratio = torch.rand(batch.mask.shape, generator=generator) + 0.5
    on = torch.rand(batch.mask.shape, generator=generator) < 0.8
    temperature = torch.rand(len(ratio), generator=generator) + 0.6
    return {
        "logits": batch.leaf(),
        "completion_ids": batch.ids,
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_logps": batch.old_logps,
        "ref_logps": batch.ref_logps,
        "importance_sampling_ratio": ratio.to(device).masked_fill(batch.mask == 0, torch.nan),
        "policy_mask": on.to(device),
        "temperature": temperature.to(device),
        "beta": 0.1,
        "entropy_coef": 0.01,
        "logit_softcap": 10.0,
        "max_completion_length": T,
    }


def run(given, loss_type, implementation, upstream=None, **options):
    """(LossOutput, gradient of the leaf) of a call."""
    leaf = given["logits"]
    given = {**given, "loss_type": loss_type, "implementation": implementation, **options}
    out = grpo_loss(**given)
    out.loss.backward(upstream)
    return out, leaf.grad


def per_sequence_or_token(given, change):
    """Arguments with `change` applied to those that have a dimension of sequences."""
    return {
        name: change(value) if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in given.items()
    }


def leaf_of(logits):
    return logits.detach().clone().requires_grad_(True)


@FAMILY
def test_longer_padding(loss_type, implementation, device):
    given = arguments(batch_of(device))
    out, grad = run(given, loss_type, implementation)

    def longer(value):
        if value.dim() == 1:
            return value
        gap = value.new_full(
            (len(value), 3, *value.shape[2:]), 0 if value.dtype == torch.bool else 1
        )
        return torch.cat([value[:, :T], gap * (0 if value is given["completion_mask"] else 1)], 1)

    wider = per_sequence_or_token(given, longer)
    wider["logits"] = leaf_of(wider["logits"])
    longer_out, longer_grad = run(wider, loss_type, implementation)
    assert longer_out.loss.item() == pytest.approx(out.loss.item(), rel=2e-6, abs=1e-7)
    assert relative_error(longer_grad[:, :T], grad[:, :T]) < 1e-6
    assert (longer_grad[:, T:] == 0).all()
    assert torch.equal(longer_out.logps[:, :T], out.logps)
    for name, value in out.metrics.items():
        assert longer_out.metrics[name].item() == pytest.approx(value.item(), rel=1e-6), name


@FAMILY
def test_permuted_sequences(loss_type, implementation, device):
    given = arguments(batch_of(device))
    out, grad = run(given, loss_type, implementation)
    order = torch.tensor([2, 0, 3, 1], device=device)
    moved = per_sequence_or_token(given, lambda value: value[order])
    moved["logits"] = leaf_of(moved["logits"])
    other, other_grad = run(moved, loss_type, implementation)
    assert torch.equal(other.logps, out.logps[order])
    assert other.loss.item() == pytest.approx(out.loss.item(), rel=2e-6, abs=1e-7)
    assert torch.equal(other_grad, grad[order])


@FAMILY
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_packed(loss_type, reduction, implementation, device):
    """Also with a sequence that has no token at all, and cu_seqlens of either width."""
    lengths = [5, 0, 3, 1]
    batch = batch_of(device, mask=torch.arange(T) < torch.tensor(lengths)[:, None])
    batch.mask[0, 2] = False
    given = arguments(batch)
    upstream = torch.randn(B, T, generator=torch.Generator().manual_seed(0)).to(device)
    options = {"reduction": reduction}
    wanted, grad = run(
        given, loss_type, implementation, upstream if reduction == "none" else None, **options
    )
    for dtype in (torch.int32, torch.int64):
        flat = per_sequence_or_token(
            given, lambda v: pack(lengths, v[:, :T])[0] if v.dim() > 1 else v
        )
        flat["logits"] = leaf_of(flat["logits"])
        flat["cu_seqlens"] = cu_seqlens(lengths, device, dtype)
        (flat_upstream,) = pack(lengths, upstream)
        out, flat_grad = run(
            flat,
            loss_type,
            implementation,
            flat_upstream if reduction == "none" else None,
            **options,
        )
        assert torch.equal(unpack(lengths, T, out.logps), wanted.logps)
        assert relative_error(unpack(lengths, T, flat_grad), grad[:, :T]) < 1e-6
        if reduction == "none":
            assert relative_error(unpack(lengths, T, out.loss), wanted.loss) < 1e-6
        else:
            assert out.loss.item() == pytest.approx(wanted.loss.item(), rel=2e-6, abs=1e-7)
        assert relative_error(out.sums, wanted.sums) < 1e-6


@FAMILY
def test_per_token_losses_sum_to_the_loss(loss_type, implementation, device):
    """Times their weights they are the loss, and so is the gradient of that product."""
    batch = batch_of(device)
    given = arguments(batch)
    given["entropy_coef"] = 0.0
    out, grad = run(given, loss_type, implementation)
    weights = token_weights(batch.mask, LOSSES[loss_type].normalizer, max_completion_length=T)
    given["logits"] = leaf_of(given["logits"])
    tokens, token_grad = run(given, loss_type, implementation, weights, reduction="none")
    assert (tokens.loss[batch.mask == 0] == 0).all()
    assert (tokens.loss * weights).sum().item() == pytest.approx(
        out.loss.item(), rel=5e-6, abs=1e-7
    )
    assert relative_error(token_grad, grad) < 2e-6


@FAMILY
def test_in_place_and_of_t_plus_one_positions(loss_type, implementation, device):
    given = arguments(batch_of(device))
    out, grad = run(given, loss_type, implementation)
    leaf = leaf_of(given["logits"])
    inplace = grpo_loss(
        **(given | {"logits": leaf * 1.0}),
        loss_type=loss_type,
        inplace=True,
        implementation=implementation,
    )
    inplace.loss.backward()
    assert torch.equal(inplace.loss, out.loss) and torch.equal(leaf.grad, grad)
    cut = leaf_of(given["logits"][:, :T])
    shorter, short_grad = run(given | {"logits": cut}, loss_type, implementation)
    assert torch.equal(shorter.loss, out.loss) and torch.equal(short_grad, grad[:, :T])


@pytest.mark.parametrize("loss_type", ["gspo", "gmpo", "vespo", "cispo"])
def test_half_precision_makes_the_same_loss(loss_type, implementation, device):
    """float16 takes the other path: gradient in backward, when the loss scale is known."""
    batch = batch_of(device, dtype=torch.float16)
    given = arguments(batch)
    out, grad = run(given, loss_type, implementation, torch.tensor(1024.0, device=device))
    wide = given | {"logits": leaf_of(given["logits"].float())}
    wanted, wide_grad = run(wide, loss_type, implementation, torch.tensor(1024.0, device=device))
    assert out.loss.item() == pytest.approx(wanted.loss.item(), rel=5e-6, abs=1e-7)
    assert relative_error(grad, wide_grad) < 6e-4


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_two_implementations(loss_type, device):
    (torch_out, torch_grad), (out, grad) = (
        run(arguments(batch_of(device)), loss_type, name) for name in ("torch", "triton")
    )
    assert out.loss.item() == pytest.approx(torch_out.loss.item(), rel=5e-6, abs=1e-7)
    assert relative_error(grad, torch_grad) < 2e-6
    assert relative_error(out.sums, torch_out.sums) < 1e-6


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_scalars_as_tensors(loss_type, implementation, device):
    """A schedule comes as a 0-d tensor, of any dtype: read on the device, the same number."""
    scalars = {"beta": 0.25, "entropy_coef": 0.125, "logit_softcap": 8.0, "logit_scale": 0.5}
    scalars["temperature"] = 0.75
    results = []
    for dtype in (None, torch.float32, torch.float64):
        given = arguments(batch_of(device)) | scalars
        if dtype is not None:
            given |= {n: torch.tensor(v, dtype=dtype, device=device) for n, v in scalars.items()}
        out, grad = run(given, loss_type, implementation)
        assert out.loss.dtype == torch.float32
        results.append((out.loss.item(), grad))
    for loss, grad in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert relative_error(grad, results[0][1]) < 1e-6
