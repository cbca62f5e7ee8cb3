"""linear_grpo_loss against LigerFusedLinearGRPOLoss of Liger 0.8.5, and the known bugs of Liger."""

from importlib.util import find_spec
from itertools import product

import pytest
import torch
from batches import relative_error
from linear_peers import (
    CHUNK_BYTES,
    ROW_BYTES,
    assert_parity,
    drifted_case,
    errors,
    exact_linear_loss,
    liger_linear_loss,
    linear_loss,
    sampled_case,
    with_head,
)
from peers import KL, drifted_batch, each_cover, rollout_ratios, slow_if_interpreted

pytestmark = pytest.mark.skipif(
    find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)

CLIP_ROWS = ("grpo", "bnpo", "dr_grpo", "dapo")
LEVELS = ("token", "sequence")
# Liger has the others only at token level; test_luspo_of_liger covers LUSPO.
ROWS = [*product(CLIP_ROWS, LEVELS), *product(("cispo", "sapo", "vespo"), ("token",))]
each_row = pytest.mark.parametrize("loss_type, level", ROWS, ids=map("-".join, ROWS))


def check(case, chunk_size, chunk_bytes, implementation="auto", *, upstream=1.0, **options):
    """Compare with Liger, both in float32."""
    out = linear_loss(case, implementation, chunk_bytes=chunk_bytes, upstream=upstream, **options)
    peer = liger_linear_loss(case, chunk_size=chunk_size, upstream=upstream, **options)
    if options.get("level") == "sequence":  # see test_parity_liger.test_clip_ratio_of_sequences
        peer.metrics.pop("clip_ratio/region_mean", None)
    assert_parity(out, peer, case.batch.ids)


@each_cover
@each_row
def test_losses_agree_with_liger(loss_type, level, cover, device):
    """KL, rollout ratio, delta (also below 1 + epsilon_high), chunks of both."""
    case = drifted_case(device=device)
    deltas = (None, 2.0, 1.1) if loss_type in CLIP_ROWS else (None,)
    ratios = (None, *rollout_ratios(case.batch).values())
    chunks = tuple(zip((1, 3, 8, 8), CHUNK_BYTES, strict=True))
    for kl, ratio, delta, chunk in cover(KL, ratios, deltas, chunks):
        options = {"loss_type": loss_type, "level": level, "importance_sampling_ratio": ratio, **kl}
        check(case, *chunk, delta=delta, **options)


@each_row
def test_divisors_and_temperature_agree_with_liger(loss_type, level, device):
    """On policy, without bias, with temperature, global divisors and an upstream gradient."""
    case = drifted_case(1, bias=False, device=device)
    case.batch.old_logps = None
    for chunk in zip((1, 3, 8, 8), CHUNK_BYTES, strict=True):
        check(
            case,
            *chunk,
            loss_type=loss_type,
            level=level,
            temperature=0.7,
            num_items_in_batch=50,
            max_completion_length=9,
            upstream=-0.37,
            **KL[2],
        )


@pytest.mark.parametrize("loss_type", ["dapo", pytest.param("vespo", marks=slow_if_interpreted)])
def test_the_kernels_agree_with_liger(loss_type, device):
    case = drifted_case(2, device=device)
    ratio = rollout_ratios(case.batch)["(B, T)"]
    options = {"loss_type": loss_type, "importance_sampling_ratio": ratio, **KL[2]}
    check(case, 3, 7 * ROW_BYTES, "triton", **options)


def test_luspo_of_liger(device):
    """Liger is right while its loss is (B, 1): sequence level, no KL, no ratio per token.

    Otherwise it averages over (B, T), masked tokens included, as TRL did before 1.16: 1 / T of the
    paper's loss, plus padding. Ours, as TRL 1.16, sums over the active tokens of a sequence
    (https://arxiv.org/abs/2602.05261).
    """
    case = drifted_case(device=device)
    ratios = rollout_ratios(case.batch)
    sequence = {"loss_type": "luspo", "level": "sequence"}
    for ratio, delta in product((None, ratios["(B, 1)"]), (None, 2.0)):
        check(case, 3, None, importance_sampling_ratio=ratio, delta=delta, **sequence)
    for options in (
        {"loss_type": "luspo"},
        sequence | KL[1],
        sequence | {"importance_sampling_ratio": ratios["(B, T)"]},
    ):
        out, want = linear_loss(case, **options), exact_linear_loss(case, **options)
        assert_parity(out, want, case.batch.ids)
        peer = liger_linear_loss(case, **options)
        assert relative_error(peer.loss, want.loss) > 0.01
        assert max(errors(peer.gradients, want.gradients, case.batch.ids).values()) > 0.01


def test_weight_gradient_of_many_chunks(device):
    """Liger accumulates chunks in bfloat16: 64 chunks have five times the error of one.

    Its gradient of the logits is float32, ours bfloat16, so in one chunk Liger is more accurate.
    Ours accumulates in float32, with the same error in any chunks. Liger's default chunk_size is 1.
    """
    case = sampled_case(64, 8, 64, H=64, dtype=torch.bfloat16, device=device)
    truth = exact_linear_loss(case, loss_type="grpo", logits_dtype=torch.bfloat16)

    def error(found):
        return relative_error(found.gradients["weight"], truth.gradients["weight"])

    once, many = (error(liger_linear_loss(case, loss_type="grpo", chunk_size=n)) for n in (64, 1))
    assert once < 2e-3 and many > 4 * once
    rounded = {"loss_type": "grpo", "logits_dtype": torch.bfloat16}
    ours_once, ours_many = (
        error(linear_loss(case, chunk_bytes=n, **rounded)) for n in (None, 8 * 64 * 2)
    )
    assert ours_once < 3e-3 and ours_many < 1.02 * ours_once


def test_padding_is_read_by_liger(device):
    """Liger multiplies by the mask: NaN under it makes the loss NaN. Ours never reads it."""
    case = drifted_case(device=device)
    assert liger_linear_loss(case, loss_type="grpo", fill=torch.nan).loss.isnan()
    check(case, 1, None, loss_type="grpo")


@pytest.mark.parametrize("row", [1, 0], ids=["A=0", "clipped"])
def test_overflowing_ratio(row, device):
    """Liger: inf * 0 = NaN, which spreads to the gradient of the head. Ours: gradient 0."""
    case = drifted_case(device=device)
    case.batch.old_logps[row] -= 100.0
    assert liger_linear_loss(case, loss_type="grpo").gradients["weight"].isnan().any()
    out = linear_loss(case, loss_type="grpo")
    assert_parity(out, exact_linear_loss(case, loss_type="grpo"), case.batch.ids)


def test_advantages_per_token_are_broadcast(device):
    """Liger broadcasts (B, T) to (B, B, T): each sequence meets the advantages of all of its chunk.

    Ours agrees with the oracle. Liger does so only with one sequence per chunk.
    """
    case = with_head(drifted_batch(per_token=True, device=device))
    out = linear_loss(case, loss_type="grpo")
    assert_parity(out, exact_linear_loss(case, loss_type="grpo"), case.batch.ids)
    check(case, 1, None, loss_type="grpo")
    peer = liger_linear_loss(case, loss_type="grpo", chunk_size=8)
    assert relative_error(peer.loss, out.loss) > 1
    assert peer.metrics["clip_ratio/region_mean"] > 1  # although it is a share
