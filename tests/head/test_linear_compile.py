"""The functions over a head under torch.compile: whole graphs, the same numbers; opcheck."""

import pytest
import torch
from compiling import compile_whole
from heads import assert_equal, chunk_bytes, gradients, loss, make_head_batch, scores

import grpo_fused.autograd as autograd
from grpo_fused import Clip


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
@pytest.mark.parametrize("save_logits", [False, True], ids=["again", "saved"])
def test_compiled_equals_eager(save_logits, loss_type, implementation, device):
    head = make_head_batch(device=device)

    def step(hidden, weight, bias):
        total = loss(
            head, hidden * 1.5, weight, bias, loss_type=loss_type, implementation=implementation
        )
        return total + scores(
            head, hidden, weight, bias, save_logits=save_logits, implementation=implementation
        )

    torch._dynamo.reset()
    want = gradients(head, step)
    assert_equal(gradients(head, compile_whole(step)), want, 5e-6)


def op_arguments(name, head):
    b, (hidden, weight, bias) = head.batch, (head.hidden, head.weight, head.bias)
    device, dtype = hidden.device, torch.float32
    active = (b.mask != 0).flatten()
    order = (~active).to(torch.uint8).argsort(stable=True)
    counts = torch.tensor([5, int(active.sum())])
    tokens = [torch.rand(4, 6, device=device) for _ in range(6)]
    one = torch.ones((), device=device)
    scales = (one, one.clone(), 9 * one)
    outputs = [torch.zeros(4, 6, device=device) for _ in range(4)]
    grads = [torch.zeros_like(t, dtype=dtype) for t in (hidden, weight, bias)]
    clip = Clip()
    inputs = (hidden, weight, bias, dtype, order, counts, b.ids)
    return {
        "linear_loss": (
            *(*inputs, tokens[0][:, 0].contiguous(), -tokens[1], -2 * tokens[2], 1 + tokens[3]),
            *(tokens[4] > 0.5, active.sum(), 4 * one, active.sum(), 3 * one, 24 * one, 0.1 * one),
            *(*scales, one.clone(), one.clone(), clip.name(), clip.knobs(), "k3", True),
            *(chunk_bytes(7), torch.zeros(4, 4, 6, device=device), *outputs[:2], *grads),
        ),
        "linear_logprob_fwd": (
            *(*inputs, *scales, chunk_bytes(7), *outputs),
            torch.zeros(int(active.sum()), 56, device=device)[:, :53],
        ),
        "linear_logprob_bwd": (
            *(*inputs, *scales, chunk_bytes(7), -tokens[0], tokens[1], tokens[2], 1 + tokens[3]),
            *(tokens[4], tokens[5], True, None, *grads),
        ),
    }[name]


@pytest.mark.parametrize("name", ["linear_loss", "linear_logprob_fwd", "linear_logprob_bwd"])
def test_opcheck(name, implementation, device):
    head = make_head_batch(device=device)
    head.hidden = head.hidden.nan_to_num()
    op = getattr(autograd.LAUNCHERS[implementation], name).op
    torch.library.opcheck(op, op_arguments(name, head))
