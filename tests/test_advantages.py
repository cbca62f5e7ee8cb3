"""Outcome advantages against their equation, written out in plain Python (float64)."""

import math

import pytest
import torch

from grpo_fused import outcome_advantages


def equation(rewards, group_size, scale):
    """The docstring's equation, one completion at a time."""

    def std(values):
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

    advantages = []
    for i, reward in enumerate(rewards):
        start = i // group_size * group_size
        group = rewards[start : start + group_size]
        divisor = {
            "group": lambda group=group: std(group) + 1e-4,
            "batch": lambda: std(rewards) + 1e-4,
            "none": lambda: 1.0,
        }[scale]()
        advantages.append((reward - sum(group) / group_size) / divisor)
    return advantages


REWARDS = [0.0, 1.0, 1.0, 0.25, -3.0, 7.5, 0.1, 0.2, 1e-3, 2e-3, 3e-3, 5e-3]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("group_size", [2, 3, 4, 6, 12])
def test_several_groups_follow_the_equation(group_size, scale):
    got = outcome_advantages(torch.tensor(REWARDS), group_size, scale=scale)
    assert got.dtype == torch.float32 and got.shape == (len(REWARDS),)
    want = torch.tensor(equation(REWARDS, group_size, scale), dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)


def test_group_scale_is_the_default_and_std_is_unbiased():
    got = outcome_advantages(torch.tensor([0.0, 1.0]), 2)
    want = 0.5 / (math.sqrt(0.5) + 1e-4)
    torch.testing.assert_close(got, torch.tensor([-want, want]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_give_exactly_zero(scale, dtype):
    # 0.1 in a group of 7: its mean is not 0.1 after rounding, neither in float32 nor in float64.
    rewards = torch.tensor([0.1] * 7 + [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=dtype)
    got = outcome_advantages(rewards, 7, scale=scale)
    assert got[:7].tolist() == [0.0] * 7
    assert got[7] > 0 and (got[8:] < 0).all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("num_rewards", [0, 1, 5])
def test_group_of_one_gets_zero(scale, num_rewards):
    got = outcome_advantages(torch.arange(num_rewards) + 0.5, 1, scale=scale)
    assert got.dtype == torch.float32
    assert got.tolist() == [0.0] * num_rewards


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_every_dtype_gives_float32(dtype):
    rewards = torch.tensor([0, 1, 1, 1, 0, 0])
    got = outcome_advantages(rewards.to(dtype), 3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, outcome_advantages(rewards.float(), 3))


def test_groups_do_not_see_each_other():
    torch.manual_seed(0)
    rewards = torch.rand(12)
    got = outcome_advantages(rewards, 4)
    alone = torch.cat([outcome_advantages(group, 4) for group in rewards.split(4)])
    assert torch.equal(got, alone)


def test_the_argument_is_not_changed():
    rewards = torch.tensor([0.0, 1.0, 2.0, 4.0])
    outcome_advantages(rewards, 2)
    assert rewards.tolist() == [0.0, 1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("rewards", "group_size", "scale", "message"),
    [
        (torch.zeros(2, 2), 2, "group", r"rewards must have shape \(B,\), got \(2, 2\)"),
        (torch.tensor(1.0), 1, "group", r"rewards must have shape \(B,\), got \(\)"),
        (torch.zeros(6), 4, "group", "group_size 4 does not divide the 6 rewards"),
        (torch.zeros(6), 0, "group", "group_size must be at least 1, got 0"),
        (torch.zeros(6), -2, "group", "group_size must be at least 1, got -2"),
        (torch.zeros(6), 2, "prompt", "scale must be one of group, batch, none, got 'prompt'"),
    ],
    ids=["two dimensions", "scalar", "no divisor", "zero", "negative", "scale"],
)
def test_bad_input_is_named(rewards, group_size, scale, message):
    with pytest.raises(ValueError, match=message):
        outcome_advantages(rewards, group_size, scale=scale)
