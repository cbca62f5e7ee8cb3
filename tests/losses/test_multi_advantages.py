"""Advantages of several rewards, and of sets of completions, against plain Python in float64."""

import itertools
import math

import pytest
import torch
from batches import relative_error

from grpo_fused import multi_reward_advantages, outcome_advantages, pass_at_k_advantages

NAN = math.nan
IDS = [7, -1, 7, 2**40, -1, 7, 3, 7, -1, 0, 0, 7]  # groups of 5, 3, 2, 1, 1
PASSED = [1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 1, 0]


def mean(values):
    return sum(values) / len(values)


def std(values):
    if len(values) < 2:
        return 0.0
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def gdpo_equation(rewards, ids, weights):
    """The paper's equations, the mean over the batch included, one completion at a time."""
    sums = []
    for i, row in enumerate(rewards):
        total = 0.0
        for k, reward in enumerate(row):
            if not math.isnan(reward):
                own = [r[k] for r, x in zip(rewards, ids, strict=True) if x == ids[i]]
                own = [r for r in own if not math.isnan(r)]
                total += weights[k] * (reward - mean(own)) / (std(own) + 1e-4)
        sums.append(total)
    scored = [s for s, row in zip(sums, rewards, strict=True) if not all(map(math.isnan, row))]
    return torch.tensor(
        [
            0.0 if all(map(math.isnan, row)) else (s - mean(scored)) / (std(scored) + 1e-4)
            for s, row in zip(sums, rewards, strict=True)
        ],
        dtype=torch.float64,
    )


def several_rewards(missing):
    """A pass, a format that nearly all keep, a length in tokens; some were not given."""
    generator = torch.Generator().manual_seed(3)
    rewards = torch.rand(12, 3, generator=generator) * torch.tensor([1.0, 1.0, 900.0])
    rewards[:, :2] = (rewards[:, :2] < torch.tensor([0.4, 0.9])).float()
    if missing:
        rewards[torch.rand(12, 3, generator=generator) < 0.3] = NAN
        rewards[4] = NAN
    return rewards


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("weights", [None, [1.0, 0.25, -2.0]], ids=["equal", "weighted"])
def test_gdpo(weights, missing):
    rewards = several_rewards(missing)
    given = {} if weights is None else {"weights": torch.tensor(weights)}
    got = multi_reward_advantages(rewards, group_ids=torch.tensor(IDS), **given)
    want = gdpo_equation(rewards.tolist(), IDS, weights or [1.0] * 3)
    assert got.dtype == torch.float32 and relative_error(got, want) < 1e-7
    assert got.norm() > 2 and got[[3, 6]].tolist() == [0.0, 0.0]
    if missing:
        assert got[4] == 0


def test_gdpo_tells_apart_what_grpo_does_not():
    """Of the paper: groups with sums (0, 1) and (0, 2) have equal advantages in GRPO alone."""
    rewards = torch.tensor([[0, 0], [1, 0], [0, 0], [1, 1]])
    grpo = outcome_advantages(rewards.sum(1), 2)
    assert torch.allclose(grpo[1], grpo[3], rtol=1e-3)
    gdpo = multi_reward_advantages(rewards, 2)
    assert gdpo[3] > 1.9 * gdpo[1] > 0


def test_gdpo_of_one_reward_is_grpo_over_the_batch():
    """One reward: GRPO's advantages, divided by their deviation over the batch."""
    rewards = several_rewards(False)[:, 2]
    grpo = outcome_advantages(rewards, 4).double()
    got = multi_reward_advantages(rewards[:, None], 4)
    assert relative_error(got, grpo / (grpo.std() + 1e-4)) < 1e-6


def test_gdpo_of_equal_rewards_is_exactly_zero():
    """In a batch with others; a reward that is missing in a group leaves the others alone."""
    rewards = torch.full((9, 2), 0.1)
    rewards[6:, 0], rewards[3:6, 1] = torch.tensor([0.0, 1.0, 0.5]), NAN
    got = multi_reward_advantages(rewards, 3)
    assert got[:6].tolist() == [0.0] * 6 and got[7] > 0 > got[6]
    assert multi_reward_advantages(rewards[:0], 3).shape == (0,)
    assert multi_reward_advantages(rewards[:, :0], 3).tolist() == [0.0] * 9
    assert multi_reward_advantages(torch.full((4, 3), NAN), 2).tolist() == [0.0] * 4


def pass_at_k_equation(passed, ids, k):
    """The mean advantage of all subsets with a completion, by enumeration."""
    advantages = torch.zeros(len(ids), dtype=torch.float64)
    for own in set(ids):
        members = [i for i, x in enumerate(ids) if x == own]
        subsets = list(itertools.combinations(members, k))
        scores = [max(passed[i] for i in subset) for subset in subsets]
        if len(set(scores)) < 2:
            continue
        sigma = math.sqrt(mean([(s - mean(scores)) ** 2 for s in scores]))
        for i in members:
            mine = [s for s, subset in zip(scores, subsets, strict=True) if i in subset]
            advantages[i] = mean([(s - mean(scores)) / sigma for s in mine])
    return advantages


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 9])
def test_pass_at_k(k):
    got = pass_at_k_advantages(torch.tensor(PASSED), k, group_ids=torch.tensor(IDS))
    want = pass_at_k_equation(PASSED, IDS, k)
    assert got.dtype == torch.float32 and relative_error(got, want) < 1e-7
    assert (got.norm() > 0) == (k < 4)  # of five completions two pass: four always have one
    assert (got[want == 0] == 0).all()


@pytest.mark.parametrize("num_passed", [0, 1, 3, 8, 13, 16])
def test_pass_at_k_of_groups_of_one_size(num_passed):
    passed = [1] * num_passed + [0] * (16 - num_passed)
    passed += passed[::-1]
    got = pass_at_k_advantages(torch.tensor(passed).bool(), 4, 16)
    want = pass_at_k_equation(passed, [i // 16 for i in range(32)], 4)
    assert relative_error(got, want) < 1e-7
    assert torch.equal(got[:16], got[16:].flip(0))
    if num_passed in (0, 13, 16):  # 3 of 16 fail: in four of them is always one that passes
        assert got.tolist() == [0.0] * 32


def test_pass_at_1_is_grpo_with_the_biased_deviation():
    rewards = torch.tensor(PASSED)
    grpo = outcome_advantages(rewards, 6, scale="none").double()
    biased = grpo.view(2, 6) / rewards.view(2, 6).double().std(1, correction=0, keepdim=True)
    assert relative_error(pass_at_k_advantages(rewards, 1, 6), biased.flatten()) < 1e-7


def test_pass_at_k_of_large_groups_and_of_nan():
    """C(4096, 512) overflows float64; a NaN stays in its group."""
    rewards = torch.zeros(2, 4096)
    rewards[0, :3], rewards[1, 5] = 1.0, NAN
    got = pass_at_k_advantages(rewards.flatten(), 512, 4096).view(2, 4096)
    fail = math.comb(4093, 512) / math.comb(4096, 512)
    others = math.comb(4092, 511) / math.comb(4095, 511)
    sigma = math.sqrt(fail * (1 - fail))
    assert got[0, 0].item() == pytest.approx(fail / sigma, rel=1e-6)
    assert got[0, 3].item() == pytest.approx((fail - others) / sigma, rel=1e-5)
    assert got[1].isnan().all()
    assert pass_at_k_advantages(torch.zeros(0), 1, 2).shape == (0,)
