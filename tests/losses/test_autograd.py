"""How the gradient reaches the logits: upstream scale, in place, once, from any thread."""

import threading

import pytest
import torch
from batches import make_batch, relative_error

from grpo_fused import grpo_loss, selective_log_softmax
from grpo_fused.ops import BACKENDS


def call(logits, batch, implementation, **options):
    return grpo_loss(
        logits,
        batch.ids,
        batch.mask,
        batch.advantages,
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        beta=0.1,
        compute_entropy=True,
        implementation=implementation,
        **options,
    )


def gradient(batch, implementation, upstream=1.0, **options):
    logits = batch.leaf()
    (call(logits * 1, batch, implementation, **options).loss * upstream).backward()
    return logits.grad


@pytest.mark.parametrize("upstream", [0.0, 1.0, -2.5, 65536.0])
def test_any_upstream_gradient(upstream, implementation, device):
    batch = make_batch(device=device)
    want = upstream * gradient(batch, implementation)
    assert relative_error(gradient(batch, implementation, upstream), want) < 3e-7


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("upstream", [0.125, 4.0])
def test_grad_scale_folds_the_expected_upstream(upstream, as_tensor, implementation, device):
    """The gradient is scaled once, the loss is not, and a wrong guess is put right."""
    batch = make_batch(device=device)
    scale = torch.tensor(0.125, device=device) if as_tensor else 0.125
    for entropy_coef in (0.0, 0.5):
        want = gradient(batch, implementation, entropy_coef=entropy_coef)
        got = gradient(batch, implementation, upstream, grad_scale=scale, entropy_coef=entropy_coef)
        assert relative_error(got, upstream * want) < 3e-7
    plain = call(batch.logits, batch, implementation).loss
    assert torch.equal(call(batch.logits, batch, implementation, grad_scale=scale).loss, plain)


def test_float16_keeps_small_gradients(implementation, device):
    """A token's share of a large batch is below float16's range until the loss scale is applied."""
    scale = 2.0**20
    batch = make_batch(dtype=torch.float16, device=device)
    want = gradient(make_batch_like(batch, torch.float32), implementation)
    for options in ({}, {"grad_scale": scale}):
        got = gradient(batch, implementation, scale, num_items_in_batch=1e6, **options)
        share = batch.mask.sum().item() / 1e6
        assert relative_error(got.float() / (scale * share), want) < 2e-3


