"""The matmuls of a head: their numbers, how they are computed, and how exact their logits are."""

import pytest
import torch
from batches import relative_error
from heads import chunk_bytes, exact, head_gradients, loss_of, make_head_batch
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_fused.head.chunks as linear
import oracle
from grpo_fused import linear_selective_log_softmax

V, H = 53, 16


class Products(TorchDispatchMode):
    """Collects the shapes of what matmuls return."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("mm", "addmm"):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.filterwarnings("error")  # torch warns before it resizes what it is to write into
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5])
def test_few_rows_of_float32_are_transposed(rows, dtype, has_bias, monkeypatch):
    """From two to a quarter of H: the logits of 20 columns at a time, the last time of 13."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(linear, "TRANSPOSED_BYTES", 20 * rows * dtype.itemsize + 1)
    states, weight = torch.randn(rows, H).to(dtype), torch.randn(V, H).to(dtype)
    bias = torch.randn(V).to(dtype) if has_bias else None
    memory = linear.logits_memory(rows, V, dtype, states.device)
    with Products() as products, torch.autocast("cpu", torch.bfloat16):  # not of these products
        linear.project(states, weight, bias, memory)
    transposed = dtype == torch.float32 and rows in (2, 3, 4)
    want = [(20, rows), (20, rows), (13, rows)] if transposed else [(rows, V)]
    assert products.shapes == want
    exact = states.double() @ weight.double().t()
    exact = exact if bias is None else exact + bias.double()
    if rows:
        assert relative_error(memory, exact) < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("has_mkl", [False, True], ids=["other", "mkl"])
def test_more_rows_are_not_transposed(has_mkl, monkeypatch):
    """Nor any without MKL: only MKL is slow at few rows."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    weight = torch.randn(3, 1100)
    for rows, transposed in ((256, has_mkl), (257, False)):
        with Products() as products:
            linear.project(torch.randn(rows, 1100), weight, None, torch.empty(rows, 3))
        assert products.shapes == [(3, rows) if transposed else (rows, 3)]


def test_a_chunk_counts_a_gradient_of_another_dtype():
    """Beside the logits; of theirs it overwrites them. Rows are padded to 8 columns."""
    half, single = torch.bfloat16, torch.float32
    assert linear.logits_bytes(3, 13, half, half) == 3 * 16 * 2
    assert linear.logits_bytes(3, 13, half, single) == 3 * 16 * (4 + 2)


def test_columns_from_the_middle():
    matrix = torch.zeros(2, 6)
    assert linear.of_columns(matrix, slice(2, 4)).shape == (2, 2)
    assert linear.of_columns(matrix, slice(0, 6)) is matrix


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PATHS = {
    "loss": {"loss_type": "dapo"},
    "sequences in a chunk": {"loss_type": "gspo"},
    "sequences over chunks": {"loss_type": "gspo", "chunk_bytes": chunk_bytes(2, 301, 6)},
}


def rounded_head(dtype, device):
    """A head in half precision of an odd vocabulary, whose float64 logits are not rounded."""
    head = make_head_batch(V=301, H=64, dtype=dtype, device=device)
    logits = head.hidden.double() @ head.weight.double().t()
    head.batch.logits = (logits + head.bias.double()).cpu()
    return head


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("path", PATHS)
def test_logits_are_exact_products_of_half_precision(path, dtype, implementation, device):
    """Ten thousand times closer than rounded ones; gradients within what rounding them costs."""
    head, upstream = rounded_head(dtype, device), 2.0**12
    b, options = head.batch, {"chunk_bytes": chunk_bytes(7, 301, 6)} | PATHS[path]
    common = dict(old_logps=b.old_logps, ref_logps=b.ref_logps, beta=0.1, entropy_coef=0.01)
    formula = {k: v for k, v in options.items() if k != "chunk_bytes"}
    truth, want = exact(head, **formula, **common)
    errors = {}
    for logits_dtype in (None, torch.float32, dtype):
        out, leaves = loss_of(
            *(head, implementation),
            **options,
            **common,
            logits_dtype=logits_dtype,
            grad_scale=upstream,
        )
        (out.loss * upstream).backward()
        errors[logits_dtype] = relative_error(out.logps, truth.logps)
        if logits_dtype != dtype:
            assert relative_error(out.entropies, truth.entropies) < 3e-6
            assert out.loss.item() == pytest.approx(truth.loss, rel=2e-5)
            for leaf, gradient in zip(leaves, want, strict=True):
                assert relative_error(leaf.grad / upstream, gradient) < 1e-2
    assert errors[None] == errors[torch.float32] < 1e-6 and errors[dtype] > 1e-5


@pytest.mark.parametrize("save_logits", [False, True], ids=["", "saved"])
def test_log_probabilities_of_exact_logits(save_logits, implementation, device):
    head = rounded_head(torch.bfloat16, device)
    b, leaves, active = head.batch, head.leaves(), head.batch.mask != 0
    truth = oracle.selective_log_softmax(b.logits, b.ids.cpu(), b.mask.cpu(), dlogps=b.mask.cpu())
    options = dict(chunk_bytes=chunk_bytes(5, 301, 6), implementation=implementation)
    for inputs in (leaves, [leaf.detach() for leaf in leaves]):
        logps, entropies = linear_selective_log_softmax(
            *(*inputs[:2], b.ids, b.mask),
            bias=inputs[2],
            compute_entropy=True,
            save_logits=save_logits,
            **options,
        )
        assert relative_error(logps, truth[0]) < 1e-6
        assert relative_error(entropies, truth[1]) < 3e-6
        if logps.requires_grad:
            logps[active].sum().backward()
    for leaf, want in zip(leaves, head_gradients(head, truth[2]), strict=True):
        assert relative_error(leaf.grad, want) < 1e-2


def test_exact_products_cast_the_weight_in_blocks(monkeypatch):
    """No float32 copy of a half-precision weight exists."""
    monkeypatch.setattr(linear, "COPY_BYTES", 20 * H * 4)
    states, weight, bias = (
        torch.randn(7, H).bfloat16(),
        torch.randn(V, H).bfloat16(),
        torch.randn(V),
    )
    out = torch.empty(7, V)
    with Products() as products:
        linear.project_exactly(states, weight, bias, out)
    assert products.shapes == [(7, 20), (7, 20), (7, 13)]
    exact_logits = states.double() @ weight.double().t() + bias.double()
    assert relative_error(out, exact_logits) < 1e-6


def test_kept_float32_logits_are_not_overwritten():
    """Their gradient has memory of its own, so that backward may come twice."""
    head = rounded_head(torch.bfloat16, "cpu")
    leaves = head.leaves()
    logps, _ = linear_selective_log_softmax(
        *(*leaves[:2], head.batch.ids, head.batch.mask), bias=leaves[2], save_logits=True
    )
    loss = logps.sum()
    (first,) = torch.autograd.grad(loss, leaves[1], retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaves[1])
    assert torch.equal(first, second)
