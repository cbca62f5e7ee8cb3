"""grpo_loss against triton_grpo_loss of Liger 0.8.5: agreement, and the known bugs of Liger."""

from importlib.util import find_spec
from itertools import product

import pytest
import torch
from batches import assert_gradients_agree, make_batch, relative_error
from peers import (
    KL,
    assert_parity,
    drifted_batch,
    fused_loss,
    harmless,
    liger_loss,
    rollout_ratios,
    slow_if_interpreted,
)

pytestmark = pytest.mark.skipif(
    find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)
# Some tests make its kernels compute NaN, and the numpy of the interpreter warns.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LEVELS = ("token", "sequence")


def check(batch, implementation="torch", **options):
    out, dlogits = fused_loss(batch, implementation, **options)
    peer = liger_loss(batch, **options)
    if options.get("level") == "sequence":  # see test_clip_ratio_of_sequences
        peer.metrics.pop("clip_ratio/region_mean", None)
    # Both compute in float32, and VESPO exponentiates a sum over the sequence.
    assert_parity(out, dlogits, peer, batch.ids, value=2e-6, metrics=1e-5)
    return out, dlogits


def each_value(*columns):
    """Combine options so that each value occurs once."""
    return zip(*columns, strict=True)


@pytest.mark.parametrize(
    "cover",
    [each_value, pytest.param(product, marks=slow_if_interpreted)],
    ids=["each value", "product"],
)
@pytest.mark.parametrize("level", LEVELS)
def test_clip_agrees(level, cover, device):
    """KL, rollout ratio and delta; Liger runs in the interpreter."""
    batch = drifted_batch(device=device)
    ratios = (None, *rollout_ratios(batch).values())
    for kl, ratio, delta in cover(KL, ratios, (2.0, None, 1.5)):
        options = {"delta": delta, "importance_sampling_ratio": ratio, **kl}
        check(batch, loss_type="dapo", level=level, **options)


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
def test_other_objectives_agree(loss_type, device):
    """Liger has them only at token level."""
    batch = drifted_batch(seed=1, device=device)
    ratios = rollout_ratios(batch, seed=1)
    for ratio, kl in zip((None, *ratios.values()), KL, strict=True):
        check(batch, loss_type=loss_type, importance_sampling_ratio=ratio, **kl)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_reductions_agree(loss_type, level, device):
    batch = drifted_batch(seed=2, device=device)
    ratio = rollout_ratios(batch, seed=2)["(B, 1)"][:, 0]
    check(
        batch,
        loss_type=loss_type,
        level=level,
        delta=2.0,
        importance_sampling_ratio=ratio,
        max_completion_length=9,
        **KL[2],
    )


@pytest.mark.parametrize(
    "loss_type",
    ["dapo", *(pytest.param(name, marks=slow_if_interpreted) for name in ("cispo", "vespo"))],
)
def test_the_kernels_agree(loss_type, device):
    """Kernel against kernel, with a temperature and the divisor of the global batch."""
    batch = drifted_batch(seed=3, device=device)
    check(
        batch,
        "triton",
        loss_type=loss_type,
        temperature=0.7,
        num_items_in_batch=50,
        importance_sampling_ratio=rollout_ratios(batch, seed=3)["(B, T)"],
        **KL[2],
    )


@pytest.mark.parametrize("level", LEVELS)
def test_losses_per_token_agree(level, device):
    """With an upstream gradient per token, which must have no effect under the mask."""
    batch = drifted_batch(seed=4, device=device)
    upstream = torch.randn(batch.ids.shape, generator=torch.Generator().manual_seed(4)).to(device)
    out, dlogits = check(batch, loss_type="grpo", level=level, upstream=upstream, beta=0.1)
    assert (out.loss[batch.mask == 0] == 0).all() and (dlogits[:, :6][batch.mask == 0] == 0).all()


def test_on_policy_agrees(device):
    batch = drifted_batch(seed=5, device=device)
    batch.old_logps = None
    for level in LEVELS:
        check(batch, loss_type="grpo", level=level, beta=0.1)


