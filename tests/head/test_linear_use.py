"""A head inside of what trainers do: autocast, checkpointing, offload, tied weights, compile."""

import functools

import pytest
import torch
from batches import relative_error
from heads import (
    OPTIONS,
    HeadBatch,
    assert_equal,
    chunk_bytes,
    exact,
    gradients,
    loss,
    loss_of,
    make_head_batch,
    scores,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from grpo_fused import grpo_loss

BOTH = pytest.mark.parametrize("function", [loss, scores])


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


def sequence_loss(*arguments, **options):
    """A loss whose gradient takes a small graph inside of forward."""
    return loss(*arguments, loss_type="luspo", **options)


ALL = pytest.mark.parametrize("function", [loss, sequence_loss, scores])


@ALL
@pytest.mark.parametrize("how", ["whole", "reentrant", "selective"])
def test_gradient_checkpointing(how, function, device):
    """The function runs twice, and no more."""
    head, runs = make_head_batch(device=device), []

    def f(*leaves):
        runs.append(1)
        return function(head, *leaves)

    def again(*leaves):
        if how == "selective":
            policy = functools.partial(create_selective_checkpoint_contexts, prefer_recompute)
            return checkpoint(f, *leaves, use_reentrant=False, context_fn=policy)
        return checkpoint(f, *leaves, use_reentrant=how == "reentrant")

    got = gradients(head, again)
    assert len(runs) == 2
    assert_equal(got, gradients(head, f), 1e-7)


def prefer_recompute(*args, **kwargs):
    return CheckpointPolicy.PREFER_RECOMPUTE


@ALL
def test_offloaded_activations(function, device):
    """What is packed is a handful of tensors, whatever a loss does inside."""
    head, packed = make_head_batch(device=device), []
    f = functools.partial(function, head)

    def pack(tensor):
        packed.append(tensor)
        return tensor.cpu()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.to(device)):
        result = f(*(leaves := head.leaves()))
        result.backward()
    assert len(packed) <= 30
    assert_equal([leaf.grad for leaf in leaves], gradients(head, f), 1e-7)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast(dtype, function, device):
    """Master weights in float32, matmuls in bfloat16: as a linear layer, gradients not rounded.

    Hidden states come as they are: from a norm in float32, or from a layer in bfloat16.
    """
    head = make_head_batch(T=16, V=300, H=32, device=device)
    head.hidden = head.hidden.to(dtype)
    rounded = HeadBatch(head.hidden.bfloat16(), head.weight.bfloat16(), head.bias, head.batch)
    rounded.bias = head.bias.bfloat16()
    f = functools.partial(function, head)
    leaves = head.leaves()
    with torch.autocast(device, torch.bfloat16):
        result = f(*leaves)
    result.backward()
    want = gradients(rounded, f)
    assert [leaf.grad.dtype for leaf in leaves] == [dtype, torch.float32, torch.float32]
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
@pytest.mark.parametrize("upcast", [False, True], ids=["backward", "upcast"])
def test_autocast_leaves_float32_alone(upcast, function, device):
    """Asked for with upcast; or made outside of autocast, in a backward inside of it."""
    head = make_head_batch(B=1, T=4, H=32, mask=torch.ones(1, 4), device=device)
    want = gradients(head, functools.partial(function, head, upcast=upcast))
    leaves = head.leaves()
    with torch.autocast(device, torch.bfloat16, enabled=upcast):
        result = function(head, *leaves, upcast=upcast)
    with torch.autocast(device, torch.bfloat16):
        result.backward()
    assert_equal([leaf.grad for leaf in leaves], want)


@BOTH
def test_upcast_without_a_mask(function, device):
    """Hidden states are then used as they lie, and their gradient written where it belongs."""
    mask = torch.ones(4, 6)
    head = make_head_batch(extra=0, mask=mask, dtype=torch.bfloat16, device=device)
    want = gradients(head, functools.partial(function, head, upcast=True))
    head.batch.mask = None
    assert_equal(gradients(head, functools.partial(function, head, upcast=True)), want, 1e-6)


@BOTH
def test_upcast_converts_the_weight_in_blocks(function, device, monkeypatch):
    import grpo_fused.head.chunks as linear

    monkeypatch.setattr(linear, "COPY_BYTES", 4 * 16 * 10)  # ten rows of the weight
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


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
def test_main_grad_of_a_folded_gradient(loss_type, device):
    head = make_head_batch(device=device)
    f = functools.partial(loss, head, loss_type=loss_type)
    _, want, _ = gradients(head, f, upstream=3.0)
    main_grad = torch.zeros_like(head.weight)
    gradients(head, functools.partial(f, main_grad=main_grad, grad_scale=64.0), upstream=3.0)
    assert relative_error(main_grad, want) < 1e-5


@BOTH
@pytest.mark.parametrize("rows", [7, 1000], ids=["chunks", "one_chunk"])
def test_main_grad_is_not_rounded(rows, function, device):
    """A head in bfloat16, its gradient kept in float32: no bfloat16 in between."""
    head = make_head_batch(dtype=torch.bfloat16, device=device)
    main_grad = torch.zeros(head.weight.shape, device=device)
    f = functools.partial(function, head, main_grad=main_grad, chunk_bytes=chunk_bytes(rows))
    gradients(head, f)
    exact = main_grad[main_grad != 0]
    assert (exact == exact.bfloat16()).float().mean() < 0.5


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


def test_nothing_of_a_policy_without_a_gradient_is_kept(device):
    """Old and reference log-probabilities: under no_grad no graph, and the same numbers."""
    head = make_head_batch(device=device)
    with torch.no_grad():
        old = scores(head, *head.leaves())
    assert not old.requires_grad and torch.equal(old, scores(head, *head.leaves()).detach())
    _, wanted = exact(head, loss_type="dapo", old_logps=head.batch.old_logps)
    assert_equal(gradients(head, functools.partial(loss, head)), wanted, 5e-6)
