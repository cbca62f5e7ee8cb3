"""grpo_loss against the papers' formulas in float64."""

import itertools

import pytest
import torch
from batches import assert_gradients_agree, make_batch, relative_error

import oracle
from grpo_fused import LOSSES, Clip, grpo_loss

# The float64 truth rounded to bfloat16 is 1.7e-3 away from itself. The interpreter truncates where
# hardware rounds, which doubles it.
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 6e-4}
DTYPES = pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=lambda d: str(d)[6:])


def check(batch, implementation, *, objective=None, tolerance=None, oracle_options=None, **options):
    """Value, gradient, log-probabilities, entropies and metrics against the oracle."""
    named = {} if objective is None else {"objective": type(objective).__name__}
    truth = oracle.grpo_loss(
        batch.logits,
        batch.ids,
        batch.mask,
        batch.advantages,
        knobs=None if objective is None else vars(objective),
        **named,
        **(oracle_options if oracle_options is not None else options),
    )
    logits = batch.leaf()
    out = grpo_loss(
        logits,
        batch.ids,
        batch.mask,
        batch.advantages,
        objective=objective,
        compute_entropy=True,
        implementation=implementation,
        **options,
    )
    out.loss.backward()
    # The loss is a sum of terms of both signs: its error is measured against their size.
    size = out.sums.abs()[0] + out.logps.abs().mean() * (batch.advantages.nan_to_num().abs().mean())
    assert abs(out.loss.item() - truth.loss) < 1e-6 * (size.item() + 1e-3)
    tolerance = tolerance or GRADIENT_TOLERANCE[batch.logits.dtype]
    assert_gradients_agree(logits.grad, truth.dlogits, batch.ids, tolerance)
    assert relative_error(out.logps, truth.logps) < 5e-7
    assert relative_error(out.entropies, truth.entropies) < 2e-6
    assert out.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        assert out.metrics[name].item() == pytest.approx(value, rel=3e-6, abs=1e-7), name
    return truth


def references(batch):
    return {"old_logps": batch.old_logps, "ref_logps": batch.ref_logps}


@DTYPES
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("extra", [0, 1], ids=["T", "T+1"])
def test_every_row_agrees_with_its_paper(loss_type, extra, dtype, implementation, device):
    assert oracle.ROWS.keys() == LOSSES.keys()
    batch = make_batch(dtype=dtype, extra=extra, device=device)
    check(
        batch, implementation, loss_type=loss_type, beta=0.1, temperature=0.8, **references(batch)
    )


@pytest.mark.parametrize("beta", [0.0, 0.04, 2.0])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("per_token", [False, True], ids=["A(B,)", "A(B,T)"])
def test_beta_temperature_advantages(beta, temperature, per_token, implementation, device):
    batch = make_batch(per_token=per_token, seed=1, device=device)
    check(batch, implementation, beta=beta, temperature=temperature, **references(batch))


@pytest.mark.parametrize("delta", [None, 1.1, 1.28, 2.0, 5.0])
def test_dual_clip_also_below_the_upper_bound(delta, implementation, device):
    """Peers let no gradient through for delta < ratio < 1 + epsilon_high (PEERS.md, bug 8)."""
    batch = make_batch(B=8, T=8, seed=2, device=device)
    batch.old_logps -= 0.25 * (batch.advantages < 0)[:, None]
    check(batch, implementation, objective=Clip(0.2, 0.28, delta), **references(batch))


def test_on_policy_ratio_is_one_and_its_gradient_alive(implementation, device):
    batch = make_batch(seed=3, device=device)
    truth = check(batch, implementation)
    assert truth.dlogits.norm() > 0.1
    assert truth.metrics["ratio/max"] == 1.0


