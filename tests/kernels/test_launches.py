"""How often the device is called, and how many bytes of logits move: counted, on any machine."""

import re

import pytest
import torch
from batches import make_batch
from launch_counter import FULL, PLAIN, TOKEN_LEVEL, Counter, options_of, traffic_of
from packing import cu_seqlens, pack

from grpo_fused import LOSSES, grpo_loss, selective_log_softmax
from grpo_fused.kernels.tiling import CHOICES, Device, tiling


@pytest.mark.parametrize("names", [(), PLAIN, FULL], ids=["on policy", "plain", "full"])
@pytest.mark.parametrize("loss_type", TOKEN_LEVEL)
def test_token_level_launches(loss_type, names, monkeypatch):
    """6 forward and 3 backward at most: one over the vocabulary, the rest over tokens."""
    batch = make_batch(B=2, T=3, V=17)
    logits, options = batch.leaf(), options_of(batch, *names)
    with Counter(monkeypatch) as counter:
        out = grpo_loss(
            *(logits, batch.ids, batch.mask, batch.advantages),
            loss_type=loss_type,
            implementation="triton",
            **options,
        )
        forward = counter.take()
        out.loss.backward()
        backward = counter.take()
    assert forward.count("_fused_loss_kernel") == forward.count("_reduce_kernel") == 1
    assert len(forward) <= 6, forward
    assert backward == ["ones_like", "_rescale_kernel"]


ROWS = ("_fused_loss_kernel", "_logprob_fwd_kernel", "_logprob_bwd_kernel")


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_bytes_of_logits(loss_type, inplace, monkeypatch):
    """Read once and written once, or, for what couples tokens, read twice and written once."""
    batch = make_batch(B=2, T=3, V=17)
    logits = batch.leaf() * 1.0
    with Counter(monkeypatch) as counter:
        out = grpo_loss(
            *(logits, batch.ids, batch.mask, batch.advantages),
            loss_type=loss_type,
            inplace=inplace,
            implementation="triton",
            **options_of(batch, *FULL),
        )
        out.loss.backward()
    reads = 1 if loss_type in TOKEN_LEVEL else 2
    assert traffic_of(counter, *ROWS) == (reads * logits.nbytes, logits.nbytes)
    # Its program returns at once: the upstream gradient is the one that was expected.
    rescaled = [name for name, _ in counter.traffic if name == "_rescale_kernel"]
    assert len(rescaled) == (loss_type in TOKEN_LEVEL)


def test_without_gradient_the_logits_are_only_read(monkeypatch):
    batch = make_batch(B=2, T=3, V=17)
    with Counter(monkeypatch) as counter, torch.no_grad():
        for loss_type in LOSSES:
            grpo_loss(
                *(batch.logits, batch.ids, batch.mask, batch.advantages),
                loss_type=loss_type,
                implementation="triton",
            )
        selective_log_softmax(batch.logits, batch.ids, batch.mask, implementation="triton")
    reads = len(LOSSES) + 1
    assert traffic_of(counter, *ROWS) == (reads * batch.logits.nbytes, 0)


@pytest.mark.parametrize(("loss_type", "launches"), [("dapo", 10), ("grpo", 13)])
def test_packed_launches(loss_type, launches, monkeypatch):
    """Small ones find a token's sequence; README says how many."""
    monkeypatch.setattr("grpo_fused.validation.check_cu_seqlens", lambda *args: None)
    batch = make_batch(B=3, T=4, V=17)
    lengths = batch.mask.sum(1).tolist()
    logits, ids, mask = pack(lengths, batch.logits[:, :4], batch.ids, batch.mask)
    ends = cu_seqlens(lengths, "cpu")
    with Counter(monkeypatch) as counter:
        grpo_loss(
            *(logits.requires_grad_(True), ids, mask, batch.advantages),
            cu_seqlens=ends,
            num_items_in_batch=9,
            loss_type=loss_type,
            implementation="triton",
        )
    assert len(counter.launches) <= launches, counter.launches


def test_block_sizes_come_from_one_table_with_reasons():
    for choice in CHOICES[1:]:  # the first is the interpreter's
        assert re.match("predicted|measured on", choice.reason)
    for architecture, warp_size in {"sm_80": 32, "sm_90": 32, "gfx942": 64, "other": 32}.items():
        device = Device(architecture, warp_size, multiprocessors=100)
        wide, narrow = 512 // warp_size, 256 // warp_size
        assert tiling(151_936, 2, device) == tiling(32_769, 4, device) == (wide, 4, 1, 2, 0.3)
        assert tiling(65_536, 2, device) == tiling(1, 4, device) == (narrow, 4, 2, 4, 0.3)


def test_packed_logits_are_read_no_more_often(monkeypatch):
    batch = make_batch(B=3, T=4, V=17)
    lengths = batch.mask.sum(1).tolist()
    logits, ids, mask = pack(lengths, batch.logits[:, :4], batch.ids, batch.mask)
    logits.requires_grad_(True)
    for loss_type, reads in (("grpo", 1), ("gspo", 2)):
        with Counter(monkeypatch) as counter:
            grpo_loss(
                *(logits, ids, mask, batch.advantages),
                cu_seqlens=cu_seqlens(lengths, "cpu"),
                loss_type=loss_type,
                implementation="triton",
            ).loss.backward()
        assert traffic_of(counter, *ROWS) == (reads * logits.nbytes, logits.nbytes)
