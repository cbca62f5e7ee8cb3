"""Where the gradient of logits lies, and how wide the stores are that write it there."""

import pytest
import torch
from batches import relative_error

import grpo_fused.kernels.launch as launch
from grpo_fused import grpo_loss, selective_log_softmax

B, T, V = 2, 6, 45
VECTOR = 8  # columns of bfloat16 in 128 bits


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
# Padded rows are aligned, those of some positions start as far from whole vectors as the logits'.
WIDE_STORES = {contiguous, padded, positions}


def run(function, logits, ids):
    if function == "loss":
        return grpo_loss(logits, ids, None, torch.ones(B), implementation="triton").loss
    return selective_log_softmax(logits, ids, implementation="triton")[0].sum()


@pytest.mark.skipif(not launch.INTERPRETED, reason="looks at launches, makes none")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("function", ["loss", "log-probabilities"])
def test_stores_are_as_wide_as_loads(function, layout, monkeypatch):
    """The launcher's own argument; where V is odd it was 1 for all but contiguous logits."""
    widths = []

    def note(function, programs, *args, traffic=None, **options):
        widths.append(options.get("DLOGITS_VECTOR"))

    monkeypatch.setattr(launch, "launch", note)
    values = layout(torch.bfloat16).requires_grad_(True)
    logits = Output.apply(values)
    assert logits.stride() == values.stride() and not logits.is_leaf
    ids = torch.zeros(B, T, dtype=torch.long)
    run(function, logits, ids).backward()
    widths = [width for width in widths if width is not None]
    assert widths[-1] == (VECTOR if layout in WIDE_STORES else 1)


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
    """Whatever is between the rows; and no more than an eighth of memory is left unused."""
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
    span = 1 + sum((n - 1) * s for n, s in zip(got.shape, got.stride(), strict=True))
    assert span <= 1.125 * got.numel()


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
