"""Selections by covariance and by second moment, and the objectives that make them."""

import math

import pytest
import torch
from oracle_selections import chosen_of
from packing import cu_seqlens, pack

from grpo_fused import (
    Clip,
    ClipCov,
    Fipo,
    Gmpo,
    ImportanceSampling,
    KlCov,
    M2po,
    Topr,
    covariance_mask,
    grpo_loss_from_logps,
    second_moment_mask,
)
from grpo_fused.sequences import Packed, Padded

LENGTHS = (9, 0, 5, 12, 1, 7)
BAND = {"share": 0.2, "low": 0.1, "high": 2.0}


def batch(seed=0, spread=0.3):
    """(logps, old_logps, advantages (B,), mask) of sequences with holes; NaN under the mask."""
    generator = torch.Generator().manual_seed(seed)
    logps = -2.0 * torch.rand(6, 12, generator=generator)
    old = logps - spread * torch.randn(6, 12, generator=generator)
    mask = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    mask &= torch.rand(6, 12, generator=generator) < 0.8
    advantages = torch.randn(6, generator=generator)
    return logps.masked_fill(~mask, math.nan), old.masked_fill(~mask, math.nan), advantages, mask


def dropped_by_the_oracle(name, knobs, logps, old, advantages, mask):
    at = [tuple(index) for index in mask.nonzero().tolist()]
    columns = [logps[i].item() for i in at], [(logps[i] - old[i]).item() for i in at]
    per_token = advantages if advantages.dim() == 2 else advantages[:, None].expand(6, 12)
    dropped = torch.zeros_like(mask)
    for k in chosen_of(name, knobs, *columns, [per_token[i].item() for i in at]):
        dropped[at[k]] = True
    return dropped


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_masks_drop_what_the_papers_say(seed, per_token):
    logps, old, advantages, mask = batch(seed)
    if per_token:
        noise = torch.randn(6, 12, generator=torch.Generator().manual_seed(9))
        advantages = (advantages[:, None] + noise).masked_fill(~mask, math.nan)
    tokens = (logps, old, advantages, mask)
    knobs = BAND | {"epsilon_low": 1.0, "epsilon_high": math.inf}
    want = dropped_by_the_oracle("ClipCov", knobs, *tokens)
    keep = covariance_mask(advantages, logps, mask, **BAND)
    assert torch.equal(keep, ~want) and keep.dtype == torch.bool and 2 < want.sum() < 8
    want = dropped_by_the_oracle("M2po", {"threshold": 0.02}, *tokens)
    keep_small = second_moment_mask(logps, old, mask, threshold=0.02, advantages=advantages)
    assert torch.equal(keep_small, ~want) and want.any()

    at = {"cu_seqlens": cu_seqlens(LENGTHS, "cpu")}
    packed = [t if t.dim() == 1 else pack(LENGTHS, t)[0] for t in (advantages, logps, mask, old)]
    assert torch.equal(covariance_mask(*packed[:3], **BAND, **at), pack(LENGTHS, keep)[0])
    at |= {"threshold": 0.02, "advantages": packed[0]}
    got = second_moment_mask(packed[1], packed[3], packed[2], **at)
    assert torch.equal(got, pack(LENGTHS, keep_small)[0])


def test_second_moments_of_all_tokens():
    """Without advantages; the mean ends at the threshold, and one more token would be above it."""
    logps, old, _, mask = batch(1)
    keep = second_moment_mask(logps, old, mask, threshold=0.03)
    squares = (logps - old).square()
    assert keep[~mask].all() and squares[keep & mask].mean() <= 0.03
    least = squares[~keep].min()
    assert least >= squares[keep & mask].max()
    assert torch.cat([squares[keep & mask], least[None]]).mean() > 0.03
    assert second_moment_mask(logps, old, mask, threshold=100.0).all()
    assert torch.equal(second_moment_mask(logps, old, mask, threshold=1e-12), ~mask)
    exact = second_moment_mask(torch.tensor([[0.5, 0.5]]), torch.zeros(1, 2), threshold=0.25)
    assert exact.all()  # at the threshold


