"""grpo_loss against GRPOTrainer._compute_loss of TRL 1.16, run in float64."""

from importlib.util import find_spec
from itertools import product

import pytest
import torch
from batches import Batch, assert_gradients_agree, make_batch, relative_error
from peers import (
    KL,
    assert_parity,
    drifted_batch,
    each_cover,
    fused_loss,
    harmless,
    rollout_ratios,
    slow_if_interpreted,
    trl_entropy_mask,
    trl_loss,
    trl_trainer,
)

from grpo_fused import LOSSES, Clip, selective_log_softmax
from grpo_fused.corrections import entropy_quantile_mask, off_policy_mask

pytestmark = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")

CLIP_ROWS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
ROWS = [
    (loss_type, level)
    for loss_type in (*CLIP_ROWS, "cispo", "sapo", "vespo")
    for level in ("token", "sequence")
    if (loss_type, level) != ("vespo", "sequence")
]
# Losses that run different kernels. The interpreter is slow: by default a token-level and a
# sequence-level loss; tests/losses compares the others with the torch implementation.
KERNELS = [
    pytest.param(*row, marks=[] if row[0] == "dapo" else slow_if_interpreted, id="-".join(row))
    for row in ROWS
    if row[0] in ("dapo", "cispo", "sapo", "vespo")
]
each_row = pytest.mark.parametrize("loss_type, level", ROWS, ids=map("-".join, ROWS))
ALL_OPTIONS = {"beta": 0.1, "use_bias_correction_kl": True, "entropy_coef": 0.01}


@pytest.fixture(params=["torch", pytest.param("triton", marks=slow_if_interpreted)])
def implementation(request):
    return request.param


def check(batch, implementation="torch", *, policy_mask=None, trl_only=None, **options):
    """Compare our float32 result with TRL in float64, from the same float32 logits."""
    out, dlogits = fused_loss(batch, implementation, policy_mask=policy_mask, **options)
    assert_parity(out, dlogits, trl_loss(batch, **options, **(trl_only or {})), batch.ids)


@each_cover
@each_row
def test_options_agree(loss_type, level, cover, device):
    """KL, delta, rollout ratio and entropy bonus."""
    batch = drifted_batch(device=device)
    deltas = (None, 2.0) if loss_type in CLIP_ROWS else (None,)
    ratios = (None, *rollout_ratios(batch).values())
    for kl, delta, ratio, entropy_coef in cover(KL, deltas, ratios, (0.0, 0.01)):
        check(
            batch,
            loss_type=loss_type,
            level=level,
            delta=delta,
            importance_sampling_ratio=ratio,
            entropy_coef=entropy_coef,
            **kl,
        )


@pytest.mark.parametrize("loss_type, level", KERNELS)
def test_the_kernels_agree(loss_type, level, device):
    """All options at once."""
    batch = drifted_batch(seed=1, device=device)
    ratio = "(B, T)" if level == "token" else "(B, 1)"
    check(
        batch,
        "triton",
        loss_type=loss_type,
        level=level,
        delta=2.0 if loss_type in CLIP_ROWS else None,
        importance_sampling_ratio=rollout_ratios(batch, seed=1)[ratio],
        **ALL_OPTIONS,
    )


@each_row
def test_advantages_per_token_agree(loss_type, level, device):
    """With (B, T), as in TRL's subclasses, sequence-level clip ratios average tokens too."""
    batch = drifted_batch(seed=2, per_token=True, device=device)
    ratio = rollout_ratios(batch, seed=2)["(B, T)"]
    for kl in KL:
        options = {"loss_type": loss_type, "level": level, "importance_sampling_ratio": ratio, **kl}
        check(batch, **options)


@each_row
def test_on_policy_and_temperature_agree(loss_type, level, device):
    """Without old log-probabilities TRL uses those of the policy, detached."""
    batch = drifted_batch(seed=3, device=device)
    batch.old_logps = None
    check(batch, loss_type=loss_type, level=level, temperature=0.7, **ALL_OPTIONS)


@each_row
def test_policy_masks_agree(loss_type, level, device):
    """The off-policy and the entropy-quantile mask disable the policy term only."""
    batch = drifted_batch(seed=4, device=device)
    plain, _ = fused_loss(batch, loss_type="grpo")
    old_logps, trainer = harmless(batch, batch.old_logps), trl_trainer()[0].GRPOTrainer
    off_policy = trainer.get_off_policy_mask(
        batch.advantages[:, None], plain.logps, old_logps, batch.mask, 0.1
    )
    entropy = trl_entropy_mask(plain.entropies, batch.mask, 0.4)
    for policy_mask, trl_only in (
        (off_policy, {"off_policy_mask_threshold": 0.1}),
        (entropy, {"top_entropy_quantile": 0.4}),
    ):
        kept = policy_mask.expand_as(batch.mask)[batch.mask != 0].double().mean()
        assert 0.2 < kept < 0.9
        options = {"loss_type": loss_type, "level": level, "beta": 0.1}
        check(batch, policy_mask=policy_mask, trl_only=trl_only, **options)


