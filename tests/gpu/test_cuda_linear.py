"""What only hardware shows of the functions over a head."""

import warnings

import pytest
import torch
from batches import relative_error
from heads import loss_of, make_head_batch

from grpo_fused import grpo_loss, linear_grpo_loss, linear_selective_log_softmax

pytestmark = pytest.mark.cuda


def real_batch(rows, H, V, dtype=torch.bfloat16):
    torch.manual_seed(V)
    hidden = torch.randn(4, rows // 4, H, device="cuda", dtype=dtype)
    weight = (torch.randn(V, H, device="cuda") * 2.5 * H**-0.5).to(dtype)
    ids = torch.randint(V, (4, rows // 4), device="cuda")
    return hidden, weight, ids, torch.randn(4, device="cuda")


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
@pytest.mark.parametrize("V", [32_000, 50_257, 151_936])
def test_real_vocabularies_in_chunks(V, loss_type):
    """Against the loss over logits; dW, summed over chunks in float32, against one product."""
    hidden, weight, ids, advantages = real_batch(2048, 512, V)
    options = {"loss_type": loss_type, "chunk_bytes": 512 * 2 * V}
    results = []
    for over_logits in (True, False):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        if over_logits:
            logits = leaves[0] @ leaves[1].T
            loss = grpo_loss(logits, ids, None, advantages, loss_type=loss_type).loss
        else:
            loss = linear_grpo_loss(*leaves, ids, None, advantages, **options).loss
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 4e-3


@pytest.mark.parametrize("chunks", [1, 2, 8, 32])
def test_rounding_of_the_weights_gradient_is_flat_in_chunks(chunks):
    hidden, weight, ids, advantages = real_batch(4096, 256, 32_000)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    budget = 4096 // chunks * 2 * 32_000
    linear_grpo_loss(*leaves, ids, None, advantages, chunk_bytes=budget).loss.backward()
    x = (hidden @ weight.T).double()
    p = x.softmax(-1)
    p.scatter_add_(-1, ids[..., None], -torch.ones_like(p[..., :1]))
    dlogits = p * advantages.double()[:, None, None] / ids.numel()
    want = dlogits.flatten(0, 1).T @ hidden.flatten(0, 1).double()
    assert relative_error(leaves[1].grad, want) < 5e-3


def waits(step):
    """How often the host waited for the device."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("loss_type", ["dapo", "luspo", "vespo"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_one_copy_to_the_host_for_the_mask_and_none_without(masked, loss_type):
    head = make_head_batch(device="cuda")
    head.hidden, b = head.hidden.nan_to_num(), head.batch
    if not masked:
        b.mask, b.ids = None, b.ids.clamp(min=0)
        b.old_logps = b.old_logps.nan_to_num()

    def step():
        leaves = head.leaves()
        out, _ = loss_of(head, "triton", leaves, loss_type=loss_type, old_logps=b.old_logps)
        out.loss.backward()
        logps, _ = linear_selective_log_softmax(head.hidden, head.weight, b.ids, b.mask)
        assert logps.is_cuda

    assert waits(step) == (2 if masked else 0)


@pytest.mark.parametrize(("loss_type", "copies"), [("dapo", 0), ("luspo", 1)])
def test_packed_without_a_mask(loss_type, copies):
    """The lengths of sequences whose tokens a loss couples are the one exception."""
    head = make_head_batch(extra=0, mask=torch.ones(4, 6), device="cuda")
    b, leaves = head.batch, head.leaves()
    ends = torch.tensor([0, 6, 12, 18, 24], device="cuda")

    def step():
        out = linear_grpo_loss(
            *(leaves[0].flatten(0, 1), leaves[1], b.ids.flatten(), None, b.advantages),
            loss_type=loss_type,
            cu_seqlens=ends,
        )
        out.loss.backward()

    assert waits(step) == copies


def test_peak_memory():
    """One chunk of logits and a float32 sum above the gradients, of 32 chunks' logits."""
    hidden, weight, ids, advantages = real_batch(8192, 256, 32_000)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    budget = 256 * 2 * 32_000
    for _ in range(2):  # the first step also allocates workspace of cuBLAS, which stays
        leaves[0].grad = leaves[1].grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_grpo_loss(*leaves, ids, None, advantages, chunk_bytes=budget).loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    float32_sum = 4 * weight.numel()
    gradients = hidden.nbytes + weight.nbytes
    assert peak < budget + float32_sum + gradients + (4 << 20)