def test_same_policy_has_ratio_one_at_every_temperature(implementation, device):
    for temperature in (0.6, 1.0, 1.5):
        batch = make_batch(seed=4, device=device)
        arguments = (batch.logits, batch.ids, batch.mask, batch.advantages)
        options = {"temperature": temperature, "implementation": implementation}
        old_logps = grpo_loss(*arguments, **options).logps
        metrics = grpo_loss(*arguments, old_logps=old_logps, **options).metrics
        assert metrics["ratio/max"].item() == 1.0
        assert metrics["ratio/mean"].item() == pytest.approx(1.0, rel=1e-6)


DIVISORS = {
    "num_items_in_batch": 37,
    "num_sequences_in_batch": 9,
    "max_completion_length": 11,
}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_global_divisors(loss_type, implementation, device):
    """All of them at once, as a trainer passes them: a rule takes the ones it knows."""
    batch = make_batch(seed=5, device=device)
    check(batch, implementation, loss_type=loss_type, **DIVISORS, **references(batch))


def test_divisors_and_scales_as_tensors(implementation, device):
    batch = make_batch(seed=6, device=device)
    numbers = {"num_items_in_batch": 37, "beta": 0.25, "temperature": 0.75}
    tensors = {name: torch.tensor(value, device=device) for name, value in numbers.items()}
    check(
        batch,
        implementation,
        oracle_options=numbers | references(batch),
        **tensors,
        **references(batch),
    )


def test_batches_exercise_both_bounds():
    """The data of this file clip 5 to 40 % of the tokens, on each side some (PEERS.md, bug 24)."""
    metrics = [
        oracle.grpo_loss(
            batch.logits, batch.ids, batch.mask, batch.advantages, old_logps=batch.old_logps
        ).metrics
        for batch in (make_batch(seed=seed) for seed in range(8))
    ]
    for side in ("low", "high"):
        share = sum(m[f"clip_ratio/{side}_mean"] for m in metrics) / len(metrics)
        assert 0.02 < share < 0.2
    region = sum(m["clip_ratio/region_mean"] for m in metrics) / len(metrics)
    assert 0.05 < region < 0.4


@pytest.mark.parametrize("shift", [-3000.0, 3000.0])
def test_logits_shifted_by_thousands(shift, implementation, device):
    """A float32 log-sum-exp of 3000 carries 1e-4 into every probability."""
    plain = make_batch(seed=7, device=device)
    # Shifted values lie on a coarser grid: take the plain ones from that grid.
    plain.logits = (plain.logits + shift) - shift
    shifted = make_batch(seed=7, device=device)
    shifted.logits = plain.logits + shift
    truth = oracle.grpo_loss(plain.logits, plain.ids, plain.mask, plain.advantages)
    logits = shifted.leaf()
    out = grpo_loss(
        logits,
        shifted.ids,
        shifted.mask,
        shifted.advantages,
        compute_entropy=True,
        implementation=implementation,
    )
    out.loss.backward()
    assert (out.logps.cpu() - truth.logps).abs().max() < 2e-6
    assert (out.entropies.cpu() - truth.entropies).abs().max() < 2e-6
    assert_gradients_agree(logits.grad, truth.dlogits, plain.ids, 2e-6)


def test_log_ratios_beyond_eighty_stay_finite(implementation, device):
    batch = make_batch(seed=8, device=device)
    active = batch.mask != 0
    for offset, name in itertools.product((-200.0, 200.0), ("old_logps", "ref_logps")):
        far = make_batch(seed=8, device=device)
        setattr(far, name, torch.where(active, getattr(far, name) + offset, torch.nan))
        truth = check_values(far, implementation)
        assert torch.isfinite(truth.dlogits).all()


