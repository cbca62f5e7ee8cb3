"""What a head costs: matmuls, memory, and rounding, which do not grow with the number of chunks."""

from dataclasses import dataclass

import pytest
import torch
from batches import relative_error
from heads import chunk_bytes, exact, loss_of, make_head_batch
from storages import NewStorages
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import grpo_fused.head.chunks as linear
import grpo_fused.torch_backend.rows as rows
from grpo_fused import Clip, linear_grpo_loss, linear_selective_log_softmax
from grpo_fused.bundles import Chunking, Gradients, Head, Statistics
from grpo_fused.head.chunks import ChunkedHead, chunk_limit, chunk_rows
from grpo_fused.head.order import group_sequences, order_tokens
from grpo_fused.inputs import default_chunk_bytes
from grpo_fused.losses.objectives import Objective
from grpo_fused.sequences import Padded

V, H = 53, 16
ONE = 2 * V * H  # flops of one matmul for one row


def flops(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("wanted", "matmuls"), [("", 1), ("b", 1), ("h", 2), ("w", 2), ("hw", 3), ("hwb", 3)]
)
@pytest.mark.parametrize("size", [100, 7])
@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
def test_matmuls_of_active_rows_alone(loss_type, size, wanted, matmuls):
    head = make_head_batch()
    rows = int(head.batch.mask.sum())
    assert rows < head.batch.mask.numel()
    b, leaves = head.batch, head.leaves(wanted)
    options = {"old_logps": b.old_logps, "ref_logps": b.ref_logps, "beta": 0.1}

    def step():
        out, _ = loss_of(
            head, "torch", leaves, loss_type=loss_type, chunk_bytes=chunk_bytes(size), **options
        )
        if wanted:
            out.loss.backward()

    assert flops(step) == matmuls * rows * ONE


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
@pytest.mark.parametrize("size", [100, 7, 3], ids=["one_chunk", "whole_sequences", "short"])
def test_rows_without_a_gradient_cost_one_matmul(size, loss_type):
    head = make_head_batch()
    lengths = head.batch.mask.sum(1)
    dead = int(lengths[1])  # its advantage is 0
    active = int(lengths.sum())
    assert 0 < dead < active

    def step():
        out, _ = loss_of(
            head,
            "torch",
            loss_type=loss_type,
            chunk_bytes=chunk_bytes(size),
            old_logps=head.batch.old_logps,
            ref_logps=head.batch.ref_logps,  # reported, with a beta of 0 not penalised
        )
        out.loss.backward()

    twice = loss_type == "luspo" and size == 3  # a sequence longer than a chunk: logits twice
    assert flops(step) == (active + (3 if twice else 2) * (active - dead)) * ONE


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_tokens_without_an_advantage_of_their_own(masked, reduction):
    """At token level they cost one matmul even next to one that has an advantage."""
    head = make_head_batch(mask=torch.ones(4, 6))
    b = head.batch
    advantages = torch.zeros(4, 6)
    advantages[0, 1] = advantages[2, 3:5] = 1.0
    hidden, weight, _ = head.leaves()

    def step():
        out = linear_grpo_loss(
            *(hidden, weight, b.ids, b.mask if masked else None, advantages),
            reduction=reduction,
            chunk_bytes=chunk_bytes(7),
        )
        out.loss.sum().backward()

    again = 1 if reduction == "none" else 0  # the upstream gradient is not known: logits twice
    assert flops(step) == (24 + (2 + again) * 3) * ONE


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
def test_rows_that_are_switched_off_cost_one_matmul(loss_type):
    head = make_head_batch(mask=torch.ones(4, 6))
    head.batch.advantages.fill_(1.0)

    def step():
        on = torch.tensor([1, 0, 1, 0])
        out, _ = loss_of(head, "torch", head.leaves(), loss_type=loss_type, policy_mask=on)
        out.loss.backward()

    assert flops(step) == (24 + 2 * 12) * ONE


@dataclass(frozen=True)
class InTorch(Objective):
    """Clip, without an implementation for the kernels."""

    def evaluate(self, logp, log_ratio, advantage):
        return Clip(0.2, 0.28).evaluate(logp, log_ratio, advantage)