@pytest.fixture(params=["torch", pytest.param("triton", marks=slow_if_interpreted)])
def implementation(request):
    return request.param


@quiet
def test_leading_block_of_minus_infinity(implementation, device):
    """Liger: exp(-inf - -inf) is NaN while its running maximum is -inf.

    Ours is right: those columns have probability 0, as if the vocabulary began after them.
    """
    V, first = 2100, 2048
    batch = make_batch(B=2, T=2, V=V, mask=torch.ones(2, 2).long(), device=device)
    batch.logits[..., :first] = -torch.inf
    batch.ids.clamp_(min=first)
    peer = liger_loss(batch, loss_type="grpo")
    assert peer.dlogits[:, :2, first:].isnan().all()
    out, dlogits = fused_loss(batch, implementation, loss_type="grpo")
    tail = make_batch(B=2, T=2, V=V, mask=torch.ones(2, 2).long(), device=device)
    tail.logits, tail.ids = batch.logits[..., first:].contiguous(), batch.ids - first
    want, dtail = fused_loss(tail, implementation, loss_type="grpo")
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
    assert (dlogits[..., :first] == 0).all()
    assert_gradients_agree(dlogits[..., first:], dtail, tail.ids, 1e-6)


def test_small_tensors_are_misread(device):
    """Liger reads advantages[b] as the b-th number in memory, whatever the shape.

    It documents (B,) and does not check. Ours respects shape and strides.
    """
    batch = drifted_batch(per_token=True, device=device)
    misread = drifted_batch(device=device)
    batch.advantages = harmless(batch, batch.advantages)
    misread.advantages = batch.advantages.flatten()[:8]
    peer = liger_loss(batch, loss_type="grpo")
    assert peer.loss == liger_loss(misread, loss_type="grpo").loss
    out, _ = fused_loss(batch, loss_type="grpo")  # test_parity_trl shows that it is right
    assert (out.loss - peer.loss).abs() > 0.01
    strided = drifted_batch(device=device)
    plain = liger_loss(strided, loss_type="grpo")
    strided.advantages = torch.stack([strided.advantages, strided.advantages + 9], 1)[:, 0]
    assert (liger_loss(strided, loss_type="grpo").loss - plain.loss).abs() > 0.01
    out, dlogits = fused_loss(strided, loss_type="grpo")
    assert_parity(out, dlogits, plain, strided.ids)


def test_wrong_ids_pass(device):
    """Liger reads ids of another width by its own stride, and id V from the next row."""
    batch = drifted_batch(device=device)
    right = batch.ids.masked_fill(batch.mask == 0, 0)
    outside = right.clone()
    outside[0, 0] = 37
    plain = liger_loss(batch, loss_type="grpo").loss
    for ids in (torch.cat([right, right[:, :2]], 1), outside):
        peer = liger_loss(batch, loss_type="grpo", ids=ids)
        assert peer.loss.isfinite() and peer.loss != plain
        if device == "cpu" or ids is not outside:  # a check would synchronise with the device
            with pytest.raises(ValueError, match="completion_(ids|mask)"):
                fused_loss(batch, loss_type="grpo", ids=ids)


@pytest.mark.parametrize("level", LEVELS)
def test_delta_below_the_upper_bound(level, device):
    """Liger: no gradient where delta < ratio < 1 + epsilon_high and A < 0.

    There min selects the clamped ratio, which equals the ratio: -ratio A is right, as in TRL.
    """
    batch = drifted_batch(device=device)
    batch.old_logps[3] = fused_loss(batch, loss_type="grpo")[0].logps[3] - 0.2  # ratio 1.22
    options = {"loss_type": "grpo", "level": level, "delta": 1.1}
    peer = liger_loss(batch, **options)
    out, dlogits = fused_loss(batch, **options)
    assert out.loss.item() == pytest.approx(peer.loss.item(), rel=1e-5)
    assert (peer.dlogits[3] == 0).all()
    free, dfree = fused_loss(batch, loss_type="grpo", level=level)
    assert dlogits[3].norm() > 0.01 and torch.equal(dlogits[3], dfree[3])


