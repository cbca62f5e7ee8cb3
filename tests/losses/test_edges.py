"""Bounds to the last one: what a mutation run (`make mutate`) found that no other test held."""

import math

import pytest
import torch
import triton.language as tl
from batches import make_batch

from grpo_fused import (
    Cispo,
    Clip,
    DppoKl,
    DppoTv,
    Dro,
    Ipo,
    PolicyGradient,
    RolloutIs,
    Sapo,
    Vespo,
    grpo_loss,
    rollout_weights,
    selective_log_softmax,
    whiten,
)
from grpo_fused.bundles import Scales, Statistics, Tokens
from grpo_fused.kernels.launch import kernel
from grpo_fused.kernels.objective import KL_ESTIMATORS as KERNELS
from grpo_fused.losses.kl import KL_ESTIMATORS
from grpo_fused.ops import BACKENDS
from grpo_fused.sequences import Packed, Padded
from grpo_fused.testing import run_per_token

VESPO = [
    ([-25.0, -3.0, 2.0], None, -20 - 3 + 2),
    ([-25.0, 8.0, 9.0], None, -20 + 8 + 9),
    ([8.0, 9.0, -1.0], [0.0, 1.0, 0.5], 16 + math.log(1e-8) + math.log(0.5)),
    ([-20.0, -9.0, 25.0], [1e12, 1.0, 1.0], 16.0),
    ([-9.0, -9.5, 0.0], None, -18.5),
    ([25.0, -19.5, 0.0], None, 0.5),
    ([-9.0, -9.0, 0.5], [1e12, 1.0, 1.0], 2.5),
    ([-9.0, -9.0, 0.5], [1e12], 2.5),
    ([6.0, 7.0, 0.0], [0.0], 13 + math.log(1e-8)),
]


@pytest.mark.parametrize(("log_ratio", "weights", "s"), VESPO, ids=str)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_every_clamp_of_vespo(log_ratio, weights, s, advantage):
    """Weights so small that sums of tokens hide them: compared one by one."""
    if weights is not None:
        weights = torch.tensor(weights if len(weights) == 1 else [weights], dtype=torch.float64)
    k, rate = (2.0, 3.0) if advantage > 0 else (3.0, 2.0)
    compare_vespo(Vespo(), log_ratio, advantage, weights, s, k, rate)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_upper_clamp_of_vespo(advantage):
    """With its own knobs a weight of e^20 is 0 already."""
    vespo = Vespo(2.0, 1e-9, 1.0, 2e-9)
    k, rate = (2.0, 1e-9) if advantage > 0 else (1.0, 2e-9)
    compare_vespo(vespo, [15.0, 8.0, 1.0], advantage, None, 24.0, k, rate)


def compare_vespo(vespo, log_ratio, advantage, weights, s, k, rate):
    """Its loss is what the sum of log-ratios s, the exponent k and the rate say."""
    logp = torch.full((1, 3), -0.5, dtype=torch.float64)
    ratios = torch.tensor([log_ratio], dtype=torch.float64)
    advantages = torch.full_like(logp, advantage)
    loss, _ = vespo.evaluate(
        logp, ratios, advantages, weights, Padded(logp.shape, None, logp.device)
    )
    s = min(max(s, math.log(1e-8)), 20.0)
    want = -math.exp(rate + k * s - rate * math.exp(s)) * advantage * logp
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0.0)


def run(objective, spelling, *columns):
    """(loss, derivative, clipped) of an objective per token."""
    if spelling == "torch":
        return objective.of_tokens(*columns, None)
    return run_per_token(objective, *columns)


