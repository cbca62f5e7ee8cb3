"""Packed sequences: located in one launch, and how many launches a loss takes."""

import pytest
import torch
from batches import make_batch
from launch_counter import FULL, TOKEN_LEVEL, Counter, options_of
from packing import cu_seqlens, pack

from grpo_fused import grpo_loss
from grpo_fused.kernels import reduce
from grpo_fused.ops import BACKENDS

LENGTHS = {
    "several": [3, 1, 4, 5],
    "empty ones": [0, 3, 0, 0, 4, 0],
    "one": [7],
    "longer than a block": [2, 2100, 1],
    "as long as blocks": [1024, 2048],
    "without a token": [0, 0],
}


def located(launch, ends, active, number, tokens, device):
    index = torch.full((tokens,), -7, device=device)
    counts = torch.full((number,), -7.0, device=device)
    launch(ends, active, index, counts)
    return index, counts


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("masked", [False, True], ids=["all active", "masked"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_token_finds_its_sequence(lengths, masked, dtype, implementation, device):
    tokens = sum(lengths)
    ends, active = cu_seqlens(lengths, device, dtype), None
    want = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    if masked:
        active = torch.rand(1, tokens, generator=torch.Generator().manual_seed(0)) < 0.5
        counted = [want[active[0]].eq(b).sum().item() for b in range(len(lengths))]
        active = active.to(device)
    launch = BACKENDS[implementation].locate
    index, counts = located(launch, ends, active, len(lengths), tokens, device)
    assert index.tolist() == want.tolist()
    assert counts.tolist() == (counted if masked else lengths)


@pytest.mark.parametrize(
    "ends",
    [[0, 3, 9], [-4, 2, 6], [2, 3, 4], [0, 4, 2], [5, -1, 7], [9, 9, 9]]
    + [[0, 2**31, 6], [2**31 + 1, 2**31 + 4, 2**40], [0, 3, -(2**31) - 1]],
)
def test_wrong_ends_name_sequences_that_exist(ends, implementation, device):
    """A device cannot be asked about them: every token gets a number, no count goes outside."""
    launch = BACKENDS[implementation].locate
    index, counts = located(launch, torch.tensor(ends, device=device), None, 2, 6, device)
    assert ((index >= 0) & (index < 2)).all() and ((counts >= 0) & (counts <= 6)).all()


def test_tokens_outside_belong_to_the_first_and_last_sequence(implementation, device):
    ends = torch.tensor([2, 3, 4], device=device)
    index, _ = located(BACKENDS[implementation].locate, ends, None, 2, 6, device)
    assert index.tolist() == [0, 0, 0, 1, 1, 1]


def test_blocks_smaller_than_sequences(monkeypatch, device):
    monkeypatch.setattr(reduce, "BLOCK", 16)
    lengths = [15, 16, 17, 0, 33]
    ends = cu_seqlens(lengths, device)
    index, counts = located(BACKENDS["triton"].locate, ends, None, 5, sum(lengths), device)
    assert index.tolist() == torch.arange(5).repeat_interleave(torch.tensor(lengths)).tolist()
    assert counts.tolist() == lengths


def launches_of(monkeypatch, loss_type, names=()):
    """Launches of a packed loss: (forward, backward)."""
    monkeypatch.setattr("grpo_fused.validation.check_cu_seqlens", lambda *args: None)
    batch = make_batch(B=3, T=4, V=17)
    lengths = batch.mask.sum(1).tolist()
    options = options_of(batch, *names)
    for name in ("old_logps", "ref_logps"):
        if name in options:
            (options[name],) = pack(lengths, options[name])
    if "policy_mask" in options:
        options["policy_mask"] = batch.mask.any(1)
    logits, ids, mask = pack(lengths, batch.logits[:, :4], batch.ids, batch.mask != 0)
    ends = cu_seqlens(lengths, "cpu")
    with Counter(monkeypatch) as counter:
        out = grpo_loss(
            *(logits.requires_grad_(True), ids, mask, batch.advantages),
            cu_seqlens=ends,
            max_completion_length=4,
            loss_type=loss_type,
            implementation="triton",
            **options,
        )
        forward = counter.take()
        out.loss.backward()
    return forward, counter.take()


@pytest.mark.parametrize("loss_type", TOKEN_LEVEL)
def test_packed_losses_launch_no_more_than_padded_ones(loss_type, monkeypatch):
    """Forward: mask, sequences, token weights, loss, sums, and the total of a token mean."""
    names = ("old_logps", "ref_logps", "beta")
    forward, backward = launches_of(monkeypatch, loss_type, names)
    assert forward.count("_locate_kernel") == 1
    assert len(forward) <= 6, forward
    assert backward == ["ones_like", "_rescale_kernel"]


@pytest.mark.parametrize("loss_type", TOKEN_LEVEL)
def test_options_of_sequences_take_no_launches_of_their_own(loss_type, monkeypatch):
    plain, _ = launches_of(monkeypatch, loss_type, ("old_logps", "ref_logps", "beta"))
    forward, _ = launches_of(monkeypatch, loss_type, FULL)
    # The total of the entropy bonus and of the token-mean KL; all else is in the token weights.
    assert len(forward) <= len(plain) + 1, forward