def check_values(batch, implementation):
    truth = oracle.grpo_loss(
        batch.logits, batch.ids, batch.mask, batch.advantages, beta=0.1, **references(batch)
    )
    logits = batch.leaf()
    out = grpo_loss(
        logits,
        batch.ids,
        batch.mask,
        batch.advantages,
        beta=0.1,
        implementation=implementation,
        **references(batch),
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(truth.loss, rel=1e-5)
    assert relative_error(logits.grad, truth.dlogits) < 1e-5
    return truth


def test_zero_advantages_give_exactly_zero(implementation, device):
    """Also when the ratio is e^80 and would make 0 * inf of it (PEERS.md, bug 20)."""
    batch = make_batch(seed=9, device=device)
    batch.advantages.zero_()
    logits = batch.leaf()
    out = grpo_loss(
        logits,
        batch.ids,
        batch.mask,
        batch.advantages,
        old_logps=batch.old_logps - 200.0,
        implementation=implementation,
    )
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert (logits.grad == 0).all()


def test_finite_differences(implementation, device):
    """The gradient is that of the value, with no formula between them."""
    batch = make_batch(B=2, T=2, V=5, extra=0, seed=10, device=device)
    batch.mask[:] = 1
    batch = make_batch(B=2, T=2, V=5, extra=0, seed=10, mask=batch.mask.cpu(), device=device)
    options = {"beta": 0.3, "implementation": implementation, **references(batch)}

    def loss(logits):
        return grpo_loss(logits, batch.ids, batch.mask, batch.advantages, **options).loss

    logits = batch.leaf()
    loss(logits).backward()
    step = 1e-2
    numeric = torch.zeros_like(logits)
    for index in range(logits.numel()):
        bump = torch.zeros_like(logits).view(-1)
        bump[index] = step
        bump = bump.view_as(logits)
        with torch.no_grad():
            numeric.view(-1)[index] = (loss(logits + bump) - loss(logits - bump)) / (2 * step)
    assert relative_error(numeric, logits.grad) < 5e-3


def test_small_tensors_of_any_layout(implementation, device):
    """Strided, transposed, of other widths: the same answer (Liger misread them, bug 7)."""
    batch = make_batch(B=4, T=6, per_token=True, seed=11, device=device)

    def spread(tensor):
        """The same values with gaps between them."""
        memory = torch.zeros(*tensor.shape, 3, dtype=tensor.dtype, device=device)
        memory[..., 1] = tensor
        return memory[..., 1]

    def turned(tensor):
        """The same values, column by column in memory."""
        return tensor.t().contiguous().t()

    for change in (spread, turned):
        changed = make_batch(B=4, T=6, per_token=True, seed=11, device=device)
        for name in ("ids", "mask", "advantages", "old_logps", "ref_logps"):
            setattr(changed, name, change(getattr(changed, name)))
        check(changed, implementation, beta=0.1, **references(changed))
    batch.ids = batch.ids.int()
    batch.advantages = batch.advantages.double()
    check(batch, implementation, beta=0.1, **references(batch))


def test_half_precision_log_probabilities_are_widened(implementation, device):
    """They may come in any float dtype; arithmetic and results are float32 (bug 21)."""
    batch = make_batch(seed=12, device=device)
    batch.old_logps = batch.old_logps.bfloat16()
    batch.ref_logps = batch.ref_logps.half()
    check(batch, implementation, beta=0.1, **references(batch))


def test_a_target_at_minus_infinity(implementation, device):
    """On policy its loss is -A and its gradient -A w there; other rows know nothing of it."""
    batch = make_batch(seed=13, extra=0, mask=torch.ones(4, 6), device=device)
    batch.logits[2, 3, batch.ids[2, 3]] = -torch.inf
    truth = oracle.grpo_loss(batch.logits, batch.ids, batch.mask, batch.advantages)
    logits = batch.leaf()
    out = grpo_loss(logits, batch.ids, batch.mask, batch.advantages, implementation=implementation)
    out.loss.backward()
    assert out.logps[2, 3].item() == -torch.inf
    assert torch.isfinite(out.loss) and torch.isfinite(logits.grad).all()
    others = torch.ones(4, 6, dtype=torch.bool)
    others[2, 3] = False
    assert relative_error(logits.grad[others.to(device)], truth.dlogits[others]) < 2e-6
    weight = batch.advantages[2].item() / 24
    assert logits.grad[2, 3, batch.ids[2, 3]].item() == pytest.approx(-weight, rel=1e-6)
