"""A head inside of what trainers do: autocast, checkpointing, offload, tied weights, compile."""

import functools

import pytest
import torch
from batches import relative_error
from heads import HeadBatch, chunk_bytes, exact, loss_of, make_head_batch
from test_compile import compile_whole, fresh_compiler  # noqa: F401
from torch.utils.checkpoint import checkpoint

import grpo_fused.autograd as autograd
from grpo_fused import Clip, grpo_loss, linear_grpo_loss, linear_selective_log_softmax

OPTIONS = {"chunk_bytes": chunk_bytes(7)}


def gradients(head, function, leaves=None, upstream=1.0):
    """Gradients of the leaves of a function (hidden, weight, bias) -> loss."""
    leaves = leaves or head.leaves()
    (function(*leaves) * upstream).backward()
    return [leaf.grad for leaf in leaves]


def loss(head, hidden, weight, bias, **options):
    b = head.batch
    return linear_grpo_loss(
        *(hidden, weight, b.ids, b.mask, b.advantages),
        bias=bias,
        old_logps=b.old_logps,
        **OPTIONS | options,
    ).loss


def scores(head, hidden, weight, bias, **options):
    """A loss of its own on log-probabilities and entropies."""
    b = head.batch
    logps, entropies = linear_selective_log_softmax(
        *(hidden, weight, b.ids, b.mask), bias=bias, compute_entropy=True, **OPTIONS | options
    )
    return (logps * b.advantages[:, None] - 0.1 * entropies).sum()


BOTH = pytest.mark.parametrize("function", [loss, scores])


def assert_equal(got, want, tolerance=1e-6):
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < tolerance


@BOTH
@pytest.mark.parametrize("upstream", [2.5, -0.3])
def test_another_upstream_gradient(function, upstream, implementation, device):
    head = make_head_batch(device=device)
    f = functools.partial(function, head, implementation=implementation)
    want = gradients(head, f)
    assert_equal(gradients(head, f, upstream=upstream), [upstream * t for t in want])


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
def test_the_expected_upstream_gradient_is_folded_in(loss_type, implementation, device):
    head = make_head_batch(device=device)
    f = functools.partial(loss, head, implementation=implementation, loss_type=loss_type)
    want = gradients(head, f, upstream=64.0)
    scale = torch.tensor(64.0, device=device)
    for grad_scale in (64.0, scale):
        folded = functools.partial(f, grad_scale=grad_scale)
        assert_equal(gradients(head, folded, upstream=64.0), want)


@BOTH
def test_gradient_checkpointing(function, device):
    head = make_head_batch(device=device)
    f = functools.partial(function, head)
    again = functools.partial(checkpoint, f, use_reentrant=False)
    assert_equal(gradients(head, again), gradients(head, f), 1e-7)


@BOTH
def test_offloaded_activations(function, device):
    head = make_head_batch(device=device)
    f = functools.partial(function, head)
    with torch.autograd.graph.save_on_cpu():
        got = gradients(head, f)
    assert_equal(got, gradients(head, f), 1e-7)


@BOTH
def test_autocast(function, device):
    """Master weights in float32, matmuls in bfloat16: as a linear layer, gradients not rounded."""
    head = make_head_batch(T=16, V=300, H=32, device=device)
    rounded = HeadBatch(head.hidden.bfloat16(), head.weight.bfloat16(), head.bias, head.batch)
    rounded.bias = head.bias.bfloat16()
    f = functools.partial(function, head)
    leaves = head.leaves()
    with torch.autocast(device, torch.bfloat16):
        result = f(*leaves)
    result.backward()
    want = gradients(rounded, f)
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 3
    assert_equal([leaf.grad for leaf in leaves], want, 6e-3)
    assert (leaves[1].grad.bfloat16() != leaves[1].grad).any()


@BOTH
def test_upcast_is_a_head_in_float32(function, device):
    head = make_head_batch(T=16, V=300, H=32, dtype=torch.bfloat16, device=device)
    wide = HeadBatch(head.hidden.float(), head.weight.float(), head.bias.float(), head.batch)
    want = gradients(wide, functools.partial(function, wide))
    got = gradients(head, functools.partial(function, head, upcast=True))
    assert [t.dtype for t in got] == [torch.bfloat16] * 3
    assert_equal(got, [t.bfloat16() for t in want], 1e-3)


