"""Logits in any layout: strides between rows, rows that start anywhere, odd vocabularies."""

import pytest
import torch
from batches import relative_error

import grpo_fused.kernels.launch as launch
from grpo_fused import grpo_loss, selective_log_softmax

B, T, V = 2, 6, 45


def contiguous(dtype=torch.float32):
    return torch.randn(B, T, V, dtype=dtype)


def padded(dtype=torch.float32):
    """As a head writes them whose rows are aligned: a stride that is a multiple of 8."""
    return torch.randn(B, T, 48, dtype=dtype)[..., :V]


def positions(dtype=torch.float32):
    return torch.randn(B, T + 1, V, dtype=dtype)[:, :-1]


def wide(dtype=torch.float32):
    """A part of something much larger."""
    return torch.randn(B, T, 64, dtype=dtype)[..., :V]


def transposed(dtype=torch.float32):
    return torch.randn(T, B, V, dtype=dtype).transpose(0, 1)


def every_other(dtype=torch.float32):
    return torch.randn(B, 2 * T, 48, dtype=dtype)[:, ::2, :V]


def shared(dtype=torch.float32):
    return torch.randn(1, T, V, dtype=dtype).expand(B, T, V)


LAYOUTS = (contiguous, padded, positions, wide, transposed, every_other, shared)


def run(function, logits, ids, inplace=False):
    options = {"inplace": inplace, "implementation": "triton"}
    if function == "loss":
        return grpo_loss(logits, ids, None, torch.ones(B), **options).loss
    return selective_log_softmax(logits, ids, implementation="triton")[0].sum()


class Output(torch.autograd.Function):
    """Logits as a model puts them out: no leaf, any strides."""

    @staticmethod
    def forward(ctx, values):
        return values.detach()

    @staticmethod
    def backward(ctx, gradient):
        Output.gradient = gradient
        return gradient


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("function", ["loss", "log-probabilities"])
def test_every_layout_has_the_same_gradient(function, layout, device):
    torch.manual_seed(0)
    values, ids = layout(), torch.randint(V, (B, T), device=device)
    logits = values.to(device).requires_grad_(True)
    run(function, Output.apply(logits), ids).backward()
    got = Output.gradient
    exact = values.double().to(device).requires_grad_(True)
    chosen = exact.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    loss = -chosen.sum(1).div(B * T).sum() if function == "loss" else chosen.sum()
    (want,) = torch.autograd.grad(loss, exact)
    assert relative_error(got, want) < 1e-6
    assert got.is_contiguous()


def test_the_gradient_of_a_leaf_is_not_copied(device):
    """Autograd copies what is neither contiguous nor laid out as a dense leaf."""
    leaf = padded().to(device).requires_grad_(True)
    pointers = []

    def note(gradient):
        pointers.append(gradient.data_ptr())

    leaf.register_hook(note)
    ids = torch.zeros(B, T, dtype=torch.long, device=device)
    grpo_loss(
        leaf, ids, None, torch.ones(B, device=device), implementation="triton"
    ).loss.backward()
    assert pointers == [leaf.grad.data_ptr()]


DTYPES = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
INTERPRETED = 8e-3  # Triton's interpreter truncates float32 to bfloat16


FAST = ((1031, False), (4101, True), (4102, False), (4104, True))


