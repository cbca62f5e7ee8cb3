"""Weights of every rule, and sums that add up over micro-batches."""

import pytest
import torch
from batches import make_batch, relative_error

import oracle
from grpo_fused import LOSSES, grpo_loss, token_weights
from grpo_fused.bundles import Outputs
from grpo_fused.losses.metrics import SUMS, means
from grpo_fused.losses.weights import RULES
from grpo_fused.ops import BACKENDS

DIVISORS = {"num_items_in_batch": 37, "num_sequences_in_batch": 9, "max_completion_length": 11}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("given", [[], *[[name] for name in DIVISORS], list(DIVISORS)], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_weights(rule, given, as_tensor):
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]])
    divisors = {name: DIVISORS[name] for name in given}
    want = oracle.token_weights(mask, rule, **divisors)
    if as_tensor:
        divisors = {name: torch.tensor(value) for name, value in divisors.items()}
    got = token_weights(mask, rule, **divisors)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0.0)
    assert (got[mask == 0] == 0).all()


def test_fully_masked_sequences_count():
    """TRL counted only the tokens it kept, but every row divides (PEERS.md, bug 20)."""
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert token_weights(mask, "seq-mean-token-mean").sum().item() == 0.5


@pytest.mark.parametrize("count", [0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
def test_no_items_divide_by_one(count):
    weights = token_weights(torch.zeros(2, 3), "token-mean", num_items_in_batch=count)
    assert (weights == 0).all()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("token-mode",), "normalizer"),
        (("token-mean", {"num_items_in_batch": -1}), "num_items_in_batch"),
        (("seq-mean-token-sum", {"num_sequences_in_batch": 0}), "num_sequences_in_batch"),
        (("token-sum", {"max_completion_length": -2}), "max_completion_length"),
        (("token-mean", {"num_items_in_batch": torch.tensor(-1)}), "num_items_in_batch"),
        (("token-sum", {"num_sequences_in_batch": torch.tensor(0.0)}), "num_sequences_in_batch"),
    ],
)
def test_bad_arguments(arguments, name):
    rule, *divisors = arguments
    with pytest.raises(ValueError, match=name):
        token_weights(torch.ones(2, 3), rule, **(divisors[0] if divisors else {}))
    with pytest.raises(ValueError, match="mask"):
        token_weights(torch.ones(3), "token-mean")


SPLITS = {"one": [8], "two": [3, 5], "four": [1, 4, 2, 1]}
LOCAL = {name for name, row in LOSSES.items() if row.normalizer == "token-mean-local"}
SELECT = {name for name, row in LOSSES.items() if row.objective.couples == "batch"}


@pytest.mark.parametrize("split", [pytest.param("one", marks=pytest.mark.slow), "two", "four"])
@pytest.mark.parametrize("loss_type", sorted(set(LOSSES) - LOCAL - SELECT))
def test_any_cut_into_micro_batches_gives_the_same_gradient(
    loss_type, split, implementation, device
):
    """Given the divisors of the whole batch (ms-swift#10116, trl#5619), and so do the metrics."""
    batch = make_batch(B=8, device=device)
    logits = batch.leaf()
    divisors = {"num_items_in_batch": batch.mask.sum(), "num_sequences_in_batch": 8}
    loss, sums, start = 0.0, 0.0, 0
    for size in SPLITS[split]:
        part = slice(start, start + size)
        start += size
        out = grpo_loss(
            logits[part],
            batch.ids[part],
            batch.mask[part],
            batch.advantages[part],
            old_logps=batch.old_logps[part],
            ref_logps=batch.ref_logps[part],
            beta=0.1,
            loss_type=loss_type,
            compute_entropy=True,
            implementation=implementation,
            **divisors,
        )
        out.loss.backward()
        loss, sums = loss + out.loss.item(), sums + out.sums
    truth = oracle.grpo_loss(
        batch.logits,
        batch.ids,
        batch.mask,
        batch.advantages,
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        beta=0.1,
        loss_type=loss_type,
    )
    assert loss == pytest.approx(truth.loss, rel=1e-5, abs=2e-6)
    assert relative_error(logits.grad, truth.dlogits) < 2e-6
    for name, value in means(sums).items():
        assert value.item() == pytest.approx(truth.metrics[name], rel=1e-5), name


def test_local_mean_is_local():
    assert LOCAL == {"bnpo"}


@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
def test_sums_of_what_is_not_computed_are_zero(loss_type, implementation, device):
    batch = make_batch(device=device)
    arguments = (batch.logits, batch.ids, batch.mask, batch.advantages)
    sums = grpo_loss(*arguments, loss_type=loss_type, implementation=implementation).sums
    assert means(sums)["kl"] == 0.0 and means(sums)["entropy"] == 0.0