def test_functions_of_policy_masks_agree(device):
    for seed, share, threshold in product(range(4), (0.2, 0.5, 0.8), (0.0, 0.1, 0.4)):
        batch = drifted_batch(seed, device=device)
        plain, _ = fused_loss(batch, loss_type="grpo")
        entropy = trl_entropy_mask(plain.entropies, batch.mask, share)
        assert torch.equal(entropy_quantile_mask(plain.entropies, batch.mask, share=share), entropy)
        tokens = (plain.logps, harmless(batch, batch.old_logps), batch.mask)
        get = trl_trainer()[0].GRPOTrainer.get_off_policy_mask
        keep = off_policy_mask(batch.advantages, *tokens, threshold=threshold)
        assert torch.equal(keep, get(batch.advantages[:, None], *tokens, threshold) != 0)


@each_row
def test_accumulated_micro_batches_agree(loss_type, level, device):
    """With global divisors, our micro-batches add up to what TRL accumulates."""
    batch = drifted_batch(seed=5, device=device)
    options = {
        "loss_type": loss_type,
        "level": level,
        "beta": 0.1,
        "num_items_in_batch": int(batch.mask.sum()),
        "max_completion_length": 9,
    }
    # TRL averages the local means of BNPO over micro-batches; with ours, the caller does.
    divisor = 2 if loss_type == "bnpo" else 1
    for rows in (slice(0, 4), slice(4, 8)):
        part = Batch(*(tensor[rows] for tensor in vars(batch).values()))
        out, dlogits = fused_loss(part, num_sequences_in_batch=8, **options)
        peer = trl_loss(part, accumulation_steps=2, **options)
        out = out._replace(loss=out.loss / divisor)
        assert_parity(out, dlogits / divisor, peer, part.ids)


def test_default_parameters_are_those_of_trl():
    _, defaults = trl_trainer()
    assert LOSSES["grpo"].objective == Clip(defaults["epsilon"], defaults["epsilon"])
    for loss_type in ("sapo", "vespo"):
        for name, value in vars(LOSSES[loss_type].objective).items():
            assert value == defaults[f"{loss_type}_{name}"]


def test_these_batches_reach_every_bound():
    """Agreement on data that no bound touches would prove nothing."""
    for seed, level in product(range(6), ("token", "sequence")):
        batch = drifted_batch(seed=seed)
        options = {"loss_type": "grpo", "level": level}
        free, capped = trl_loss(batch, **options), trl_loss(batch, delta=2.0, **options)
        for side in ("low", "high"):
            assert 0.05 < free.metrics[f"clip_ratio/{side}_mean"] < 0.4
        assert relative_error(capped.dlogits, free.dlogits) > 0.05
        cispo = trl_loss(batch, loss_type="cispo", level=level)
        assert 0.05 < cispo.metrics["clip_ratio/high_mean"] < 0.4


@pytest.mark.parametrize("row", [1, 0], ids=["A=0", "clipped"])
def test_overflowing_ratio(row, implementation, device):
    """TRL: exp(100) is inf in float32 and inf * 0 is NaN, in value (A = 0) or gradient (clipped).

    Ours is right: both terms do not depend on the logits, 0 and -(1 + epsilon_high) A.
    """
    batch = drifted_batch(device=device)
    batch.old_logps[row] -= 100.0
    peer = trl_loss(batch, loss_type="grpo", dtype=torch.float32)
    assert peer.loss.isnan() == (row == 1)
    assert peer.dlogits[row].isnan().any()
    out, dlogits = fused_loss(batch, implementation, loss_type="grpo")
    assert out.loss.isfinite()
    assert (dlogits[row] == 0).all() and dlogits.isfinite().all()
    # In float64 the ratio is finite, and TRL agrees.
    truth = trl_loss(batch, loss_type="grpo")
    assert_gradients_agree(dlogits, truth.dlogits, batch.ids, 2e-6)


def test_overflowing_kl(implementation, device):
    """TRL: k3 of a log-ratio of 100 is inf, its gradient NaN. Ours clamps the exponent at 80."""
    batch = drifted_batch(device=device)
    batch.ref_logps[5, 0] += 100.0
    peer = trl_loss(batch, loss_type="grpo", beta=0.1, dtype=torch.float32)
    assert peer.loss.isinf() and not peer.dlogits[5, 0].isfinite().all()
    out, dlogits = fused_loss(batch, implementation, loss_type="grpo", beta=0.1)
    assert out.loss.isfinite() and dlogits.isfinite().all()
    others = torch.arange(8, device=device) != 5
    assert relative_error(dlogits[others], peer.dlogits[others]) < 2e-6