@pytest.mark.parametrize("rows", [5, 24])
def test_objectives_in_torch_take_three_matmuls(rows):
    """A token-level loss on log-probabilities: any tokens make a chunk, sequences are cut."""
    found = []
    for objective in (Clip(0.2, 0.28), InTorch()):
        head = make_head_batch()
        leaves, options = head.leaves(), {"ref_logps": head.batch.ref_logps, "beta": 0.1}

        def step(leaves=leaves, options=options, objective=objective, head=head):
            out, _ = loss_of(
                *(head, "torch", leaves),
                objective=objective,
                old_logps=head.batch.old_logps,
                chunk_bytes=chunk_bytes(rows),
                **options,
            )
            out.loss.backward()
            return out

        out = step()
        found.append([out.loss, out.logps, out.sums, *(leaf.grad for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
        counted = flops(step)
    assert counted == 3 * int(head.batch.mask.sum()) * ONE
    for got, want in zip(*found[::-1], strict=True):
        assert relative_error(got, want) < 2e-6


class Packing(TorchDispatchMode):
    """Counts the copies of tokens in another order."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function.overloadpacket.__name__ in ("index_select", "index_copy_")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
@pytest.mark.parametrize("mask", [None, 1.0, 0.0], ids=["no_mask", "all_active", "one_masked"])
def test_nothing_is_packed_where_every_token_counts(mask, loss_type):
    """Short inputs would feel the copies."""
    hidden, weight = torch.randn(2, 4, H, requires_grad=True), torch.randn(V, H)
    ids, advantages = torch.randint(V, (2, 4)), torch.tensor([1.0, -1.0])
    if mask is not None:
        mask = torch.tensor([[1.0, 1.0, 1.0, mask], [1.0, 1.0, 1.0, 1.0]])
    with Packing() as packing:
        out = linear_grpo_loss(hidden, weight, ids, mask, advantages, loss_type=loss_type)
        out.loss.backward()
    assert (packing.calls > 0) == (mask is not None and not mask.all())


def test_whole_sequences_to_a_chunk():
    assert group_sequences([3, 4, 5], 7) == [(0, 2), (2, 3)]
    assert group_sequences([3, 5, 2], 7) == [(0, 1), (1, 3)]
    assert group_sequences([3, 8, 2], 7) is None
    assert group_sequences([0, 7, 0], 7) == [(0, 3)]
    assert group_sequences([], 7) == [(0, 0)]


@pytest.mark.parametrize("vocabulary", [1000, 32_000, 151_936])
def test_default_chunks_on_a_cpu(vocabulary):
    """32 MiB of logits, and never less than 240 rows."""
    for dtype in (torch.float32, torch.bfloat16):
        budget = default_chunk_bytes(torch.device("cpu"), vocabulary, dtype, torch.float32)
        chunking = Chunking(dtype, torch.float32, None, None, budget)
        assert chunk_limit(vocabulary, chunking) >= 240
        assert budget >= 32 << 20


@pytest.mark.parametrize(("save_logits", "matmuls"), [(False, 4), (True, 3)])
def test_saved_logits_spare_a_matmul(save_logits, matmuls):
    head = make_head_batch()
    b = head.batch
    hidden, weight, bias = head.leaves()

    def step():
        logps, _ = linear_selective_log_softmax(
            *(hidden, weight, b.ids, b.mask),
            bias=bias,
            chunk_bytes=chunk_bytes(5),
            save_logits=save_logits,
        )
        logps.sum().backward()

    assert flops(step) == matmuls * int(b.mask.sum()) * ONE


@pytest.mark.parametrize("kind", ["fused", "coupled", "again", "log-probabilities", "no_grad"])
def test_memory_is_a_chunk_of_logits_and_the_gradients(kind, monkeypatch):
    """Every allocation counted: nothing of the size of the logits, nor twice that of a gradient."""
    V, H, T = 4096, 8, 64
    monkeypatch.setattr(rows, "BLOCK_BYTES", 1 << 15)
    head = make_head_batch(T=T, V=V, H=H, mask=torch.ones(4, T), bias=False)
    b, budget = head.batch, chunk_bytes(64, V)
    hidden, weight, _ = head.leaves()
    loss_type = "dapo" if kind == "fused" else "luspo"
    budget = chunk_bytes(16, V) if kind == "again" else budget
    with NewStorages(hidden, weight) as storages, torch.set_grad_enabled(kind != "no_grad"):
        if kind in ("log-probabilities", "no_grad"):
            inputs = (hidden, weight, b.ids, b.mask)
            out = linear_selective_log_softmax(*inputs, chunk_bytes=budget)[0].sum()
        else:
            out = linear_grpo_loss(
                *(hidden, weight, b.ids, b.mask, b.advantages),
                old_logps=b.old_logps,
                loss_type=loss_type,
                chunk_bytes=budget,
                implementation="torch",
            ).loss
        if out.requires_grad:
            torch.autograd.grad(out, (hidden, weight))
    chunks = 2 if kind in ("again", "log-probabilities") else 1  # forward's, then backward's
    gradient = [] if kind == "no_grad" else [weight.nbytes]
    assert storages.larger_than(1 << 16) == sorted([budget] * chunks + gradient)
    assert 4 * budget <= head.batch.ids.numel() * V * 4


def test_memory_of_a_frozen_head(monkeypatch):
    """LoRA on the trunk: neither the gradient of the head nor memory for it."""
    monkeypatch.setattr(rows, "BLOCK_BYTES", 1 << 12)
    head = make_head_batch(V=2048, H=64, bias=False)
    leaves = head.leaves("h")
    with NewStorages(*leaves[:2]) as storages:
        budget = chunk_bytes(4, 2048)
        out, _ = loss_of(head, "torch", leaves, chunk_bytes=budget, loss_type="dapo")
        torch.autograd.grad(out.loss, leaves[0])
    assert storages.larger_than(budget) == []


def test_upcast_makes_no_copy_of_the_weight(monkeypatch):
    """In float32 a few rows of it at a time."""
    monkeypatch.setattr(linear, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 1 << 12)
    head = make_head_batch(V=2048, H=64, bias=False, dtype=torch.bfloat16)
    leaves = head.leaves("h")
    budget = chunk_bytes(4, 2048)
    with NewStorages(*leaves[:2]) as storages:
        out, _ = loss_of(head, "torch", leaves, chunk_bytes=budget, upcast=True)
        torch.autograd.grad(out.loss, leaves[0])
    assert storages.larger_than(budget) == []


@pytest.mark.parametrize("chunks", [1, 16])
def test_rounding_of_the_weights_gradient_is_flat_in_chunks(chunks, implementation, device):
    """Liger adds up chunks in bfloat16: 1.0 % off where one chunk is 0.36 % off."""
    head = make_head_batch(
        *(8, 32, 300, 64), mask=torch.ones(8, 32), dtype=torch.bfloat16, device=device
    )
    options = {"loss_type": "dapo", "old_logps": head.batch.old_logps}
    _, (_, want, _) = exact(head, **options)
    budget = chunk_bytes(256 // chunks, 300, 6)
    out, leaves = loss_of(head, implementation, chunk_bytes=budget, **options)
    out.loss.backward()
    rounding = 5.5e-3 if (implementation, device) == ("triton", "cpu") else 2.6e-3  # it truncates
    assert relative_error(leaves[1].grad, want) < rounding


@pytest.mark.parametrize("limit", [7, 16, 40, 4096, 4186])
def test_chunks_are_even_within_the_limit_and_start_aligned(limit):
    """At multiples of 16 tokens: tensors that start anywhere would compile kernels again."""
    for total in (0, 1, 7, 15, 16, 17, 64, 65, 4200, 8200, 65_536):
        length = chunk_rows(total, limit)
        assert 1 <= length <= max(limit, 1)
        assert length % 16 == 0 or length == max(total, 1) or limit < 16
        fewest = -(-total // max(limit // 16 * 16, 7))
        assert -(-total // length) <= max(fewest, 1)


def test_without_a_mask_nothing_is_counted():
    ids = torch.zeros(2, 3, dtype=torch.long, device="meta")  # who counts here fails
    assert order_tokens(Padded(ids.shape, None, ids.device)) == (None, None)


@pytest.mark.filterwarnings("error")  # torch warns before it resizes what it is to write into
@pytest.mark.parametrize(("loss_type", "size"), [("dapo", 3), ("gspo", 7)])
def test_chunks_of_different_lengths(loss_type, size):
    head = make_head_batch()
    assert int(head.batch.mask.sum()) % size != 0
    leaves = head.leaves("hw")
    options = {"loss_type": loss_type, "chunk_bytes": chunk_bytes(size)}
    loss_of(head, "torch", leaves, **options)[0].loss.backward()
    assert all(leaf.grad is not None for leaf in leaves[:2])


def test_a_batch_of_one_chunk_stays_as_it_is():
    """Neither packed nor sliced: short inputs would feel every copy."""
    hidden, weight = torch.randn(2, 4, H), torch.randn(V, H)
    ids, values = torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 3)
    bundle = Statistics(values, None)

    def chunked(positions=3, order=None, rows=6, **options):
        counts = None if order is None else torch.tensor([len(order)] * 2)
        budget = linear.logits_bytes(rows, V, torch.float32, torch.float32)
        head = Head(hidden[:, :positions].contiguous(), weight, None)
        chunking = Chunking(torch.float32, torch.float32, order, counts, budget)
        return ChunkedHead(head, chunking, ids, Gradients(), **options)

    single = chunked()
    assert single.single_chunk and single.pack(bundle).logps is values
    assert single.pack_outputs(bundle).logps is values
    assert single.slice(bundle, 0, 6) is bundle
    assert single.batch(torch.zeros(6, V)).shape == (2, 3, V)
    others = (chunked(packs=True), chunked(4), chunked(order=torch.arange(5)), chunked(rows=5))
    for other in others:
        packed = other.pack(bundle)
        assert not other.single_chunk and packed.logps.shape == (1, other.active)
        assert packed.entropies is None and other.slice(packed, 2, 4).logps.shape == (1, 2)
