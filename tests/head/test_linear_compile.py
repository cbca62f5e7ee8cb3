"""The functions over a head under torch.compile: whole graphs, the same numbers; opcheck."""

import pytest
import torch
from compiling import compile_whole
from heads import assert_equal, chunk_bytes, gradients, loss, make_head_batch, scores

from grpo_fused import Clip
from grpo_fused.bundles import (
    Chunking,
    Derivatives,
    Formula,
    Gradients,
    Head,
    Outputs,
    Scales,
    Statistics,
    Tokens,
)
from grpo_fused.ops import BACKENDS


@pytest.mark.parametrize(
    ("loss_type", "save_logits"),
    [
        ("luspo", True),
        pytest.param("dapo", False, marks=pytest.mark.slow),
        pytest.param("dapo", True, marks=pytest.mark.slow),
        pytest.param("luspo", False, marks=pytest.mark.slow),
    ],
)
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


def op_arguments(name, batch):
    b, head = batch.batch, Head(batch.hidden, batch.weight, batch.bias)
    device, one = head.hidden.device, torch.ones((), device=head.hidden.device)

    def memory(*shape):
        return torch.zeros(shape, device=device)

    active = (b.mask != 0).flatten()
    order = (~active).to(torch.uint8).argsort(stable=True)
    counts = torch.tensor([5, int(active.sum())])
    chunking = Chunking(torch.float32, torch.float32, order, counts, chunk_bytes(7))
    values, clip = torch.rand(4, 6, device=device), Clip()
    weights = (1 + values, one.clone(), 0.1 * one)
    tokens = Tokens(b.ids, None, one, values, -values, -2 * values, *weights)
    scales, inputs = Scales(one.clone(), 9 * one), (head, chunking)
    gradients = Gradients(*(torch.zeros_like(t, dtype=torch.float32) for t in head))
    return {
        "linear_loss": (
            *(
                *inputs,
                tokens,
                scales,
                Formula(clip.name(), clip.params(), "k3", True, one.clone()),
            ),
            *(Outputs(*(memory(4, 6) for _ in range(6))), gradients),
        ),
        "linear_logprob_fwd": (
            *(*inputs, tokens.of_softmax(), scales, Statistics(*(memory(4, 6) for _ in range(4)))),
            *(memory(int(active.sum()), 56)[:, :53], False),
        ),
        "linear_logprob_bwd": (
            *(*inputs, tokens.of_softmax(), scales),
            Statistics(-values, values.clone(), values.clone(), 1 + values),
            *(Derivatives(values.clone(), values.clone()), None, True, gradients),
        ),
    }[name]


@pytest.mark.parametrize("name", ["linear_loss", "linear_logprob_fwd", "linear_logprob_bwd"])
def test_opcheck(name, implementation, device):
    head = make_head_batch(device=device)
    head.hidden = head.hidden.nan_to_num()
    launcher = getattr(BACKENDS[implementation], name)
    arguments = launcher.flatten(*op_arguments(name, head))
    torch.library.opcheck(launcher.op, arguments)
