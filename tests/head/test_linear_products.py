"""The matmuls of a head: their numbers, and how they are computed."""

import pytest
import torch
from batches import relative_error
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_fused.head.chunks as linear

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


def test_columns_from_the_middle():
    matrix = torch.zeros(2, 6)
    assert linear.of_columns(matrix, slice(2, 4)).shape == (2, 2)
    assert linear.of_columns(matrix, slice(0, 6)) is matrix
