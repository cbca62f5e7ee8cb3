"""What only hardware shows. The rest of the suite also runs there, on the same kernels."""

import pytest
import torch
from batches import make_batch, relative_error

from grpo_fused import LOSSES, Clip, grpo_loss, selective_log_softmax

pytestmark = pytest.mark.cuda
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
# Error of the truth rounded to the dtype, twice over.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def exact(logits, ids, weights, temperature=1.0):
    """(logp, dlogits) of sum(weights * logp) in float64, row by row to spare memory."""
    logps, grads = [], []
    for row, target, weight in zip(
        logits.flatten(0, 1), ids.flatten(), weights.flatten(), strict=True
    ):
        x = row.double().requires_grad_(True)
        logp = torch.log_softmax(x / temperature, -1)[target]
        (grad,) = torch.autograd.grad(logp * weight, x)
        logps.append(logp.detach())
        grads.append(grad)
    return torch.stack(logps).view(ids.shape), torch.stack(grads).view(logits.shape)


@DTYPES
@pytest.mark.parametrize("V", [32_000, 50_257, 128_256, 151_936, 262_144])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_real_vocabularies(V, dtype, inplace):
    torch.manual_seed(V)
    B, T = 3, 64
    logits = (2.5 * torch.randn(B, T, V, device="cuda")).to(dtype)
    ids = torch.randint(0, V, (B, T), device="cuda")
    advantages = torch.randn(B, device="cuda")
    leaf = logits.clone().requires_grad_(True)
    out = grpo_loss(leaf * 1, ids, None, advantages, temperature=0.9, inplace=inplace)
    # Without a loss scale most of the float16 gradient is subnormal: up to 3e-3 of it is rounding.
    scale = 2.0**14 if dtype == torch.float16 else 1.0
    (scale * out.loss).backward()
    weights = -advantages[:, None].expand(B, T).double() / (B * T)
    logps, grad = exact(logits, ids, weights, 0.9)
    assert relative_error(out.logps, logps) < 5e-7
    assert relative_error(leaf.grad.double() / scale, grad) < TOLERANCE[dtype]


def test_triton_is_chosen_without_being_told():
    batch = make_batch(device="cuda")
    arguments = (batch.logits, batch.ids, batch.mask, batch.advantages)
    auto = grpo_loss(*arguments).logps
    assert torch.equal(auto, grpo_loss(*arguments, implementation="triton").logps)


def test_more_than_65535_tokens_in_a_sequence():
    T, V = 70_001, 512
    logits = torch.randn(1, T, V, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, V, (1, T), device="cuda")
    out = grpo_loss(logits, ids, None, torch.ones(1, device="cuda"))
    out.loss.backward()
    want = torch.log_softmax(logits.detach().float(), -1).gather(-1, ids[..., None])[..., 0]
    assert relative_error(out.logps, want) < 1e-6
    assert logits.grad[0, -1].abs().sum() > 0


def test_more_than_two_to_the_31_elements():
    V, T = 151_936, 14_400
    assert T * V > 2**31
    logits = torch.empty(1, T, V, device="cuda", dtype=torch.bfloat16).normal_()
    last = logits[:, -4:].clone()
    ids = torch.randint(0, V, (1, T), device="cuda")
    logits.requires_grad_(True)
    out = grpo_loss(logits * 1, ids, None, torch.ones(1, device="cuda"), inplace=True)
    out.loss.backward()
    weights = torch.full((1, 4), -1.0 / T, device="cuda", dtype=torch.float64)
    logps, grad = exact(last, ids[:, -4:], weights)
    assert relative_error(out.logps[:, -4:], logps) < 1e-6
    assert relative_error(logits.grad[:, -4:], grad) < 4e-3


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("as_tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_no_wait_for_the_device(dtype, as_tensors, implementation):
    """Forward and backward never read a value back."""
    batch = make_batch(device="cuda", dtype=dtype)
    logits = batch.leaf()
    scales = {"beta": 0.1, "temperature": 0.9, "grad_scale": 1.0}
    if as_tensors:
        scales = {name: torch.tensor(value, device="cuda") for name, value in scales.items()}

    def step():
        out = grpo_loss(
            logits * 1,
            batch.ids,
            batch.mask,
            batch.advantages,
            old_logps=batch.old_logps,
            ref_logps=batch.ref_logps,
            compute_entropy=True,
            inplace=True,
            num_items_in_batch=batch.mask.sum(),
            implementation=implementation,
            **scales,
        )
        (out.loss * 0.5).backward()
        logps, _ = selective_log_softmax(
            logits, batch.ids, batch.mask, implementation=implementation
        )
        logps.sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_no_waiting_for_the_device_in_the_family(loss_type, packed):
    """With every option that comes as a tensor, in both reductions."""
    batch = make_batch(B=3, T=4, V=33, extra=0, mask=torch.ones(3, 4), device="cuda")
    inputs = [batch.leaf(), batch.ids, batch.mask]
    tokens = {"old_logps": batch.old_logps, "ref_logps": batch.ref_logps}
    tokens |= {"importance_sampling_ratio": batch.mask + 0.5, "policy_mask": batch.mask}
    if packed:
        inputs = [tensor.flatten(0, 1) for tensor in inputs]
        tokens = {name: tensor.flatten() for name, tensor in tokens.items()}
        tokens["cu_seqlens"] = torch.tensor([0, 4, 8, 12], device="cuda")
    scalars = {"beta": 0.1, "entropy_coef": 0.01, "num_items_in_batch": 12.0}
    scalars = {name: torch.tensor(value, device="cuda") for name, value in scalars.items()}

    def step(reduction):
        out = grpo_loss(
            *(*inputs, batch.advantages),
            loss_type=loss_type,
            reduction=reduction,
            max_completion_length=4,
            use_bias_correction_kl=True,
            **tokens,
            **scalars,
        )
        out.loss.sum().backward(inputs=[inputs[0]])

    for mode in ("default", "error"):  # first what compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            step("sum")
            step("none")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_memory(inplace):
    """In place nothing as large as a row is allocated; fresh, the gradient and no more."""
    V, T = 32_000, 2_048
    logits = torch.randn(1, T, V, device="cuda", dtype=torch.bfloat16, requires_grad=True) * 1
    ids = torch.randint(0, V, (1, T), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = grpo_loss(logits, ids, None, torch.ones(1, device="cuda"), inplace=inplace)
    torch.autograd.grad(out.loss, logits)
    peak = torch.cuda.max_memory_allocated() - before
    gradient = 0 if inplace else 2 * T * V
    assert peak - gradient < 2 << 20


def test_not_the_current_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    batch = make_batch(device="cuda:1")
    assert torch.cuda.current_device() == 0
    out = grpo_loss(batch.logits, batch.ids, batch.mask, batch.advantages)
    assert torch.isfinite(out.loss)


def test_small_and_odd_rows_do_not_read_their_neighbours():
    """Against a copy whose surroundings differ, bit for bit."""
    for V in (1, 7, 2047, 2049, 50_257):
        inner = torch.randn(1, 3, V, device="cuda", dtype=torch.bfloat16)
        results = []
        for surroundings in (0.0, torch.nan):
            memory = torch.full((1, 5, V), surroundings, device="cuda", dtype=torch.bfloat16)
            memory[:, 1:4] = inner
            ids = torch.full((1, 3), V - 1, device="cuda")
            rows = memory[:, 1:4].requires_grad_(True)
            out = grpo_loss(rows, ids, None, torch.ones(1, device="cuda"), objective=Clip())
            (grad,) = torch.autograd.grad(out.loss, rows)
            results.append((out.logps, grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
