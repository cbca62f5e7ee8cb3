"""What is switched off, or has no weight, may be anything: selected away, never times 0."""

import itertools

import pytest
import torch
from batches import make_batch, relative_error

from grpo_fused import LOSSES, Ipo, RolloutIs, grpo_loss, grpo_loss_from_logps
from grpo_fused.losses.kl import KL_ESTIMATORS

FAMILY = pytest.mark.parametrize("loss_type", LOSSES)


def gradient(batch, **options):
    logits = batch.leaf()
    out = grpo_loss(logits, batch.ids, batch.mask, batch.advantages, **options)
    out.loss.sum().backward()
    return out, logits.grad


@FAMILY
@pytest.mark.parametrize(
    ("reduction", "correction"),
    [("sum", True), ("none", False)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("sum", False), ("none", True))],
)
def test_an_infinite_divergence_without_weight(
    correction, reduction, loss_type, implementation, device
):
    """The KL is reported as what it is, the loss does not know of it; also with beta as a tensor,
    of which nobody knows that it is 0 (TRL makes 0 * inf of it)."""
    batch = make_batch(B=3, T=4, V=17, extra=0, mask=torch.ones(3, 4), device=device)
    options = {"loss_type": loss_type, "reduction": reduction, "implementation": implementation}
    options["old_logps"] = batch.old_logps
    want, plain = gradient(batch, **options)
    batch.ref_logps[1, 2] = -torch.inf
    betas = (0.0, torch.zeros((), device=device))
    estimators = KL_ESTIMATORS if implementation == "torch" else ("k1", "k3")
    for estimator, beta in itertools.product(estimators, betas):
        out, grad = gradient(
            batch,
            ref_logps=batch.ref_logps,
            beta=beta,
            kl_estimator=estimator,
            use_bias_correction_kl=correction,
            **options,
        )
        assert torch.equal(out.loss, want.loss) and torch.equal(grad, plain), estimator
        assert out.metrics["kl"].item() == torch.inf


@FAMILY
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_nan_where_the_policy_term_is_off(reduction, loss_type, implementation, device):
    """In what only that token's policy term reads; the ratio of a sequence reads all its tokens."""
    batch = make_batch(B=3, T=4, V=17, extra=0, per_token=True, device=device)
    off = (torch.arange(4, device=device) == 1) & (batch.mask != 0)
    ratio = torch.full_like(batch.old_logps, 0.8)
    options = {
        "loss_type": loss_type,
        "reduction": reduction,
        "policy_mask": ~off,
        "implementation": implementation,
    }
    spoiled = ["importance_sampling_ratio", "advantages"]
    row = LOSSES[loss_type]
    if row.level == "token" and row.objective.couples != "sequence":
        spoiled.append("old_logps")
    given = {"importance_sampling_ratio": ratio, "old_logps": batch.old_logps}
    want, plain = gradient(batch, **given, **options)
    for name in spoiled:
        corrects = getattr(row.objective, "uses_correction", False)
        if (name, corrects) == ("importance_sampling_ratio", True):
            continue  # it enters the weight of the whole sequence
        if (name, loss_type) == ("advantages", "gmpo"):
            continue  # so does it
        changed = make_batch(B=3, T=4, V=17, extra=0, per_token=True, device=device)
        bad = dict(given)
        if name == "advantages":
            changed.advantages = batch.advantages.masked_fill(off, torch.nan)
        else:
            bad[name] = given[name].masked_fill(off, torch.nan)
        out, grad = gradient(changed, **bad, **options)
        assert torch.equal(out.loss, want.loss), name
        assert torch.equal(grad, plain), name


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_unknown_ratio_that_is_off_is_not_clipped(reduction, implementation, device):
    """All others are 1, and would not be counted either."""
    batch = make_batch(B=2, T=3, V=17, extra=0, mask=torch.ones(2, 3), device=device)
    inputs = (batch.logits, batch.ids, batch.mask, batch.advantages.abs() + 1)
    options = {"reduction": reduction, "implementation": implementation}
    old = grpo_loss(*inputs, **options).logps.clone()
    on = torch.ones_like(old)
    old[0, 1], on[0, 1] = torch.nan, 0.0
    out = grpo_loss(*inputs, old_logps=old, policy_mask=on, **options)
    assert out.loss.isfinite().all() and out.sums[5] == out.sums[6] == 0


