"""Advantages against their equations, as plain Python loops in float64."""

import math

import pytest
import torch

from grpo_fused.advantages import (
    SCALES,
    mask_truncated,
    multi_reward_advantages,
    outcome_advantages,
    pass_at_k_advantages,
    process_advantages,
)

NAN = math.nan


def mean(values):
    return sum(values) / len(values)


def std(values):
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def baseline(i, rewards, ids, leave_one_out, lengths):
    """The mean of the group, of the others of the group, or weighted by lengths."""
    members = [j for j in range(len(ids)) if ids[j] == ids[i]]
    if leave_one_out:
        members.remove(i)
    weights = [1.0 if lengths is None else lengths[j] for j in members]
    if sum(weights) == 0:
        weights = [1.0] * len(members)
    return sum(w * rewards[j] for w, j in zip(weights, members, strict=True)) / sum(weights)


def equation(rewards, ids, scale, leave_one_out=False, lengths=None):
    """The docstring's equation, one completion at a time."""
    groups = [[r for r, other in zip(rewards, ids, strict=True) if other == own] for own in ids]
    centred = [
        rewards[i] - baseline(i, rewards, ids, leave_one_out, lengths) if len(group) > 1 else 0.0
        for i, group in enumerate(groups)
    ]
    advantages = []
    for group, value in zip(groups, centred, strict=True):
        if len(group) == 1 or (scale == "mean" and mean(group) <= 0):
            advantages.append(0.0)
            continue
        divisor = {
            "group": lambda: std(group) + 1e-4,  # noqa: B023
            "batch": lambda: std(rewards) + 1e-4,
            "centred": lambda: std(centred) + 1e-4,
            "mean": lambda: mean(group),  # noqa: B023
            "none": lambda: 1.0,
        }[scale]()
        advantages.append(value / divisor)
    return advantages


def assert_close(got, want, atol=1e-6):
    assert got.dtype == torch.float32
    want = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=atol)


REWARDS = [0.0, 1.0, 1.0, 0.25, -3.0, 7.5, 0.1, 0.2, 1e-3, 2e-3, 3e-3, 5e-3]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("group_size", [2, 3, 4, 6, 12])
def test_groups_of_one_size(group_size, scale):
    got = outcome_advantages(torch.tensor(REWARDS), group_size, scale=scale)
    assert_close(got, equation(REWARDS, [i // group_size for i in range(12)], scale))


IDS = [7, -1, 7, 2**40, -1, 7, 3, 7, -1, 0, 0, -(2**62)]  # groups of 4, 3, 2, 1, 1, 1
LENGTHS = [301, 0, 17, 5, 40, 2048, 9, 1, 3, 0, 0, 0]  # the group of 2 has no token


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "lengths"])
@pytest.mark.parametrize("scale", SCALES)
def test_groups_of_ids(scale, baseline):
    options = {} if baseline == "mean" else {"leave_one_out": True}
    options = {"lengths": LENGTHS} if baseline == "lengths" else options
    want = equation(REWARDS, IDS, scale, **options)
    if baseline == "lengths":
        options["lengths"] = torch.tensor(LENGTHS)
    rewards, ids = torch.tensor(REWARDS), torch.tensor(IDS)
    assert_close(outcome_advantages(rewards, group_ids=ids, scale=scale, **options), want)


def test_lengths_in_words():
    """OPO: (10 * 1 + 30 * 0) / 40 = 0.25. Equal lengths weigh nothing."""
    got = outcome_advantages(
        torch.tensor([1, 0]), 2, scale="none", lengths=torch.tensor([10.0, 30.0])
    )
    assert got.tolist() == [0.75, -0.25]
    rewards = torch.tensor(REWARDS)
    got = outcome_advantages(rewards, 4, lengths=torch.full((12,), 7))
    assert_close(got, outcome_advantages(rewards, 4).tolist(), atol=0)


def test_maxrl_in_words():
    """One pass of four: (1 - 1/4) / (1/4) = 3. Without a pass, and with losses, nothing."""
    rewards = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, -2, 1, 0, 0])
    got = outcome_advantages(rewards, 4, scale="mean")
    assert got.tolist() == [3.0, -1.0, -1.0, -1.0] + [0.0] * 8