@BOTH
def test_upcast_converts_the_weight_in_blocks(function, device, monkeypatch):
    import grpo_fused.kernels.linear as linear

    monkeypatch.setattr(linear, "CAST_BYTES", 4 * 16 * 10)  # ten rows of the weight
    head = make_head_batch(dtype=torch.bfloat16, device=device)
    wide = HeadBatch(head.hidden.float(), head.weight.float(), head.bias.float(), head.batch)
    want = gradients(wide, functools.partial(function, wide))
    got = gradients(head, functools.partial(function, head, upcast=True))
    assert_equal(got, [t.bfloat16() for t in want], 1e-3)


@BOTH
def test_main_grad_is_added_to(function, implementation, device):
    head = make_head_batch(device=device)
    f = functools.partial(function, head, implementation=implementation)
    _, want, _ = gradients(head, f, upstream=3.0)
    main_grad = torch.ones_like(head.weight)
    f = functools.partial(f, main_grad=main_grad)
    _, nothing, _ = gradients(head, f, upstream=3.0)
    assert nothing is None and relative_error(main_grad - 1, want) < 1e-5
    gradients(head, f, upstream=3.0)
    assert relative_error(main_grad - 1, 2 * want) < 1e-5


def test_main_grad_waits_for_backward(device):
    """Forward may run twice, or without a backward: it adds nothing."""
    head = make_head_batch(device=device)
    main_grad = torch.zeros_like(head.weight)
    loss(head, *head.leaves(), main_grad=main_grad)
    assert not main_grad.any()


@BOTH
def test_tied_weights(function, device):
    """The embedding of the hidden states is the head: both gradients arrive."""
    head = make_head_batch(device=device)
    ids = head.batch.ids.clamp(min=0)

    def tied(weight, by):
        hidden = torch.nn.functional.pad(weight[ids] * 2.0, (0, 0, 0, 1))
        if by == "linear":
            return function(head, hidden, weight, None)
        return through_logits(function, head, hidden, weight, None)

    results = []
    for by in ("linear", "logits"):
        weight = head.weight.clone().requires_grad_()
        tied(weight, by).backward()
        results.append(weight.grad)
    assert relative_error(*results) < 5e-6


def through_logits(function, head, hidden, weight, bias):
    b, logits = head.batch, torch.nn.functional.linear(hidden, weight, bias)
    if function is loss:
        return grpo_loss(logits, b.ids, b.mask, b.advantages, old_logps=b.old_logps).loss
    x = logits[:, :-1].log_softmax(-1)
    logps = x.gather(-1, b.ids.clamp(min=0)[..., None])[..., 0]
    entropies = -(x.exp() * x).sum(-1)
    terms = logps * b.advantages[:, None] - 0.1 * entropies
    return torch.where(b.mask != 0, terms, 0.0).sum()


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
def test_second_backward_is_refused(loss_type, device):
    head = make_head_batch(device=device)
    value = loss(head, *head.leaves(), loss_type=loss_type)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward through linear_grpo_loss"):
        value.backward()


def test_log_probabilities_may_go_backward_twice(device):
    head = make_head_batch(device=device)
    leaves = head.leaves()
    value = scores(head, *leaves)
    value.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    value.backward()
    assert_equal([leaf.grad for leaf in leaves], [2 * t for t in first])
    with pytest.raises(RuntimeError, match="save_logits"):
        value = scores(head, *head.leaves(), save_logits=True)
        value.backward(retain_graph=True)
        value.backward()


def test_a_weight_that_was_freed_is_an_error(device):
    """FSDP and ZeRO-3 free what they gathered between forward and backward (trl#6372)."""
    head = make_head_batch(device=device)
    leaves = head.leaves()
    value = scores(head, *leaves)
    leaves[1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight's memory was freed"):
        value.backward()


def test_results_are_repeatable(implementation, device):
    head = make_head_batch(device=device)
    runs = [loss_of(head, implementation, **OPTIONS)[0] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][2:], runs[1][2:], strict=True))


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
    inputs = (hidden, weight, bias, order, counts, b.ids)
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


def test_nothing_of_a_policy_without_a_gradient_is_kept(device):
    """Old and reference log-probabilities: under no_grad no graph, and the same numbers."""
    head = make_head_batch(device=device)
    with torch.no_grad():
        old = scores(head, *head.leaves())
    assert not old.requires_grad and torch.equal(old, scores(head, *head.leaves()).detach())
    _, wanted = exact(head, loss_type="dapo", old_logps=head.batch.old_logps)
    assert_equal(gradients(head, functools.partial(loss, head)), wanted, 5e-6)