def test_kl_is_reported_without_beta(implementation, device):
    batch = make_batch(device=device)
    arguments = (batch.leaf(), batch.ids, batch.mask, batch.advantages)
    out = grpo_loss(*arguments, ref_logps=batch.ref_logps, implementation=implementation)
    truth = oracle.grpo_loss(*arguments, ref_logps=batch.ref_logps)
    assert out.metrics["kl"].item() == pytest.approx(truth.metrics["kl"], rel=1e-6)
    out.loss.backward()
    assert relative_error(arguments[0].grad, truth.dlogits) < 2e-6


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_kl_of_weight_0_or_1(weight, implementation, device):
    """Without weight an infinite one is no loss; a weight of exactly 1 is one like any other."""
    batch = make_batch(device=device)
    arguments = (batch.leaf(), batch.ids, batch.mask, batch.advantages)
    options = {"num_items_in_batch": 1, "kl_estimator": "k2", "beta": weight}
    truth = oracle.grpo_loss(*arguments, **options | {"ref_logps": batch.ref_logps})
    ref_logps = batch.ref_logps if weight else torch.full_like(batch.ref_logps, -torch.inf)
    out = grpo_loss(*arguments, ref_logps=ref_logps, implementation=implementation, **options)
    assert out.loss.item() == pytest.approx(truth.loss, rel=1e-5)
    out.loss.backward()
    assert relative_error(arguments[0].grad, truth.dlogits) < 2e-6


def test_every_term_is_made_for_the_gradient_expected(implementation, device):
    batch = make_batch(device=device)
    arguments = (batch.leaf(), batch.ids, batch.mask, batch.advantages)
    options = {"ref_logps": batch.ref_logps, "beta": 0.1, "entropy_coef": 0.05}
    truth = oracle.grpo_loss(*arguments, **options)
    out = grpo_loss(*arguments, grad_scale=4.0, implementation=implementation, **options)
    assert out.loss.item() == pytest.approx(truth.loss, rel=1e-5)
    (4.0 * out.loss).backward()  # as expected: no rescaling hides what was made
    assert relative_error(arguments[0].grad, 4.0 * truth.dlogits) < 2e-6


def test_metrics_that_were_not_computed_are_absent(implementation, device):
    batch = make_batch(device=device)
    out = grpo_loss(
        batch.logits, batch.ids, batch.mask, batch.advantages, implementation=implementation
    )
    assert "kl" not in out.metrics and "entropy" not in out.metrics and out.entropies is None
    sums = dict(zip(SUMS, out.sums, strict=True))
    assert sums["kl"] == 0 == sums["entropy"]


@pytest.mark.parametrize("share", [0.6, 0.0], ids=["some", "none"])
def test_sums_and_means_of_what_tokens_report(share, implementation, device):
    shape, generator = (3, 700), torch.Generator().manual_seed(0)  # more than a block
    loss, kl, ratio, entropies = torch.rand(4, *shape, generator=generator)
    clipped = torch.randint(-1, 2, shape, generator=generator).float()
    active = torch.rand(shape, generator=generator) < share
    masked = [torch.where(active, t, 0.0).to(device) for t in (loss, kl, clipped, ratio, entropies)]
    results = [torch.full(n, torch.nan, device=device) for n in ((), (8,), (7,))]
    outputs = Outputs(*masked[:4], logps=masked[0], entropies=masked[4])
    BACKENDS[implementation].reduce(outputs, active.to(device), *results)
    low, high = ((masked[2] == side).sum().item() for side in (-1, 1))
    kl, entropy, ratios = (masked[i].double().sum().item() for i in (1, 4, 3))
    count, total = int(active.sum()), masked[0].double().sum().item()
    assert results[0].item() == pytest.approx(total, rel=1e-6)
    assert results[1].tolist() == pytest.approx(
        [total, count, kl, entropy, count, low, high, ratios], rel=1e-6
    )
    means = [value / max(count, 1) for value in (kl, entropy, low, high, low + high, ratios)]
    assert results[2].tolist() == pytest.approx([*means, masked[3].max().item()], rel=1e-6)


def test_values_of_masked_tokens_are_0(implementation, device):
    batch = make_batch(device=device)
    arguments = (batch.logits, batch.ids, batch.mask, batch.advantages)
    out = grpo_loss(*arguments, compute_entropy=True, implementation=implementation)
    masked = batch.mask == 0
    assert masked.any() and (out.logps[masked] == 0).all() and (out.entropies[masked] == 0).all()
    assert (out.logps[~masked] != 0).all() and (out.entropies[~masked] != 0).all()