def test_masked_values_are_never_read(implementation, device):
    """TRL multiplies by the mask: one NaN under it makes the loss NaN. Ours selects."""
    batch = drifted_batch(device=device)
    assert trl_loss(batch, loss_type="grpo", padding=torch.nan).loss.isnan()
    assert batch.old_logps[batch.mask == 0].isnan().all()
    check(batch, implementation, loss_type="grpo")


def test_clip_ratios_after_delta(implementation, device):
    """TRL counts clipped ratios after the cap at delta: none if delta <= 1 + epsilon_high.

    Ours counts every ratio outside of the trust region, whichever bound stops its gradient.
    """
    batch = drifted_batch(device=device)
    peer = trl_loss(batch, loss_type="grpo", delta=1.1)
    out, dlogits = fused_loss(batch, implementation, loss_type="grpo", delta=1.1)
    free = trl_loss(batch, loss_type="grpo")
    assert peer.metrics["clip_ratio/high_mean"] == 0.0
    assert_parity(out, dlogits, peer._replace(metrics=free.metrics), batch.ids)


def test_entropy_bonus_beside_the_quantile_mask(device):
    """TRL's bonus is the mean over the tokens of that mask, ours over all active tokens.

    Both definitions are documented; our policy_mask affects only the policy term.
    """
    batch = drifted_batch(device=device)
    entropies = fused_loss(batch, loss_type="grpo")[0].entropies
    kept = trl_entropy_mask(entropies, batch.mask, 0.4)
    options = {"loss_type": "grpo", "policy_mask": kept}
    plain, _ = fused_loss(batch, **options)
    out, _ = fused_loss(batch, entropy_coef=0.1, **options)
    peer = trl_loss(batch, loss_type="grpo", top_entropy_quantile=0.4, entropy_coef=0.1)
    for loss, tokens in ((out.loss, batch.mask != 0), (peer.loss, kept)):
        want = plain.loss - 0.1 * entropies[tokens].mean()
        assert loss.item() == pytest.approx(want.item(), rel=2e-6)


def test_vespo_has_one_level(device):
    """TRL uses the level of VESPO only for a bias-corrected KL. Ours raises at sequence level."""
    batch = drifted_batch(device=device)
    token, sequence = (
        trl_loss(batch, loss_type="vespo", level=level, beta=0.1) for level in ("token", "sequence")
    )
    assert torch.equal(token.dlogits, sequence.dlogits)
    with pytest.raises(ValueError, match="importance_sampling_level"):
        fused_loss(batch, loss_type="vespo", level="sequence")


def test_vespo_ratio_under_the_mask(device):
    """TRL sums the rollout ratio over padding too, and relies on the 1 that it puts there.

    Ours is right for any padding: test_options_agree has NaN there.
    """
    batch = drifted_batch(device=device)
    ratio = rollout_ratios(batch)["(B, T)"]
    tokens = (batch.advantages[:, None], torch.zeros_like(batch.old_logps), batch.mask)
    get = trl_trainer()[0].GRPOTrainer.get_gamma_weights
    ones, twos = (get(*tokens, harmless(batch, ratio, fill)) for fill in (1.0, 2.0))
    padded = (batch.mask == 0).any(1)
    assert torch.equal(ones[~padded], twos[~padded])
    assert (ones != twos)[padded].all()


def test_divisor_of_a_generation_batch(device):
    """TRL divides num_items_in_batch evenly among the optimizer steps of a generation batch.

    Ours agrees when the caller passes that quotient.
    """
    batch = drifted_batch(device=device)
    items = 2 * int(batch.mask.sum()) + 8
    peer = trl_loss(batch, loss_type="dapo", num_items_in_batch=items, steps_per_generation=2)
    out, dlogits = fused_loss(batch, loss_type="dapo", num_items_in_batch=items / 2)
    assert_parity(out, dlogits, peer, batch.ids)


@pytest.mark.slow
def test_quantile_of_many_tokens(device):
    """TRL: torch.quantile raises for more than 2^24 numbers. Ours: see test_corrections."""
    entropies = torch.zeros(1, 2**24 + 1, device=device)
    with pytest.raises(RuntimeError, match="too large"):
        trl_entropy_mask(entropies, torch.ones_like(entropies, dtype=torch.bool), 0.5)


def test_bfloat16_log_probabilities(implementation, device):
    """Without its kernel, TRL's selective_log_softmax rounds to the dtype of the logits.

    Ours returns float32: the ratio of two rounded values is off by percents.
    """
    from trl.trainer.utils import selective_log_softmax as peer

    batch = make_batch(4, 6, 1024, extra=0, mask=torch.ones(4, 6).long(), dtype=torch.bfloat16)
    truth = batch.logits.double().log_softmax(-1).gather(-1, batch.ids[..., None])[..., 0]
    rounded = peer(batch.logits, batch.ids)
    assert rounded.dtype == torch.bfloat16 and (rounded - truth).abs().max() > 0.01
    logps, _ = selective_log_softmax(
        batch.logits.to(device), batch.ids.to(device), implementation=implementation
    )
    assert (logps.cpu() - truth).abs().max() < 5e-6
