"""How many launches a loss takes, and how often it reads the logits: counted on any machine."""

import re

import pytest
import torch
from batches import make_batch
from launch_counter import FULL, PLAIN, TOKEN_LEVEL, Counter, options_of, reads_of_logits
from packing import cu_seqlens, pack

from grpo_fused import LOSSES, grpo_loss, selective_log_softmax
from grpo_fused.bundles import TokenValues, TokenWeights, Weight
from grpo_fused.kernels.launch import CHOICES, Device, choose
from grpo_fused.ops import BACKENDS


def launches_of(monkeypatch, batch, **options):
    """(forward, backward) launches of a loss, and the values of ids unchecked as on a device."""
    logits = options.pop("logits", None)
    logits = batch.leaf() if logits is None else logits
    with Counter(monkeypatch) as counter:
        out = grpo_loss(
            *(logits, batch.ids, batch.mask, batch.advantages),
            implementation="triton",
            **options,
        )
        forward = counter.take()
        out.loss.backward()
    return forward, counter.take()


@pytest.mark.parametrize("items", [9, torch.tensor(9)], ids=["number", "tensor"])
@pytest.mark.parametrize("mask", [torch.bool, torch.int64], ids=str)
def test_dapo_takes_four_launches(items, mask, monkeypatch):
    """The mask as bool, weights per token if they are no number, the loss, its sums."""
    batch = make_batch(B=2, T=3, V=17)
    batch.mask = batch.mask.to(mask)
    options = options_of(batch, *PLAIN)
    forward, backward = launches_of(monkeypatch, batch, num_items_in_batch=items, **options)
    names = ["_fused_loss_kernel", "_reduce_kernel"]
    names = ["_token_weights_kernel", *names] if isinstance(items, torch.Tensor) else names
    assert [name for name in forward if name.endswith("_kernel")] == names
    assert len(forward) == len(names) + (mask != torch.bool), forward
    assert backward == ["ones_like", "_rescale_kernel"]


def test_weights_are_written_to_the_tokens_alone():
    """A block reaches behind the last token, where other memory may begin."""
    memory, B, T = torch.full((4, 10), 7.0), 2, 3
    outputs = TokenWeights(*(row[: B * T].view(B, T) for row in memory))
    weight = Weight(torch.ones(B), torch.ones(B), 2.0)
    values = TokenValues(torch.ones(B), torch.ones(B, T), weight, weight, weight)
    BACKENDS["triton"].token_weights(values, None, outputs)
    assert (memory[:, B * T :] == 7.0).all()
    assert (memory[0, : B * T] == 1.0).all() and (memory[1:, : B * T] == 0.5).all()


def test_a_policy_mask_takes_no_launch_of_its_own(monkeypatch):
    """The launch that broadcasts advantages applies it, though the weight itself is a number."""
    batch = make_batch(B=2, T=3, V=17)
    batch.mask = batch.mask != 0
    options = options_of(batch, "old_logps", "policy_mask")
    forward, _ = launches_of(monkeypatch, batch, num_items_in_batch=9, **options)
    assert forward == ["_token_weights_kernel", "_fused_loss_kernel", "_reduce_kernel"]


@pytest.mark.parametrize("names", [(), PLAIN, FULL], ids=["on policy", "plain", "full"])
@pytest.mark.parametrize("loss_type", TOKEN_LEVEL)
def test_token_level_launches(loss_type, names, monkeypatch):
    """At most 8 forward, one of them over the vocabulary; 1 backward, besides autograd's one."""
    batch = make_batch(B=2, T=3, V=17)
    options = options_of(batch, *names) | {"loss_type": loss_type}
    if names == FULL:
        options |= {"temperature": torch.ones(2), "grad_scale": torch.tensor(2.0)}
    forward, backward = launches_of(monkeypatch, batch, **options)
    assert forward.count("_fused_loss_kernel") == forward.count("_reduce_kernel") == 1
    assert len(forward) <= 8, forward
    assert len(forward) == len(set(forward) - {"sum"}) + forward.count("sum"), "one of each kind"
    assert backward == ["ones_like", "_rescale_kernel"]


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_reads_of_logits(loss_type, inplace, monkeypatch):
    """Token-level losses read the logits once, the others twice."""
    batch = make_batch(B=2, T=3, V=17)
    options = options_of(batch, *FULL) | {"loss_type": loss_type, "inplace": inplace}
    forward, backward = launches_of(monkeypatch, batch, logits=batch.leaf() * 1.0, **options)
    reads = 1 if loss_type in TOKEN_LEVEL else 2
    assert reads_of_logits(forward + backward) == reads
    # Its programs return at once: the upstream gradient is the expected one.
    assert backward.count("_rescale_kernel") == (loss_type in TOKEN_LEVEL)


def test_without_gradient_nothing_of_the_size_of_logits_is_written(monkeypatch):
    batch = make_batch(B=2, T=3, V=17)
    with Counter(monkeypatch) as counter, torch.no_grad():
        for loss_type in LOSSES:
            grpo_loss(
                *(batch.logits, batch.ids, batch.mask, batch.advantages),
                loss_type=loss_type,
                implementation="triton",
            )
        selective_log_softmax(batch.logits, batch.ids, batch.mask, implementation="triton")
    assert reads_of_logits(counter.launches) == len(LOSSES) + 1
    assert "_logprob_bwd_kernel" not in counter.launches


@pytest.mark.parametrize(("loss_type", "launches"), [("dapo", 4), ("grpo", 5)])
def test_packed_launches(loss_type, launches, monkeypatch):
    monkeypatch.setattr("grpo_fused.validation.check_cu_seqlens", lambda *args: None)
    batch = make_batch(B=3, T=4, V=17)
    lengths = batch.mask.sum(1).tolist()
    logits, ids, mask = pack(lengths, batch.logits[:, :4], batch.ids, batch.mask != 0)
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


@pytest.mark.parametrize(("loss_type", "reads"), [("grpo", 1), ("gspo", 2)])
def test_packed_logits_are_read_no_more_often(loss_type, reads, monkeypatch):
    batch = make_batch(B=3, T=4, V=17)
    lengths = batch.mask.sum(1).tolist()
    logits, ids, mask = pack(lengths, batch.logits[:, :4], batch.ids, batch.mask)
    logits.requires_grad_(True)
    with Counter(monkeypatch) as counter:
        grpo_loss(
            *(logits, ids, mask, batch.advantages),
            cu_seqlens=cu_seqlens(lengths, "cpu"),
            loss_type=loss_type,
            implementation="triton",
        ).loss.backward()
    assert reads_of_logits(counter.launches) == reads


def test_block_sizes_come_from_one_table_with_reasons():
    for choice in CHOICES[1:]:  # the first is the interpreter's
        assert re.match("predicted|measured on", choice.reason)
    for architecture, warp_size in {"sm_80": 32, "sm_90": 32, "gfx942": 64, "other": 32}.items():
        device = Device(architecture, warp_size, multiprocessors=100)
        assert choose(151_936, 2, device) == choose(32_769, 4, device) == CHOICES[2]
        assert choose(65_536, 2, device) == choose(1, 4, device) == CHOICES[1]
