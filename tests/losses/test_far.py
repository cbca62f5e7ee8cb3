"""Every loss where the policy is far from the one that sampled or the reference: PEERS.md, 20."""

import itertools

import pytest
import torch
from batches import make_batch, relative_error

import oracle
from grpo_fused import LOSSES, grpo_loss
from grpo_fused.losses.kl import KL_ESTIMATORS

FAMILY = pytest.mark.parametrize("loss_type", LOSSES)
OFFSETS = (-1e4, -100.0, -79.0, -30.0, 30.0, 79.0, 100.0, 1e4)


def compare(batch, implementation, tolerance=2e-5, **options):
    """Finite, and what the oracle says, which clamps exponents at +-80 too."""
    inputs = (batch.ids, batch.mask, batch.advantages)
    truth = oracle.grpo_loss(batch.logits, *inputs, **options)
    logits = batch.leaf()
    out = grpo_loss(logits, *inputs, implementation=implementation, **options)
    out.loss.backward()
    assert torch.isfinite(out.loss) and torch.isfinite(logits.grad).all()
    # e^79 in float32 carries the rounding of its argument, 79 * 6e-8.
    assert out.loss.item() == pytest.approx(truth.loss, rel=tolerance, abs=1e-7)
    assert relative_error(logits.grad, truth.dlogits) < tolerance
    for name in out.metrics:  # KL and ratios of e^80 too
        want = pytest.approx(truth.metrics[name], rel=tolerance, abs=1e-7)
        assert out.metrics[name].item() == want, name
    return out, truth


@FAMILY
@pytest.mark.parametrize(
    "offsets", [OFFSETS[::3], pytest.param(OFFSETS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_far_from_the_sampler(offsets, loss_type, implementation, device):
    """One token of every sequence, or all of them, off by as much as log-probabilities can be."""
    offsets = OFFSETS if implementation == "torch" else offsets
    for offset, everywhere in itertools.product(offsets, (True, False)):
        batch = make_batch(B=3, T=4, V=17, seed=8, device=device)
        where = torch.ones_like(batch.mask) if everywhere else torch.arange(4, device=device) == 1
        batch.old_logps = batch.old_logps - offset * where
        compare(batch, implementation, loss_type=loss_type, old_logps=batch.old_logps)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_far_from_the_reference(estimator, implementation, device):
    for offset in OFFSETS if implementation == "torch" else OFFSETS[::3]:
        batch = make_batch(B=3, T=4, V=17, seed=8, device=device)
        options = {"old_logps": batch.old_logps, "ref_logps": batch.ref_logps + offset}
        # Between 30 and 79 the oracle itself loses ratio * k3 to cancellation, in float64.
        for correction in (False, True) if not 30 <= offset < 80 else (False,):
            compare(
                *(batch, implementation),
                beta=0.1,
                kl_estimator=estimator,
                use_bias_correction_kl=correction,
                **options,
            )


@pytest.mark.parametrize(
    "loss_type", [name for name, row in LOSSES.items() if row.objective.needs_advantage]
)
def test_no_advantage_is_nothing_at_any_ratio(loss_type, implementation, device):
    """TRL and Liger make 0 * inf of it."""
    for offset in (-1e4, 100.0, 1e4):
        batch = make_batch(B=3, T=4, V=17, seed=9, device=device)
        batch.advantages.zero_()
        logits = batch.leaf()
        out = grpo_loss(
            *(logits, batch.ids, batch.mask, batch.advantages),
            old_logps=batch.old_logps - offset,
            loss_type=loss_type,
            implementation=implementation,
        )
        out.loss.backward()
        assert out.loss.item() == 0.0 and (logits.grad == 0).all()


@FAMILY
def test_one_hot_logits_and_blocks_of_minus_infinity(loss_type, implementation, device):
    batch = make_batch(B=3, T=4, V=40, seed=10, mask=torch.ones(3, 4), device=device)
    batch.ids.clamp_(max=31)
    batch.logits[0, 0] = 0.0
    batch.logits[0, 0, 7] = 1e4
    batch.ids[0, 0] = 7
    batch.logits[1, :, 32:] = -torch.inf
    batch.logits[2, 1] = 3.0  # uniform
    options = {"loss_type": loss_type, "ref_logps": batch.ref_logps, "beta": 0.1}
    old = oracle.selective_log_softmax(batch.logits, batch.ids, batch.mask)[0].float().to(device)
    compare(batch, implementation, old_logps=old + 0.1, entropy_coef=0.01, **options)


@FAMILY
def test_a_target_at_minus_infinity_stays_in_its_sequence(loss_type, implementation, device):
    """Its own sequence may be infinite (-A logp is); no other row becomes NaN or moves."""
    batch = make_batch(B=3, T=4, V=17, seed=11, extra=0, mask=torch.ones(3, 4), device=device)
    inputs = (batch.ids, batch.mask, batch.advantages)
    options = {"loss_type": loss_type, "implementation": implementation}
    plain = batch.leaf()
    grpo_loss(plain, *inputs, old_logps=batch.old_logps, **options).loss.backward()
    logits = batch.leaf()
    with torch.no_grad():
        logits[2, 3, batch.ids[2, 3]] = -torch.inf
    out = grpo_loss(logits, *inputs, old_logps=batch.old_logps, **options)
    out.loss.backward()
    assert out.logps[2, 3].item() == -torch.inf
    if LOSSES[loss_type].objective.couples != "batch":
        assert torch.equal(logits.grad[:2], plain.grad[:2])
    assert not logits.grad.isnan().any()