def test_a_generator_draws_from_the_band():
    """As many, reproducibly, and in the end all of them, as uniformly as 400 draws can tell."""
    logps, _, advantages, mask = batch(2)
    candidates = ~covariance_mask(advantages, logps, mask, share=1.0, low=0.1, high=2.0)
    counts, number = torch.zeros(6, 12), int(0.2 * mask.sum())
    assert number < candidates.sum() < mask.sum()
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        dropped = ~covariance_mask(advantages, logps, mask, **BAND, generator=generator)
        assert dropped.sum() == number and not (dropped & ~candidates).any()
        counts += dropped
    again = ~covariance_mask(
        advantages, logps, mask, **BAND, generator=torch.Generator().manual_seed(399)
    )
    assert torch.equal(again, dropped)
    expected = 400 * number / candidates.sum()
    assert ((counts[candidates] - expected).abs() < 5 * expected.sqrt()).all()


def test_shares_and_bounds():
    """At least one token; none outside of the bounds, which are open; the earlier of equal ones."""
    logps = torch.tensor([[-1.0, -3.0, -1.0, -3.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])  # every covariance is 1
    assert covariance_mask(advantages, logps, low=0.5).tolist() == [[False, True, True, True]]
    assert covariance_mask(advantages, logps, share=0.5, low=0.5).tolist() == [
        [False, False, True, True]
    ]
    assert covariance_mask(advantages, logps, share=1.0).all()  # low = 1
    assert covariance_mask(advantages, logps, share=1.0, low=0.0, high=1.0).all()
    assert not covariance_mask(advantages, logps, share=1.0, low=-math.inf, high=math.inf).any()
    nothing = torch.zeros(1, 4)
    assert covariance_mask(advantages, logps, nothing, low=-math.inf, high=math.inf).all()
    assert second_moment_mask(logps, logps - 9.0, nothing).all()
    assert covariance_mask(torch.zeros(0), torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("objective", "plain"), [(ClipCov(0.1, 0.1, 0.2, -0.5, 9.0), Clip(0.1, 0.1)), (M2po(), None)]
)
def test_an_objective_is_its_mask_on_one_batch(objective, plain):
    """With the plain objective and the mask as policy_mask: the same loss and gradient."""
    logps, old, advantages, mask = batch(3)
    if plain is None:
        plain = ImportanceSampling()
        keep = second_moment_mask(logps, old, mask, advantages=advantages)
    else:  # no token that is clipped already is chosen
        ratio = (logps - old).exp()
        gains = advantages[:, None] > 0
        clipped = torch.where(gains, ratio > 1.1, ratio < 0.9) & (advantages[:, None] != 0)
        band = {"share": 1.0, "low": -0.5, "high": 9.0}
        inside = ~covariance_mask(advantages, logps, mask, **band) & ~clipped
        number = int(0.2 * mask.sum())
        assert number < inside.sum()
        centered = [
            torch.where(mask, v, 0.0).double() for v in (logps, advantages[:, None] + 0 * logps)
        ]
        centered = [v - v.sum() / mask.sum() for v in centered]
        values = torch.where(inside, centered[0] * centered[1], -math.inf)
        keep = torch.ones_like(mask)
        keep.view(-1)[values.flatten().topk(number).indices] = False
    results = []
    for options in ({"objective": objective}, {"objective": plain, "policy_mask": keep}):
        leaf = logps.clone().requires_grad_()
        options |= {"old_logps": old, "normalizer": "token-mean"}
        out = grpo_loss_from_logps(leaf, mask, advantages, **options)
        out.loss.backward()
        results.append((out.loss.detach(), leaf.grad))
    torch.testing.assert_close(*results)
    assert (~keep).sum() > 1 and not results[0][1][~keep].any()


def test_without_a_mask_all_tokens_count():
    logps, old, advantages, _ = (t.nan_to_num() for t in batch(5))
    ones = torch.ones_like(logps)
    want = second_moment_mask(logps, old, ones, advantages=advantages)
    assert torch.equal(second_moment_mask(logps, old, advantages=advantages), want)
    assert 0 < (~want).sum() and not second_moment_mask(logps, old, threshold=0.01).all()
    want = covariance_mask(advantages, logps, ones, **BAND)
    assert torch.equal(covariance_mask(advantages, logps, **BAND), want)


@pytest.mark.parametrize("seed", range(4, 8))
def test_tokens_that_are_off_are_not_counted(seed):
    """A policy_mask changes what the others are compared with, as a mask does."""
    logps, old, advantages, mask = batch(seed)
    on = torch.rand(6, 12, generator=torch.Generator().manual_seed(1)) < 0.6
    for objective in (ClipCov(share=0.3, low=-1.0), KlCov(0.3), M2po(0.02)):
        results = []
        for masks in ({"mask": mask & on}, {"mask": mask, "policy_mask": on}):
            leaf = logps.nan_to_num().requires_grad_()
            loss = grpo_loss_from_logps(
                *(leaf, masks.pop("mask"), advantages),
                old_logps=old,
                objective=objective,
                normalizer="token-sum",
                **masks,
            ).loss
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.97])
def test_discounted_sums(decay):
    """Masked tokens are no distance; a NaN stays in its sequence."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    mask = batch()[3]
    values[3, 2] = math.nan
    mask[3, 2] = True
    want = torch.zeros_like(values)
    for b, t in mask.nonzero().tolist():
        later = [k for k in range(t, 12) if mask[b, k]]
        want[b, t] = sum(decay**n * values[b, k].item() for n, k in enumerate(later))
    got = Padded((6, 12), mask).discounted(values, decay)
    torch.testing.assert_close(got[mask], want[mask], equal_nan=True)
    assert got[mask].isnan().sum() == mask[3, :3].sum()
    ends, rows = cu_seqlens(LENGTHS, "cpu"), pack(LENGTHS, values, mask)
    packed = Packed((1, len(rows[0])), rows[1][None], ends).discounted(rows[0][None], decay)[0]
    torch.testing.assert_close(packed[rows[1]], pack(LENGTHS, want)[0][rows[1]], equal_nan=True)


def evaluate(objective, log_ratio, advantage):
    """(loss, clipped) of one sequence whose log-probabilities are -0.5."""
    log_ratio = torch.tensor([log_ratio], dtype=torch.float64)
    advantage = torch.tensor([advantage], dtype=torch.float64).expand_as(log_ratio)
    logp = torch.full_like(log_ratio, -0.5)
    return objective.evaluate(logp, log_ratio, advantage, None, Padded(logp.shape, None, "cpu"))


@pytest.mark.parametrize(
    ("advantage", "mean", "clipped"),
    [(1.0, -0.2, [0, 1, 0]), (-1.0, 0.2, [-1, 0, 0]), (0.0, 0.2, [0, 0, 0])],
)
def test_gmpo_stops_tokens_on_one_side(advantage, mean, clipped):
    """Those that the advantage pushes on, of (-1, 1, 0) with a bound of 0.4."""
    loss, stopped = evaluate(Gmpo(), [-1.0, 1.0, 0.0], [advantage] * 3)
    assert loss[0].tolist() == pytest.approx([-advantage * math.exp(mean)] * 3)
    assert stopped[0].tolist() == clipped


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "weight"),
    [
        ([0.5, -1.0], [2.0, 2.0], 1.0),
        ([0.5, 1.0], [2.0, 2.0], 1.0),
        ([0.5, -1.0], [-2.0, -2.0], math.exp(-0.5)),
        ([0.5, 1.0], [-2.0, -2.0], 1.0),
        ([-90.0, -10.0], [-2.0, -2.0], math.exp(-80.0)),
        ([-70.0, -5.0], [-2.0, -2.0], math.exp(-75.0)),
    ],
)
def test_topr_tapers_the_ratio_of_the_trajectory(log_ratio, advantage, weight):
    loss, clipped = evaluate(Topr(), log_ratio, advantage)
    want = torch.tensor([advantage], dtype=torch.float64) * 0.5 * weight
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0.0)
    assert not clipped.any()


def test_topr_of_both_signs_and_none():
    loss, _ = evaluate(Topr(), [-1.0, -1.0, 0.0], [1.0, -1.0, 0.0])
    assert loss[0].tolist() == pytest.approx([0.5, -0.5 * math.exp(-2.0), 0.0])


WIDE = {"epsilon_low": 1.0, "epsilon_high": 5.0, "min_weight": 0.5, "max_weight": 2.0}
FAR = math.log(20.0)
FUTURES = [  # log-ratios, advantages, half-life, the factors of the advantages
    ([0.2, -0.4, 0.6], [1.0] * 3, 1.0, [math.exp(x) for x in (0.15, -0.1, 0.6)]),
    ([0.2, -0.4, 0.6], [1.0] * 3, None, [math.exp(x) for x in (0.4, 0.2, 0.6)]),
    ([0.2, -0.4, 0.6], [-1.0] * 3, 1.0, [math.exp(x) for x in (0.15, -0.1, 0.6)]),
    ([0.1, FAR, 0.2], [-1.0] * 3, 1.0, [math.exp(0.15), 1.0, math.exp(0.2)]),
    ([0.1, FAR, 0.2], [1.0] * 3, 1.0, [2.0, 2.0, math.exp(0.2)]),
    ([0.1, 0.3 * FAR, 0.2], [-1.0] * 3, 1.0, [math.exp(0.15 + 0.15 * FAR), 2.0, math.exp(0.2)]),
    ([0.1, FAR, 0.2], [1.0, 0.0, 1.0], 1.0, [2.0, 1.0, math.exp(0.2)]),
    ([0.1, 200.0, 0.2], [-1.0] * 3, 1.0, [math.exp(0.15), 1.0, math.exp(0.2)]),
    ([0.1, 200.0, 0.2], [1.0] * 3, 1.0, [2.0, 2.0, math.exp(0.2)]),
    ([0.1, -200.0, 0.2], [1.0] * 3, 1.0, [0.5, 0.5, math.exp(0.2)]),
]


@pytest.mark.parametrize(("log_ratio", "advantage", "half_life", "factors"), FUTURES)
def test_fipo_scales_advantages_by_the_future(log_ratio, advantage, half_life, factors):
    loss, _ = evaluate(Fipo(half_life=half_life, **WIDE), log_ratio, advantage)
    for got, d, A, f in zip(loss[0].tolist(), log_ratio, advantage, factors, strict=True):
        ratio = math.exp(min(max(d, -80.0), 80.0))
        want = -min(ratio, 6.0 if A > 0 else 10.0) * min(max(f, 0.5), 2.0) * A
        assert got == pytest.approx(want, rel=1e-9, abs=1e-30)


def test_fipo_resets_factors_above_the_safety_threshold():
    """Ratios of tokens that harm, below delta: their log-ratios count, their factors do not."""
    fipo = Fipo(half_life=1.0, **WIDE, safety=1.5)
    loss, _ = evaluate(fipo, [0.3, 0.5, 0.1], [-1.0] * 3)
    first = math.exp(0.3 + 0.25 + 0.025)
    want = [math.exp(0.3) * first, math.exp(0.5), math.exp(0.1) * math.exp(0.1)]
    assert loss[0].tolist() == pytest.approx(want)


@pytest.mark.parametrize("bound", ["delta", "safety"])
def test_fipo_at_its_bounds_scales(bound):
    """A ratio that equals one is not above it."""
    ratio = torch.full((1, 2), 0.25, dtype=torch.float64).exp()[0, 0].item()
    loss, _ = evaluate(Fipo(half_life=1.0, **WIDE, **{bound: ratio}), [0.25] * 2, [-1.0] * 2)
    assert loss[0].tolist() == pytest.approx([ratio * math.exp(0.375), ratio * math.exp(0.25)])


BAD = [
    ("share must be", lambda: covariance_mask(torch.ones(2), torch.ones(2, 3), share=0.0)),
    ("share must be", lambda: ClipCov(share=1.5)),
    ("share must be", lambda: KlCov(share=None)),
    ("strength must be", lambda: KlCov(strength=0.0)),
    ("low must be", lambda: covariance_mask(torch.ones(2), torch.ones(2, 3), low=5.0)),
    ("low must be", lambda: ClipCov(low=2.0, high=1.0)),
    ("epsilon_high must be", lambda: ClipCov(0.2, -0.1)),
    ("threshold must be", lambda: M2po(0.0)),
    ("threshold must be", lambda: second_moment_mask(*2 * [torch.ones(2, 3)], threshold=-1.0)),
    ("advantages must have", lambda: covariance_mask(torch.ones(3), torch.ones(2, 4))),
    (
        "advantages must have",
        lambda: second_moment_mask(*2 * [torch.ones(2, 4)], advantages=torch.ones(4)),
    ),
    ("old_logps", lambda: second_moment_mask(torch.ones(2, 4), torch.ones(2, 3))),
    ("cu_seqlens", lambda: covariance_mask(torch.ones(2), torch.ones(4))),
    ("half_life must be", lambda: Fipo(half_life=0.0)),
    ("min_weight must be", lambda: Fipo(min_weight=1.3)),
    ("delta must be", lambda: Fipo(delta=0.0)),
]


@pytest.mark.parametrize(("message", "call"), BAD, ids=[f"{i}-{m}" for i, (m, _) in enumerate(BAD)])
def test_invalid_arguments(message, call):
    with pytest.raises(ValueError, match=message):
        call()