def make_batch_like(batch, dtype):
    return type(batch)(**vars(batch) | {"logits": batch.logits.to(dtype)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_in_place_equals_fresh(dtype, upstream, implementation, device):
    batch = make_batch(dtype=dtype, device=device)
    want = gradient(batch, implementation, upstream)
    assert torch.equal(gradient(batch, implementation, upstream, inplace=True), want)


PRODUCERS = {
    "linear": lambda x, w: x @ w,
    "scaled": lambda x, w: (x @ w) * 0.5,
    "cast": lambda x, w: (x @ w).to(torch.bfloat16),
    "slice": lambda x, w: torch.cat([x @ w, x @ w], dim=1)[:, : x.shape[1]],
    "softcap": lambda x, w: 20.0 * torch.tanh((x @ w) / 20.0),
    "view": lambda x, w: (x.flatten(0, 1) @ w).view(*x.shape[:2], -1),
}


@pytest.mark.parametrize("producer", PRODUCERS)
def test_in_place_over_what_models_produce(producer, implementation, device):
    batch = make_batch(extra=0, device=device)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 16, generator=generator).to(device)
    weight = torch.randn(16, 97, generator=generator).to(device)
    results = []
    for inplace in (False, True):
        x, w = (t.clone().requires_grad_(True) for t in (hidden, weight))
        logits = PRODUCERS[producer](x, w)
        loss = call(logits, batch, implementation, inplace=inplace).loss
        loss.backward()
        results.append((loss.detach(), x.grad, w.grad))
    for got, want in zip(results[1], results[0], strict=True):
        assert torch.equal(got, want)


def test_in_place_writes_over_the_logits_and_nowhere_else(implementation, device):
    batch = make_batch(device=device)
    logits = batch.leaf() * 1
    memory = logits.data_ptr()
    (grad,) = torch.autograd.grad(call(logits, batch, implementation, inplace=True).loss, logits)
    assert grad.data_ptr() == memory


def test_in_place_after_a_producer_that_saved_its_output(implementation, device):
    batch = make_batch(device=device)
    logits = torch.exp(batch.leaf())  # exp's backward needs its output
    loss = call(logits, batch, implementation, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_and_another_consumer_of_the_logits(implementation, device):
    """The other consumer saved values that are gone: an error, not garbage (PEERS.md, bug 3)."""
    batch = make_batch(mask=torch.ones(4, 6), extra=0, device=device)
    logits = batch.leaf() * 1
    other = (logits**2).sum()
    loss = call(logits, batch, implementation, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_in_place_refuses_leaves_and_shared_rows(implementation, device):
    batch = make_batch(device=device)
    for function in (
        lambda x: call(x, batch, implementation, inplace=True),
        lambda x: selective_log_softmax(
            x, batch.ids, batch.mask, inplace=True, implementation=implementation
        ),
    ):
        with pytest.raises(ValueError, match="leaf"):
            function(batch.leaf())
        with pytest.raises(ValueError, match="view of one"):
            function(batch.leaf().view_as(batch.logits))
        with pytest.raises(ValueError, match="expanded"):
            function((batch.leaf()[:1] * 1).expand(4, -1, -1))
        B, L, V = batch.logits.shape
        memory = batch.leaf().flatten() * 1
        with pytest.raises(ValueError, match="overlapping"):
            function(memory.as_strided((B, L, V), (L * V, V - 1, 1)))
        with pytest.raises(ValueError, match="overlapping"):
            function(memory.as_strided((B, L, V), ((L - 1) * V, V, 1)))


def test_in_place_log_probabilities(implementation, device):
    batch = make_batch(device=device)
    grads = []
    for inplace in (False, True):
        logits = batch.leaf()
        logps, entropies = selective_log_softmax(
            logits * 1,
            batch.ids,
            batch.mask,
            compute_entropy=True,
            inplace=inplace,
            implementation=implementation,
        )
        (logps * 1.5 - entropies).sum().backward()
        grads.append(logits.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("retain", [False, True])
def test_second_backward_raises_and_says_why(retain, implementation, device):
    batch = make_batch(device=device)
    loss = call(batch.leaf(), batch, implementation).loss
    loss.backward(retain_graph=retain)
    with pytest.raises(RuntimeError, match="second backward through grpo_loss|second time"):
        loss.backward()
    if retain:
        with pytest.raises(RuntimeError, match="one buffer"):
            loss.backward()


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "vespo"])
def test_no_second_derivative(loss_type, implementation, device):
    """create_graph was silently wrong elsewhere (PEERS.md, bug 9): also where the first derivative
    enters a loss beside other terms."""
    batch = make_batch(device=device)
    logits = batch.leaf()
    loss = grpo_loss(
        *(logits, batch.ids, batch.mask, batch.advantages),
        loss_type=loss_type,
        implementation=implementation,
    ).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_only_the_loss_is_differentiable(implementation, device):
    batch = make_batch(device=device)
    out = call(batch.leaf(), batch, implementation)
    assert out.loss.requires_grad
    constants = [out.sums, out.logps, out.entropies, *out.metrics.values()]
    assert not any(tensor.requires_grad for tensor in constants)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradient_only_statistics_run(context, implementation, device, monkeypatch):
    batch = make_batch(device=device)
    want = call(batch.logits, batch, implementation)
    launched = []
    launchers = BACKENDS[implementation]

    class Spy:
        @staticmethod
        def fused_loss(*args):
            launched.append(args[-1].dlogits)
            launchers.fused_loss(*args)

        reduce = staticmethod(launchers.reduce)
        token_weights = staticmethod(getattr(launchers, "token_weights", None))

    monkeypatch.setitem(BACKENDS, implementation, Spy)
    with context():
        got = call(batch.logits, batch, implementation)
    assert launched == [None]
    assert torch.equal(got.loss, want.loss) and torch.equal(got.logps, want.logps)


def test_gradients_of_other_arguments_are_not_pretended(implementation, device):
    batch = make_batch(device=device)
    batch.advantages.requires_grad_(True)
    call(batch.leaf(), batch, implementation).loss.backward()
    assert batch.advantages.grad is None


def test_backward_from_another_thread(implementation, device):
    """Triton's state is per thread (verl#4676)."""
    batch = make_batch(device=device)
    want = gradient(batch, implementation, 2.0)
    logits = batch.leaf()
    loss = call(logits, batch, implementation).loss * 2.0
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert torch.equal(logits.grad, want)


def test_gradient_checkpointing_runs_forward_twice(implementation, device):
    batch = make_batch(device=device)
    want = gradient(batch, implementation)
    logits = batch.leaf()
    torch.utils.checkpoint.checkpoint(
        lambda x: call(x * 1, batch, implementation, inplace=True).loss,
        logits,
        use_reentrant=False,
    ).backward()
    assert torch.equal(logits.grad, want)


def test_autocast(implementation, device):
    """bfloat16 logits of an autocast model: float32 log-probabilities (PEERS.md, bug 21)."""
    batch = make_batch(extra=0, device=device)
    weight = torch.randn(16, 97, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = torch.randn(4, 6, 16, device=device) @ weight
        out = call(logits, batch, implementation, inplace=True)
    out.loss.backward()
    assert logits.dtype == torch.bfloat16
    assert out.logps.dtype == out.loss.dtype == torch.float32
    assert torch.isfinite(weight.grad).all() and weight.grad.norm() > 0
