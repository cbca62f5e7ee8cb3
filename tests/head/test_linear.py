"""linear_grpo_loss and linear_selective_log_softmax: the same numbers, without the logits."""

import pytest
import torch
from batches import relative_error
from heads import chunk_bytes, exact, head_gradients, loss_of, make_head_batch
from packing import cu_seqlens, pack

import oracle
from grpo_fused import LOSSES, Clip, grpo_loss, linear_grpo_loss, linear_selective_log_softmax

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def wide(loss_type):
    """Options of a row whose own bounds would leave no gradient of these batches to compare."""
    return {"objective": Clip(0.2, 0.28)} if loss_type.startswith("gspo") else {}


def check(out, leaves, truth, gradients, tolerance=TOLERANCE[torch.float32]):
    assert relative_error(out.logps, truth.logps) < 1e-6
    assert relative_error(out.entropies, truth.entropies) < 2e-6
    assert out.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        assert out.metrics[name].item() == pytest.approx(value, rel=5e-6, abs=1e-6), name
    for leaf, want in zip(leaves, gradients, strict=True):
        if leaf is not None:
            assert relative_error(leaf.grad, want) < tolerance


@pytest.mark.parametrize("rows", [100, 7, 3], ids=["one_chunk", "whole_sequences", "short"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss(loss_type, rows, implementation, device):
    """Chunks of 7 rows hold any sequence of 6 tokens, chunks of 3 do not."""
    head = make_head_batch(device=device)
    options = {
        "loss_type": loss_type,
        "old_logps": head.batch.old_logps,
        "ref_logps": head.batch.ref_logps,
        "beta": 0.1,
        "temperature": 0.9,
        "use_bias_correction_kl": loss_type in ("gspo", "dapo"),
    } | wide(loss_type)
    truth, gradients = exact(head, **options)
    out, leaves = loss_of(head, implementation, chunk_bytes=chunk_bytes(rows), **options)
    out.loss.backward()
    check(out, leaves, truth, gradients)
    assert not leaves[0].grad[:, -1].any() and not leaves[0].grad[:, :6][head.batch.mask == 0].any()


@pytest.mark.parametrize("rows", [100, 13], ids=["one_chunk", "two"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_token_has_a_gradient(loss_type, rows, implementation, device):
    """No position too many, no mask, no advantage of 0: nothing is put in order."""
    head = make_head_batch(mask=torch.ones(4, 6), extra=0, device=device)
    head.batch.advantages = torch.tensor([1.0, -0.5, 0.7, -1.2], device=device)
    options = {"loss_type": loss_type, "old_logps": head.batch.old_logps} | wide(loss_type)
    truth, gradients = exact(head, **options)
    out, leaves = loss_of(head, implementation, chunk_bytes=chunk_bytes(rows), **options)
    out.loss.backward()
    check(out, leaves, truth, gradients)


@pytest.mark.parametrize("rows", [100, 7, 1])
@pytest.mark.parametrize("loss_type", ["dapo", "luspo", "vespo", "gmpo", "topr", "m2po"])
def test_without_a_penalty_sequences_without_advantage_take_another_way(
    loss_type, rows, implementation, device
):
    head = make_head_batch(device=device)
    on = torch.tensor([1, 1, 0, 1], device=device)
    options = {"loss_type": loss_type, "old_logps": head.batch.old_logps, "policy_mask": on}
    truth, gradients = exact(head, **options)
    out, leaves = loss_of(head, implementation, chunk_bytes=chunk_bytes(rows), **options)
    out.loss.backward()
    check(out, leaves, truth, gradients)
    assert not leaves[0].grad[1:3].any() and leaves[0].grad[0, 0].any()


def test_tokens_without_gradient_start_within_a_later_chunk(implementation, device):
    """The second chunk of 32 rows is computed in two parts: 8 tokens with a gradient, 24 without.

    Its first part is rounded up to 16 tokens, and must not write over the logits of the rest.
    """
    head = make_head_batch(B=10, T=8, mask=torch.ones(10, 8), extra=0, device=device)
    head.batch.advantages = torch.tensor([0.5, -0.7, 1.0, 0.3, -1.1] + 5 * [0.0], device=device)
    options = {"old_logps": head.batch.old_logps}
    truth, gradients = exact(head, **options)
    out, leaves = loss_of(head, implementation, chunk_bytes=chunk_bytes(32), **options)
    out.loss.backward()
    check(out, leaves, truth, gradients)


@pytest.mark.parametrize("loss_type", ["luspo", "gspo"])
def test_a_sequence_of_one_token_alone_in_a_chunk(loss_type, implementation, device):
    lengths = torch.tensor([6, 6, 1])
    mask = (torch.arange(6) < lengths[:, None]).long()
    head = make_head_batch(B=3, mask=mask, device=device)
    head.batch.advantages = torch.tensor([1.0, -0.5, 0.7], device=device)
    options = {"loss_type": loss_type, "old_logps": head.batch.old_logps} | wide(loss_type)
    truth, gradients = exact(head, **options)
    out, leaves = loss_of(head, implementation, chunk_bytes=chunk_bytes(6), **options)
    out.loss.backward()
    check(out, leaves, truth, gradients)
    assert leaves[0].grad[2, 0].any()


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("loss_type", ["dapo", "luspo", "vespo"])
def test_one_token_with_an_advantage(loss_type, masked, implementation, device):
    """Where the tokens of a sequence are coupled it gives all of them a gradient."""
    head = make_head_batch(mask=torch.ones(4, 6), device=device)
    b = head.batch
    b.advantages = torch.zeros(4, 6, device=device)
    b.advantages[2, 3] = 1.0
    options = {"loss_type": loss_type, "old_logps": b.old_logps, "normalizer": "token-sum"}
    truth, gradients = exact(head, **options)
    b.mask = b.mask if masked else None
    out, leaves = loss_of(head, implementation, chunk_bytes=chunk_bytes(7), **options)
    out.loss.backward()
    check(out, leaves, truth, gradients)
    assert leaves[0].grad[2].any(-1).sum() == (6 if loss_type == "luspo" else 1)


OPTIONS = {
    "softcap": {"logit_softcap": 4.0, "logit_scale": 0.7},
    "bonus": {"entropy_coef": 0.05},
    "ratio": {"importance_sampling_ratio": torch.tensor([0.5, 1.0, 2.0, 0.1])},
    "grpo_kl": {"normalizer": "seq-mean-token-mean", "kl_normalizer": "token-mean"},
    "counts": {"num_items_in_batch": 31},
}


@pytest.mark.parametrize("rows", [100, 7, 3])
@pytest.mark.parametrize("loss_type", ["cispo", "luspo"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, loss_type, rows, device):
    head = make_head_batch(device=device)
    tensors = {"temperature": 0.6 + torch.rand(4, 6), "old_logps": head.batch.old_logps}
    options = OPTIONS[option] | tensors | {"loss_type": loss_type}
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    moved |= {"ref_logps": head.batch.ref_logps, "beta": 1.0}
    truth, gradients = exact(head, **moved)
    out, leaves = loss_of(head, "auto", chunk_bytes=chunk_bytes(rows), **moved)
    out.loss.backward()
    check(out, leaves, truth, gradients)


@pytest.mark.parametrize("rows", [100, 7, 3])
@pytest.mark.parametrize("loss_type", ["grpo", "luspo", "vespo"])
def test_packed(loss_type, rows, implementation, device):
    head = make_head_batch(extra=0, device=device)
    b = head.batch
    lengths = [int((row != 0).nonzero().max()) + 1 for row in b.mask]
    assert sum(lengths) < b.mask.numel()
    options = {"loss_type": loss_type, "old_logps": b.old_logps, "ref_logps": b.ref_logps}
    truth, gradients = exact(head, beta=0.1, **options)
    packed = pack(lengths, head.hidden, b.ids, b.mask, b.old_logps, b.ref_logps)
    hidden, ids, mask, old_logps, ref_logps = packed
    leaves = [hidden.requires_grad_(), *head.leaves()[1:]]
    out = linear_grpo_loss(
        *(leaves[0], leaves[1], ids, mask, b.advantages),
        bias=leaves[2],
        chunk_bytes=chunk_bytes(rows),
        loss_type=loss_type,
        old_logps=old_logps,
        ref_logps=ref_logps,
        beta=0.1,
        max_completion_length=6,
        cu_seqlens=cu_seqlens(lengths, device),
        implementation=implementation,
    )
    out.loss.backward()
    assert out.logps.shape == ids.shape
    wanted = (pack(lengths, gradients[0])[0], *gradients[1:])
    for leaf, want in zip(leaves, wanted, strict=True):
        assert relative_error(leaf.grad, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("loss_type", ["luspo", "vespo"])
def test_ends_before_the_last_token(loss_type, device, monkeypatch):
    """A device is not asked whether cu_seqlens end at N: what comes then is what logits give."""
    monkeypatch.setattr("grpo_fused.validation.check_cu_seqlens", lambda *args: None)
    head = make_head_batch(1, 6, extra=0, mask=torch.ones(1, 6), device=device)
    b = head.batch
    ends = torch.tensor([0, 2, 4], device=device)
    tokens = (b.ids[0], None, torch.tensor([1.0, -0.5], device=device))
    options = {"old_logps": b.old_logps[0], "loss_type": loss_type, "cu_seqlens": ends}
    hidden, weight, bias = head.leaves()
    got = linear_grpo_loss(hidden[0], weight, *tokens, bias=bias, **options)
    want = grpo_loss((hidden @ weight.T + bias)[0], *tokens, **options)
    assert relative_error(got.logps, want.logps) < 1e-6
    assert relative_error(got.loss, want.loss) < 1e-6


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
@pytest.mark.parametrize("wanted", ["", "h", "w", "b", "hw", "hb", "wb"])
def test_only_what_requires_a_gradient_gets_one(wanted, loss_type, device):
    """verl#6913: a Function must not lose, nor compute, the gradient of one of its inputs."""
    head = make_head_batch(device=device)
    options = {"loss_type": loss_type, "old_logps": head.batch.old_logps}
    _, gradients = exact(head, **options)
    out, leaves = loss_of(head, "auto", head.leaves(wanted), chunk_bytes=chunk_bytes(7), **options)
    assert out.loss.requires_grad == bool(wanted)
    if wanted:
        out.loss.backward()
    for name, leaf, want in zip("hwb", leaves, gradients, strict=True):
        if name in wanted:
            assert relative_error(leaf.grad, want) < TOLERANCE[torch.float32]
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("save_logits", [False, True], ids=["again", "saved"])
@pytest.mark.parametrize("rows", [100, 5, 1])
def test_log_probabilities_with_any_upstream_gradient(rows, save_logits, implementation, device):
    head = make_head_batch(device=device)
    b = head.batch
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(2, 4, 6, generator=generator)
    logps, entropies, dlogits = oracle.selective_log_softmax(
        *(b.logits, b.ids.cpu(), b.mask.cpu()),
        dlogps=upstream[0],
        dentropies=upstream[1],
        temperature=0.8,
        logit_softcap=6.0,
    )
    hidden, weight, bias = leaves = head.leaves()
    found = linear_selective_log_softmax(
        *(hidden, weight, b.ids, b.mask),
        bias=bias,
        chunk_bytes=chunk_bytes(rows),
        save_logits=save_logits,
        temperature=0.8,
        logit_softcap=6.0,
        compute_entropy=True,
        implementation=implementation,
    )
    torch.autograd.backward(found, upstream.to(device).unbind())
    assert relative_error(found[0], logps) < 1e-6
    assert relative_error(found[1], entropies) < 2e-6
    gradients = head_gradients(head, dlogits)
    for leaf, want in zip(leaves, gradients, strict=True):
        assert relative_error(leaf.grad, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("N", [0, 1, 6, 7, 8, 20])
def test_any_number_of_rows(N, implementation, device):
    """Of (N, H) hidden states, in chunks of 7, without a mask: the last chunk is not ragged."""
    head = make_head_batch(1, N, extra=0, mask=torch.ones(1, N), device=device)
    hidden, weight, bias = head.leaves()
    arguments = {"bias": bias, "chunk_bytes": chunk_bytes(7), "implementation": implementation}
    logps, entropies = linear_selective_log_softmax(
        hidden[0], weight, head.batch.ids[0], compute_entropy=True, **arguments
    )
    assert logps.shape == entropies.shape == (N,)
    (logps.sum() - 0.3 * entropies.sum()).backward()
    ones = torch.ones(1, N)
    *_, dlogits = oracle.selective_log_softmax(
        head.batch.logits, head.batch.ids.cpu(), dlogps=ones, dentropies=-0.3 * ones
    )
    leaves = (hidden, weight, bias)
    for leaf, want in zip(leaves, head_gradients(head, dlogits), strict=True):
        assert relative_error(leaf.grad, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("loss_type", ["dapo", "luspo", "vespo"])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0)], ids=str)
def test_nothing_active(shape, loss_type, implementation, device):
    B, T = shape
    mask = torch.zeros(B, T, dtype=torch.long)
    head = make_head_batch(B, T, mask=mask, device=device)
    options = {"old_logps": head.batch.old_logps, "loss_type": loss_type}
    out, leaves = loss_of(head, implementation, **options)
    out.loss.backward()
    assert out.loss.item() == 0.0 and not out.logps.any()
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
def test_half_precision(loss_type, dtype, implementation, device):
    """float16 without a grad_scale makes its gradient in backward."""
    head = make_head_batch(T=16, V=300, H=32, dtype=dtype, device=device)
    rows = chunk_bytes(20, 300, 2)
    rounded = head.batch.logits.to(dtype).double()  # as a linear layer of this dtype puts them out
    head.batch.logits = rounded
    options = {"loss_type": loss_type, "old_logps": head.batch.old_logps}
    truth, gradients = exact(head, **options)
    out, leaves = loss_of(head, implementation, chunk_bytes=rows, **options)
    (out.loss * 64.0).backward()
    assert relative_error(out.logps, truth.logps) < 2e-3
    for leaf, want in zip(leaves, gradients, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert relative_error(leaf.grad / 64.0, want) < TOLERANCE[dtype]


def test_strided_hidden_states_and_weights(implementation, device):
    head = make_head_batch(device=device)
    options = {"old_logps": head.batch.old_logps}
    _, gradients = exact(head, loss_type="dapo", **options)
    columns = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in head.leaves()[:2]]
    leaves = [*(t.detach().requires_grad_() for t in columns), head.leaves()[2]]
    assert not any(t.is_contiguous() for t in leaves[:2])
    out, _ = loss_of(head, implementation, leaves, chunk_bytes=chunk_bytes(5), **options)
    out.loss.backward()
    for leaf, want in zip(leaves, gradients, strict=True):
        assert relative_error(leaf.grad, want) < TOLERANCE[torch.float32]


def test_no_more_positions_than_tokens_and_one_more(implementation, device):
    """The same tokens, with and without a position behind them, without a mask: bit for bit."""
    head = make_head_batch(mask=torch.ones(4, 6), bias=False, device=device)
    b, results = head.batch, []
    for hidden in (head.hidden, head.hidden[:, :6]):
        hidden = hidden.detach().clone().requires_grad_()
        out = linear_grpo_loss(
            *(hidden, head.weight, b.ids, None, b.advantages),
            old_logps=b.old_logps,
            chunk_bytes=chunk_bytes(7),
            implementation=implementation,
        )
        out.loss.backward()
        results.append((out.loss, out.logps, hidden.grad[:, :6]))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_values_of_a_single_sequence(loss_type, implementation, device):
    """Expanded over its tokens, one value is a view without a stride."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 5, 8, device=device), torch.randn(7, 8, device=device)
    ids = torch.randint(7, (1, 5), device=device)
    value = torch.tensor([0.7], device=device)
    gradients = []
    for per_token in (False, True):
        values = value[:, None].repeat(1, 5) if per_token else value
        leaf = hidden.clone().requires_grad_()
        options = {
            "loss_type": loss_type,
            "temperature": values,
            "importance_sampling_ratio": values,
        }
        out = linear_grpo_loss(
            leaf, weight, ids, None, value, implementation=implementation, **options
        )
        out.loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)