def test_luspo_depends_on_the_padding(device):
    """Liger averages n_b l over (B, T): n_b / T times the paper's average over b.

    Padding changes Liger's loss, but not ours, which is the paper's and TRL's: the loss of a
    sequence times its length (https://arxiv.org/abs/2602.05261).
    """
    batch = drifted_batch(device=device)
    options = {"loss_type": "luspo", "level": "sequence"}
    out, _ = fused_loss(batch, **options)
    ones = torch.ones_like(batch.old_logps)
    values, _ = fused_loss(batch, upstream=ones, **options)
    per_sequence, lengths = values.loss.sum(1), batch.mask.sum(1)
    assert out.loss.item() == pytest.approx(per_sequence.mean().item(), rel=1e-5)
    want = (per_sequence * lengths / 6).mean().item()
    assert liger_loss(batch, **options).loss.item() == pytest.approx(want, rel=1e-5)


def test_luspo_gradient_of_another_sequence(device):
    """Liger reads the (B, 1) upstream gradient of row b at b + t, which may be out of bounds.

    The mask keeps b + t in bounds: token t of row b gets the length of row b + t.
    """
    lengths = torch.tensor([6, 4, 5, 3, 2, 3, 2, 1])
    batch = make_batch(
        B=8, T=6, V=37, mask=(torch.arange(6) < lengths[:, None]).long(), device=device
    )
    peer = liger_loss(batch, loss_type="luspo")
    scale = 1 / (8 * 6)
    for b, t in ((0, 0), (0, 1), (2, 4), (3, 2)):
        upstream = torch.zeros_like(batch.old_logps)
        upstream[b, t] = scale * lengths[b + t]
        _, misread = fused_loss(batch, loss_type="luspo", upstream=upstream)
        assert relative_error(peer.dlogits[b, t], misread[b, t]) < 2e-6


@quiet
@pytest.mark.parametrize("row", [1, 0], ids=["A=0", "clipped"])
def test_overflowing_ratio(row, device):
    """Liger's gradient is inf * 0 = NaN; ours is 0, the derivative of a constant."""
    batch = drifted_batch(device=device)
    batch.old_logps[row] -= 100.0
    assert liger_loss(batch, loss_type="grpo").dlogits[row].isnan().any()
    out, dlogits = fused_loss(batch, loss_type="grpo")
    assert out.loss.isfinite() and dlogits.isfinite().all()
    assert (dlogits[row] == 0).all()


@quiet
def test_overflowing_kl(device):
    """Liger's k3 of a log-ratio of 100 is inf. Ours clamps the exponent at 80."""
    batch = drifted_batch(device=device)
    batch.ref_logps[5, 0] += 100.0
    peer = liger_loss(batch, loss_type="grpo", beta=0.1)
    assert peer.loss.isinf() and not peer.dlogits[5, 0].isfinite().any()
    out, dlogits = fused_loss(batch, loss_type="grpo", beta=0.1)
    assert out.loss.isfinite() and dlogits.isfinite().all()


def test_clip_ratio_of_sequences(device):
    """Liger averages clipped sequences over tokens; ours, as in TRL, over sequences."""
    batch = drifted_batch(device=device)
    options = {"loss_type": "grpo", "level": "sequence"}
    clipped = torch.zeros(8)
    clipped[[0, 3]] = 1.0  # ratios 1.8 with A > 0 and 0.6 with A < 0
    lengths = batch.mask.sum(1).cpu()
    weighted = (clipped * lengths).sum() / lengths.sum()
    peer = liger_loss(batch, **options)
    assert peer.metrics["clip_ratio/region_mean"] == pytest.approx(weighted.item())
    out, _ = fused_loss(batch, **options)
    assert out.metrics["clip_ratio/region_mean"].item() == pytest.approx(2 / 8)