def test_reinforce_plus_plus_in_words():
    """Group means are subtracted before the deviation is taken; the batch as one group has none."""
    rewards = torch.tensor([1.0, 0.0, 11.0, 10.0])
    got = outcome_advantages(rewards, 2, scale="centred")
    assert_close(got, [x / (math.sqrt(1 / 3) + 1e-4) for x in (0.5, -0.5, 0.5, -0.5)])
    spread = math.sqrt(((4.5**2 + 5.5**2) * 2) / 3) + 1e-4
    assert_close(outcome_advantages(rewards, 4), [x / spread for x in (-4.5, -5.5, 5.5, 4.5)])


def test_groups_of_ids_are_independent():
    """Equal rewards give exactly 0; a NaN propagates to its group alone."""
    ids = torch.arange(21) % 3
    rewards = torch.where(ids == 0, 0.1, torch.rand(21))
    rewards[4] = NAN
    lengths = torch.arange(21) % 5
    for options in ({}, {"leave_one_out": True}, {"scale": "mean"}, {"lengths": lengths}):
        got = outcome_advantages(rewards, group_ids=ids, **options)
        assert got[ids == 0].tolist() == [0.0] * 7
        assert got[ids == 1].isnan().all() and got[ids == 2].isfinite().all()
    for scale in SCALES:
        assert outcome_advantages(torch.zeros(0), group_ids=ids[:0], scale=scale).shape == (0,)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_give_exactly_zero(scale, dtype):
    # The mean of seven times 0.1 is not 0.1 after rounding, in float32 and in float64.
    rewards = torch.tensor([0.1] * 7 + [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=dtype)
    for lengths in (None, torch.arange(3, 17)):
        got = outcome_advantages(rewards, 7, scale=scale, lengths=lengths)
        assert got[:7].tolist() == [0.0] * 7
        assert got[7] > 0 and (got[8:] < 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64], ids=str)
def test_every_dtype_gives_float32(dtype):
    rewards = torch.tensor([0, 1, 1, 1, 0, 0])
    for advantages in (
        outcome_advantages,
        lambda r, size: outcome_advantages(r, size, scale="mean"),
        lambda r, size: multi_reward_advantages(r[:, None], size),
        lambda r, size: pass_at_k_advantages(r, 2, size),
    ):
        got, want = advantages(rewards.to(dtype), 3), advantages(rewards.float(), 3)
        assert got.dtype == torch.float32 and torch.equal(got, want) and got[3] > 0


@pytest.mark.parametrize("scale", ["group", "none", "mean"])
@pytest.mark.parametrize("num_rewards", [0, 1, 5])
def test_groups_of_one_have_advantage_zero(scale, num_rewards):
    rewards = [0.5, NAN, 1.5, 2.5, -1.0][:num_rewards]
    got = outcome_advantages(torch.tensor(rewards), 1, scale=scale)
    assert got.dtype == torch.float32
    assert got.tolist() == [0.0] * num_rewards


def process_equation(step_rewards, step_ends, length, ids, scale):
    """The docstring's equation, one token at a time."""
    steps = [
        [(r, e) for r, e in zip(rewards, ends, strict=True) if e >= 0]
        for rewards, ends in zip(step_rewards.tolist(), step_ends.tolist(), strict=True)
    ]
    advantages = torch.zeros(len(steps), length, dtype=torch.float64)
    for b, mine in enumerate(steps):
        group = [r for s, i in zip(steps, ids, strict=True) if i == ids[b] for r, _ in s]
        divisor = 1.0 if scale == "none" or len(group) < 2 else std(group) + 1e-4
        for t in range(length):
            advantages[b, t] = sum((r - mean(group)) / divisor for r, end in mine if end >= t)
    return advantages.tolist()


def steps(B=6, S=5, T=23):
    """Unsorted and equal ends, missing steps with NaN rewards, a sequence without steps."""
    generator = torch.Generator().manual_seed(1)
    ends = torch.randint(-6, T, (B, S), generator=generator)
    ends[0, :3] = T - 1
    ends[1] = -1
    rewards = torch.randn(B, S, generator=generator)
    return rewards.masked_fill(ends < 0, NAN), ends


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("ids", [[0, 0, 0, 1, 1, 1], [4, 4, -2, 4, -2, 8]], ids=["size", "ids"])
def test_process_advantages(ids, scale):
    rewards, ends = steps()
    groups = {"group_size": 3} if ids[-1] == 1 else {"group_ids": torch.tensor(ids)}
    got = process_advantages(rewards, ends, 23, scale=scale, **groups)
    assert got.shape == (6, 23) and got[1].tolist() == [0.0] * 23
    assert_close(got, process_equation(rewards, ends, 23, ids, scale))