@pytest.mark.parametrize(
    ("V", "inplace"),
    [*FAST, *(pytest.param(V, not other, marks=pytest.mark.slow) for V, other in FAST)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_start_anywhere(dtype, V, inplace, device):
    """Loads are as wide as the worst aligned row allows; nothing beside the rows is touched."""
    tolerance = DTYPES[dtype]
    if launch.INTERPRETED and dtype == torch.bfloat16:
        tolerance = INTERPRETED
    values = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0))
    exact = values.to(dtype).double().requires_grad_(True)
    ids = torch.tensor([[0, V - 1, V // 2], [7, 8, V - 2]])
    chosen = exact.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    (want,) = torch.autograd.grad(chosen.sum(), exact)
    for offset in (0, 1, 2, 4):
        leaf = torch.full((2 * 3 * V + 16,), 7.0, dtype=dtype, device=device)
        leaf[offset : offset + 6 * V] = values.to(dtype).flatten()
        memory = leaf.requires_grad_(True) * 1.0
        logits = memory[offset : offset + 6 * V].view(2, 3, V)
        logps, _ = selective_log_softmax(
            logits, ids.to(device), inplace=inplace, implementation="triton"
        )
        logps.sum().backward()
        assert relative_error(logps, chosen) < 2e-6
        assert relative_error(leaf.grad[offset : offset + 6 * V].view(2, 3, V), want) < tolerance
        outside = torch.cat([memory[:offset], memory[offset + 6 * V :]])
        assert (outside.detach() == 7.0).all()


def test_width_of_loads(device):
    memory = torch.zeros(4096, dtype=torch.bfloat16, device=device)
    for offset, V, want in ((0, 16, 8), (0, 20, 4), (0, 18, 2), (0, 17, 1), (2, 16, 2), (1, 16, 1)):
        rows = memory[offset : offset + 6 * V].view(2, 3, V)
        assert launch.vector_width(rows) == want
    padded = memory[: 6 * 24].view(2, 3, 24)[..., :17]
    assert launch.vector_width(padded) == 8
    assert launch.vector_width(memory[: 6 * 24].view(2, 3, 24).float()) == 4


@pytest.mark.skipif(not launch.INTERPRETED, reason="compute-sanitizer watches a device's accesses")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("V", [45, 1031, 1032])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
def test_nothing_beside_the_rows_is_read_or_written(monkeypatch, inplace, V, dtype):
    """Padding, too, may be the end of the memory: a 32-bit word must not reach past a row."""
    accesses = []

    def watch(name):
        access = getattr(InterpreterBuilder, name)

        def watched(self, pointers, *args):
            mask = args[name == "create_masked_store"]
            accesses.append((pointers.data[mask.data], pointers.get_element_ty()))
            return access(self, pointers, *args)

        monkeypatch.setattr(InterpreterBuilder, name, watched)

    from triton.runtime.interpreter import InterpreterBuilder

    watch("create_masked_load")
    watch("create_masked_store")
    stride, ids = V + 8 - V % 8, torch.tensor([[0, V - 1, V // 2], [7, 8, V - 2]])
    leaf = torch.randn(6 * stride + 16, dtype=dtype, requires_grad=True)
    memory = leaf * 1
    logits = memory[8 : 8 + 6 * stride].view(2, 3, stride)[..., :V]
    exact = logits.detach().double().requires_grad_()
    chosen = exact.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    (want,) = torch.autograd.grad(-chosen.mean(), exact)
    logps, _ = selective_log_softmax(logits.detach(), ids, implementation="triton")
    assert relative_error(logps, chosen) < 2e-6
    run("loss", logits, ids, inplace).backward()
    got = leaf.grad[8 : 8 + 6 * stride].view(2, 3, stride)
    bound = 2e-6 if dtype == torch.float32 else INTERPRETED
    assert relative_error(got[..., :V], want) < bound and not got[..., V:].any()
    for row in ((0, 0), (0, 1), (1, 2)):  # the last column is not the target, is, is beside it
        assert relative_error(got[row][V - 1], want[row][V - 1]) < bound

    size, inside = memory.element_size(), torch.zeros(memory.nbytes, dtype=torch.bool)
    for row in range(6):
        start = size * (8 + row * stride)
        inside[start : start + size * V] = True
    touched = torch.zeros_like(inside)
    for addresses, element in accesses:
        offsets = torch.from_numpy(addresses.astype("int64")) - memory.data_ptr()
        offsets = offsets[(offsets >= 0) & (offsets < len(touched))]
        for byte in range(element.primitive_bitwidth // 8):
            touched[offsets + byte] = True
    assert torch.equal(touched, inside)