@pytest.mark.parametrize("spelling", ["torch", "triton"])
def test_edges_of_the_clamp_of_exponentials(spelling, device):
    """With epsilon_low 1 and A = -1 the loss is the ratio: e^clamp(x, -80, 80)."""
    x = torch.tensor([-200.0, -81.0, -80.0, 80.0, 81.0, 200.0], device=device)
    columns = (torch.zeros_like(x), x, -torch.ones_like(x))
    ratio, derivative, _ = run(Clip(1.0, 0.2), spelling, *columns)
    inside = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0], device=device)
    torch.testing.assert_close(ratio, x.clamp(-80, 80).exp(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(derivative, ratio * inside, rtol=1e-5, atol=0.0)


def test_exponentials_to_a_rounding(device):
    """The rounding of x log2(e) alone is 7e-6 at x = 80."""
    x = torch.linspace(-79.7, 79.7, 33, device=device)
    ratio, _, _ = run_per_token(Clip(1.0, 0.2), torch.zeros_like(x), x, -torch.ones_like(x))
    torch.testing.assert_close(ratio.double(), x.double().exp(), rtol=4e-7, atol=0.0)


AT_THEIR_BOUND = [Clip(0.0, 0.0), Clip(0.0, 0.0, 1.0), Cispo(1.0), RolloutIs(0.0, 0.0), Ipo(0.0)]


@pytest.mark.parametrize("spelling", ["torch", "triton"])
@pytest.mark.parametrize("objective", AT_THEIR_BOUND, ids=repr)
def test_a_ratio_at_its_bound_is_inside(objective, spelling, device):
    """On policy the ratio is 1 exactly."""
    zeros, advantage = torch.zeros(2, device=device), torch.tensor([1.0, -1.0], device=device)
    _, derivative, clipped = run(objective, spelling, zeros, zeros, advantage)
    assert torch.equal(derivative, -advantage) and (clipped == 0).all()


# (objective, logp, log-ratio, advantage, clipped): p and p_old are 0, 1/2 or 1.
MOVED = [
    (DppoTv(epsilon_high=1.0), 0.0, 200.0, 1.0, 0.0),
    (DppoTv(epsilon_high=0.999), 0.0, 200.0, 1.0, 1.0),
    (DppoTv(epsilon_low=1.0), -200.0, -200.0, -1.0, 0.0),
    (DppoTv(epsilon_low=0.999), -200.0, -200.0, -1.0, -1.0),
    (DppoKl(epsilon_high=math.log(2.0)), -math.log(2.0), 150.0, 1.0, 0.0),
    (DppoKl(epsilon_high=0.693), -math.log(2.0), 150.0, 1.0, 1.0),
    (DppoKl(epsilon_low=1.0), -1.0, -1.0, -1.0, 0.0),
    (DppoKl(epsilon_low=0.999), -1.0, -1.0, -1.0, -1.0),
    # A p_old above 1, by rounding, counts as 1: the probability is the same.
    *((DppoKl(), 0.0, -1.0, advantage, 0.0) for advantage in (1.0, -1.0)),
    # All others have had 0.63 and have nothing: 0.63 log(0.63 / 1e-8) - 0.37.
    (DppoKl(epsilon_high=10.9), 0.0, 1.0, 1.0, 1.0),
    (DppoKl(epsilon_high=11.1), 0.0, 1.0, 1.0, 0.0),
]


@pytest.mark.parametrize("spelling", ["torch", "triton"])
@pytest.mark.parametrize(("objective", "logp", "log_ratio", "advantage", "clipped"), MOVED)
def test_a_divergence_at_its_bound_is_inside(
    objective, logp, log_ratio, advantage, clipped, spelling, device
):
    inputs = [torch.tensor([value], device=device) for value in (logp, log_ratio, advantage)]
    _, derivative, got = run(objective, spelling, *inputs)
    assert got.item() == clipped and (derivative.item() == 0) == (clipped != 0)


OF_LOGP = [Cispo(), PolicyGradient(), DppoTv(), DppoKl(), RolloutIs(), Dro()]


@pytest.mark.parametrize("spelling", ["torch", "triton"])
@pytest.mark.parametrize("objective", OF_LOGP, ids=repr)
def test_an_impossible_token_without_an_advantage(objective, spelling, device):
    """On policy, where its log-ratio is 0: 0 times -inf would be NaN."""
    logp = torch.full((1,), -torch.inf, device=device)
    for value in run(objective, spelling, logp, torch.zeros_like(logp), torch.zeros_like(logp)):
        assert (value == 0).all()


@pytest.mark.parametrize("spelling", ["torch", "triton"])
def test_an_impossible_token_is_infinite_with_one(spelling, device):
    """The penalty of DRO outweighs its gain of either sign off policy; a weight on policy is 1."""
    logp, zero = torch.full((2,), -torch.inf, device=device), torch.zeros(2, device=device)
    advantage = torch.tensor([1.0, -1.0], device=device)
    loss, derivative, _ = run(Dro(), spelling, logp, logp, advantage)
    assert (loss == torch.inf).all() and (derivative == -torch.inf).all()
    loss, derivative, _ = run(RolloutIs(), spelling, logp, zero, advantage)
    assert torch.equal(loss, advantage * torch.inf) and torch.equal(derivative, -advantage)


@pytest.mark.parametrize("spelling", ["torch", "triton"])
def test_a_gate_that_is_shut(spelling, device):
    """So hot that its sigmoid is 0 in float32."""
    far, advantage = torch.full((2,), -80.0, device=device), torch.tensor([1.0, -1.0]).to(device)
    for value in run(Sapo(150.0, 150.0), spelling, far, far, advantage):
        assert (value == 0).all()


@pytest.mark.parametrize("V", [97, 512, 513, 1300])
def test_nothing_is_written_beside_the_rows(V, implementation, device):
    """Columns past the vocabulary belong to someone else, under the mask too."""
    batch = make_batch(V=V, device=device)
    width = V + 4 + (V + 1) % 2  # odd: columns one by one, a block is 128 in the interpreter
    room = batch.logits.new_full((*batch.logits.shape[:2], width), 7.0)
    room[..., :V] = batch.logits
    room = room.requires_grad_(True) * 1.0
    logits = room[..., :V]
    options = {"entropy_coef": 0.1, "implementation": implementation, "inplace": True}
    grpo_loss(logits, batch.ids, batch.mask, batch.advantages, **options).loss.backward()
    hidden = batch.mask == 0
    assert hidden.any() and (room.detach()[..., V:] == 7.0).all()
    assert (logits.detach()[:, :-1][hidden] == 0).all() and (logits.detach()[:, -1] == 0).all()


def test_nothing_is_written_behind_the_tokens(implementation, device):
    """Position T would be the next sequence's first token; the last sequence has no next."""
    B, T = 2, 3
    batch = make_batch(B, T, 17, mask=torch.ones(B, T), device=device)
    outputs = torch.full((4, B * T + T), 7.0, device=device)
    ids = torch.zeros(B * T + T, dtype=torch.long, device=device)
    ids[: B * T] = batch.ids.flatten()
    active = torch.ones_like(ids, dtype=torch.bool)
    tokens = Tokens(*(t[: B * T].view(B, T) for t in (ids, active)))
    statistics = Statistics(*(row[: B * T].view(B, T) for row in outputs))
    BACKENDS[implementation].logprob_fwd(batch.logits, tokens, Scales(), statistics, False)
    assert (outputs[:, B * T :] == 7.0).all() and (outputs[:, : B * T] != 7.0).all()


def test_entropies_do_not_know_the_token(implementation, device):
    """Its probability may be 0: 0 * -inf is no gradient."""
    gradients = []
    for token in (3, 5):
        logits = torch.linspace(-1.0, 1.0, 11, device=device).repeat(1, 1, 1)
        logits[..., 3] = -torch.inf
        logits.requires_grad_(True)
        ids = torch.full((1, 1), token, device=device)
        _, entropies = selective_log_softmax(
            logits, ids, compute_entropy=True, implementation=implementation
        )
        entropies.sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)
    assert gradients[0][0, 0, 3] == 0.0


@pytest.mark.parametrize("V", [97, 512, 513, 1300])
def test_the_upstream_gradient_in_rows_of_every_length(V, implementation, device):
    """Less than a block, one, one and a column, some: every column once, and nothing beside."""
    room = torch.randn(2, 3, V + 4 + (V + 1) % 2, device=device)  # odd: columns one by one
    given = room.clone()
    upstream, assumed = torch.tensor(3.0, device=device), torch.tensor(2.0, device=device)
    BACKENDS[implementation].rescale(room[..., :V], upstream, assumed)
    given[..., :V] *= 1.5
    assert torch.equal(room, given)


@pytest.mark.parametrize("count", [0, 0.5])
def test_less_than_one_item_divides_by_one(count, implementation, device):
    batch = make_batch(device=device)
    losses = [
        grpo_loss(
            batch.logits,
            batch.ids,
            batch.mask,
            batch.advantages,
            num_items_in_batch=n,
            normalizer="token-mean",
            implementation=implementation,
        ).loss
        for n in (count, 1, torch.tensor(count, device=device))
    ]
    assert losses[0] == losses[1] == losses[2]


def test_k3_at_the_clamp():
    d = torch.tensor([-80.0, 80.0])
    assert torch.equal(KL_ESTIMATORS["k3"](d)[1], -torch.expm1(d))
    value, derivative, both = KL_ESTIMATORS["k3"](torch.tensor([-81.0, 81.0]))
    assert derivative.tolist() == [1.0, 0.0] and torch.equal(both, value + derivative)


ENDS = [([-2, 3, 9], [0, 3, 6]), ([-5, -3, 2], [0, 0, 2]), ([0, 4, 2], [0, 4, 4])]


@pytest.mark.parametrize(("wrong", "cut"), ENDS, ids=str)
def test_wrong_ends_are_cut_to_the_tokens(wrong, cut):
    """No sum is asked for what lies outside: what it found there might be 0."""
    ends = Packed((1, 6), None, torch.tensor(wrong)).offsets.tolist()
    assert ends == cut


def test_what_whitening_adds_to_a_small_variance():
    """Two values 2e-4 apart have the unbiased variance 2e-8."""
    want = torch.tensor([1e-4, -1e-4]) / math.sqrt(2e-8 + 1e-8)
    torch.testing.assert_close(whiten(torch.tensor([3e-4, 1e-4])), want, rtol=1e-5, atol=0.0)


def test_bounds_of_masked_weights_are_kept():
    ones = torch.zeros(2, 3)
    for bounds in ({"cap": 1.0}, {"cap": 2.0, "floor": 1.0}):
        assert (rollout_weights(ones, ones, mode="mask", **bounds) == 1.0).all()


@kernel
def _k3_kernel(difference_ptr, out_ptr, DIVERGENCE: tl.constexpr):
    i = tl.program_id(0)
    value = DIVERGENCE(tl.load(difference_ptr + i))[0]
    tl.store(out_ptr + i, value)


def test_the_series_of_k3_in_the_kernel(device):
    d = torch.tensor([-0.999, 0.999], device=device)
    got = torch.empty_like(d)
    _k3_kernel[(2,)](d, got, DIVERGENCE=KERNELS["k3"])
    torch.testing.assert_close(
        got.double(), torch.expm1(d.double()) - d.double(), rtol=3e-7, atol=0.0
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_only_the_sampler_may_fail_to_score(level):
    """A NaN of its own is no difference; one of the policy's is a fault that must show."""
    logps, sampling = torch.full((1, 3), -1.0), torch.full((1, 3), -1.5)
    logps[0, 1] = torch.nan
    assert rollout_weights(logps, sampling, level=level, cap=None).isnan().any()
    assert rollout_weights(sampling, logps, level="token", cap=None)[0, 1] == 1.0