def test_a_single_step_per_completion_is_outcome_supervision():
    rewards, lengths = torch.rand(8), torch.tensor([3, 9, 1, 4, 9, 2, 7, 5])
    got = process_advantages(rewards[:, None], lengths[:, None] - 1, 9, 4)
    outcome = outcome_advantages(rewards, 4)
    active = torch.arange(9) < lengths[:, None]
    assert torch.equal(got, torch.where(active, outcome[:, None], 0.0))


def test_equal_step_rewards_or_no_steps_give_exactly_zero():
    ends = torch.tensor([[0, 4, 6], [-1, 2, 2]])
    assert process_advantages(torch.full((2, 3), 0.1), ends, 7, 2).tolist() == [[0.0] * 7] * 2
    assert process_advantages(torch.rand(2, 0), ends[:, :0], 7, 2).tolist() == [[0.0] * 7] * 2
    assert process_advantages(torch.rand(0, 3), ends[:0], 7, 2).shape == (0, 7)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_mask_truncated(dtype):
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0]]).to(dtype)
    got = mask_truncated(mask, torch.tensor([True, False, True]))
    assert got.dtype == dtype and got.tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("where", ["meta", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_no_synchronisation(where, request):
    """Meta tensors have no values: reading one raises an error."""

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(*shape, dtype=dtype, device=where)

    ids, ends = zeros(6, dtype=torch.int32), zeros(6, 4, dtype=torch.int64)
    if where == "cuda":
        request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
        torch.cuda.set_sync_debug_mode("error")
    for scale in SCALES:
        outcome_advantages(zeros(6), 3, scale=scale, leave_one_out=True)
        outcome_advantages(zeros(6), 3, scale=scale, lengths=ids)
        assert outcome_advantages(zeros(6), group_ids=ids, scale=scale).shape == (6,)
    assert multi_reward_advantages(zeros(6, 4), group_ids=ids).shape == (6,)
    assert pass_at_k_advantages(zeros(6), 2, group_ids=ids).shape == (6,)
    assert process_advantages(zeros(6, 4), ends, 9, group_ids=ids).shape == (6, 9)
    assert mask_truncated(zeros(6, 9), ids > 0).shape == (6, 9)


def outcome(*shape, size=2, **options):
    return lambda: outcome_advantages(torch.zeros(shape), size, **options)


def process(*shape, ends=((0, 0),), length=3, **options):
    return lambda: process_advantages(torch.zeros(shape), torch.tensor(ends), length, 1, **options)


def several(*shape, size=2, **options):
    return lambda: multi_reward_advantages(torch.zeros(shape), size, **options)


def passes(*rewards, k=1, size=2, **options):
    return lambda: pass_at_k_advantages(torch.tensor(rewards), k, size, **options)


IDS2, VALUES = torch.tensor([0, 0]), torch.zeros(2, 3)
BAD = {
    "two dimensions": (outcome(2, 2), r"rewards must have shape \(B,\), got \(2, 2\)"),
    "list": (lambda: outcome_advantages([0.0], 1), r"rewards must be a tensor .*got \[0.0\]"),
    "indivisible": (outcome(6, size=4), "group_size 4 does not divide the 6 rewards"),
    "zero": (outcome(6, size=0), "group_size must be an integer >= 1, got 0"),
    "fraction": (outcome(6, size=1.5), "group_size must be an integer >= 1, got 1.5"),
    "scale": (
        outcome(6, scale="one"),
        "scale must be one of group, batch, none, centred, mean, got 'one'",
    ),
    "neither": (outcome(2, size=None), "exactly one of group_size and group_ids .*got neither"),
    "both": (outcome(2, group_ids=IDS2), "exactly one of group_size and group_ids .*got both"),
    "ids": (outcome(3, size=None, group_ids=IDS2), r"group_ids .*\(3,\) on cpu, got \(2,\)"),
    "kind of ids": (outcome(2, size=None, group_ids=IDS2 / 2), "group_ids must be integers"),
    "ends": (process(1, 3), r"step_ends must have shape \(1, 3\) on cpu, got \(1, 2\)"),
    "kind of ends": (process(1, 2, ends=((0.5, 1.0),)), "step_ends must be integers"),
    "late step": (process(1, 2, ends=((3, 0),)), "step_ends must be < 3, got 3"),
    "length": (process(1, 2, length=-1), "completion_length must be an integer >= 0, got -1"),
    "lengths": (outcome(4, lengths=IDS2), r"lengths must have shape \(4,\) on cpu, got \(2,\)"),
    "negative length": (outcome(2, lengths=IDS2 - 1), "lengths must be >= 0, got -1"),
    "two baselines": (
        outcome(2, lengths=IDS2, leave_one_out=True),
        "leave_one_out must be False with lengths, got True",
    ),
    "one reward": (several(2), r"rewards must have shape \(B, K\), got \(2,\)"),
    "weights": (several(2, 3, weights=IDS2), r"weights must have shape \(3,\) .*got \(2,\)"),
    "group of several": (several(6, 4, size=4), "group_size 4 does not divide the 6 rewards"),
    "k of 0": (passes(0, 1, k=0), r"k must be an integer in \[1, group_size = 2\], got 0"),
    "k above the group": (passes(0, 1, k=3), r"k must be an integer in \[1, .* = 2\], got 3"),
    "k of ids": (passes(0, 1, k=1.5, size=None, group_ids=IDS2), "k must be .* >= 1, got 1.5"),
    "not binary": (passes(0.0, 0.5), "rewards must be 0 or 1 for pass@k, got 0.5"),
    "table of passes": (passes([0, 1]), r"rewards must have shape \(B,\), got \(1, 2\)"),
    "truncated": (lambda: mask_truncated(VALUES, IDS2), "truncated must be bool, got torch.int64"),
    "device": (
        lambda: mask_truncated(VALUES, IDS2.bool().to("meta")),
        "truncated .*on cpu, got .*on meta",
    ),
}


@pytest.mark.parametrize("call", BAD)
def test_invalid_arguments(call):
    with pytest.raises(ValueError, match=BAD[call][1]):
        BAD[call][0]()


def test_a_mean_that_is_only_rounding_counts_as_0():
    """Rewards of both signs that cancel: 7e-17 is no divisor."""
    rewards = torch.tensor([1.1, -0.4, -0.7, 1.0, 0.0, 0.0], dtype=torch.float64)
    found = outcome_advantages(rewards, 3, scale="mean")
    assert found.tolist() == [0, 0, 0, 2, -1, -1]


def test_epsilon():
    """verl's, of groups of almost equal rewards; of all functions that divide by a deviation."""
    rewards = torch.tensor([1.0, 1.00001, 2.0, 2.00001], dtype=torch.float64)
    deviation = 1e-5 / math.sqrt(2)
    for epsilon in (1e-4, 1e-6):
        want = 5e-6 / (deviation + epsilon)
        expected = pytest.approx([-want, want, -want, want], rel=1e-4)
        assert outcome_advantages(rewards, 2, epsilon=epsilon).tolist() == expected
        steps = torch.zeros(4, 1, dtype=torch.int64)
        found = process_advantages(rewards[:, None], steps, 1, 2, epsilon=epsilon)
        assert found.flatten().tolist() == expected
        scale = want * math.sqrt(4 / 3) + epsilon
        found = multi_reward_advantages(rewards[:, None], 2, epsilon=epsilon)
        assert found.tolist() == pytest.approx([-want / scale, want / scale] * 2, rel=1e-4)
    assert (
        outcome_advantages(rewards, 2).tolist()
        == outcome_advantages(rewards, 2, epsilon=1e-4).tolist()
    )
    for epsilon in (0.0, -1.0, math.inf, math.nan, "1"):
        with pytest.raises(ValueError, match="epsilon must be a finite number > 0"):
            outcome_advantages(rewards, 2, epsilon=epsilon)
        with pytest.raises(ValueError, match="epsilon must be"):
            multi_reward_advantages(rewards[:, None], 2, epsilon=epsilon)
        with pytest.raises(ValueError, match="epsilon must be"):
            process_advantages(rewards[:, None], steps, 1, 2, epsilon=epsilon)