@pytest.mark.parametrize("objective", [RolloutIs(), Ipo()], ids=repr)
@pytest.mark.parametrize("from_logps", [False, True])
def test_a_sampler_of_tokens_that_are_off(objective, from_logps, implementation, device):
    """One that is unknown is not clipped, as an unknown ratio; one that is far off is."""
    batch = make_batch(B=2, T=3, V=17, extra=0, mask=torch.ones(2, 3), device=device)
    inputs = (batch.logits, batch.ids, batch.mask, batch.advantages.abs() + 1)
    logps = grpo_loss(*inputs, implementation=implementation).logps.clone()
    sampler, on = logps.clone(), torch.ones_like(logps)
    sampler[0, 1], sampler[1, 2] = torch.nan, 3.0
    on[0, 1] = on[1, 2] = 0.0
    options = {"old_logps": logps, "sampling_logps": sampler, "policy_mask": on}
    options |= {"objective": objective}
    if from_logps:
        out = grpo_loss_from_logps(logps, *inputs[2:], **options)
    else:
        out = grpo_loss(*inputs, implementation=implementation, **options)
    assert out.loss.isfinite() and out.sums[5] + out.sums[6] == 1


def test_half_and_double_precision_weights(implementation, device):
    """Rollout weights and temperatures of any float dtype: arithmetic is float32."""
    batch = make_batch(B=3, T=4, V=17, device=device)
    for loss_type in ("grpo", "gspo", "vespo"):
        results = []
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            out, grad = gradient(
                batch,
                old_logps=batch.old_logps,
                importance_sampling_ratio=torch.full_like(batch.old_logps, 0.75).to(dtype),
                temperature=torch.full_like(batch.old_logps, 1.25).to(dtype),
                loss_type=loss_type,
                implementation=implementation,
            )
            assert out.loss.dtype == out.sums.dtype == torch.float32
            results.append((out.loss, grad))
        for loss, grad in results[1:]:
            assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_nan_logits_are_nan_in_the_loss_at_every_level(implementation, device):
    """On policy too, where the ratio is 1 whatever the logits are."""
    for loss_type in LOSSES:
        batch = make_batch(B=2, T=3, V=11, extra=0, mask=torch.ones(2, 3), device=device)
        batch.logits[0, 1] = torch.nan
        out, grad = gradient(batch, loss_type=loss_type, implementation=implementation)
        assert out.loss.isnan(), loss_type
        assert torch.isfinite(grad[1]).all(), loss_type


def test_wrong_ends_read_nothing_outside(implementation, device, monkeypatch):
    """A device cannot be asked about cu_seqlens: wrong ones are cut to the tokens there are."""
    monkeypatch.setattr("grpo_fused.validation.check_cu_seqlens", lambda *args: None)
    batch = make_batch(B=2, T=3, V=11, extra=0, mask=torch.ones(2, 3), device=device)
    packed = [t.flatten(0, 1) for t in (batch.logits, batch.ids, batch.mask)]

    def loss(ends):
        return grpo_loss(
            *(*packed, batch.advantages),
            cu_seqlens=torch.tensor(ends, device=device),
            loss_type="gspo",
            implementation=implementation,
        ).loss

    for wrong, cut in (([0, 3, 9], [0, 3, 6]), ([0, -5, 6], [0, 0, 6]), ([0, 4, 2], [0, 4, 4])):
        assert torch.isfinite(loss(wrong)) and torch.equal(loss(wrong), loss(cut))


def test_an_unknown_ratio_of_a_token_that_is_off_counts_as_1_in_a_geometric_mean(device):
    batch = make_batch(B=2, T=3, V=7, extra=0, mask=torch.ones(2, 3), device=device)
    batch.advantages[1], off = 1.5, torch.ones(2, 3, device=device)
    off[1, 2] = 0.0
    options = {"loss_type": "gmpo", "policy_mask": off}
    logps = grpo_loss(batch.logits, batch.ids, None, batch.advantages).logps
    results = []
    for value in (logps[1, 2], torch.nan):
        batch.old_logps[1, 2] = value
        results.append(gradient(batch, old_logps=batch.old_logps, **options))
    (want, plain), (out, grad) = results
    assert want.loss.item() == pytest.approx(out.loss.item(), rel=1e-6)
    assert relative_error(grad[off != 0], plain[off != 0]) < 1e-6 and (grad[1, 2] == 0.0).all()


@pytest.mark.parametrize("loss_type", ["vespo", "gmpo", "gspo", "gspo_token", "dapo"])
def test_old_logps_that_are_nan_in_a_sequence_that_is_off(loss_type, device):
    """No gradient, and no NaN: of the policy term, nor of a bias-corrected KL without a weight."""
    batch = make_batch(B=2, T=3, V=7, extra=0, mask=torch.ones(2, 3), device=device)
    batch.old_logps[1] = torch.nan
    logits = batch.leaf()
    loss = grpo_loss(
        *(logits, batch.ids, batch.mask, batch.advantages + 1.0),
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        policy_mask=torch.tensor([1, 0], device=device),
        use_bias_correction_kl=True,
        loss_type=loss_type,
        implementation="torch",
    ).loss
    loss.backward()
    assert loss.isfinite() and logits.grad[0].any() and not logits.grad[1].any()
