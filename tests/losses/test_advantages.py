"""Advantages against their equations, as plain Python loops in float64."""

import math

import pytest
import torch

from grpo_fused.advantages import (
    gae_advantages,
    mask_truncated,
    outcome_advantages,
    process_advantages,
    whiten,
)

NAN = math.nan


def mean(values):
    return sum(values) / len(values)


def std(values):
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def equation(rewards, ids, scale, leave_one_out=False):
    """The docstring's equation, one completion at a time."""
    advantages = []
    for i, reward in enumerate(rewards):
        group = [r for r, other in zip(rewards, ids, strict=True) if other == ids[i]]
        if len(group) == 1:
            advantages.append(0.0)
            continue
        others = [r for j, r in enumerate(rewards) if ids[j] == ids[i] and j != i]
        divisor = {"group": std(group) + 1e-4, "batch": std(rewards) + 1e-4, "none": 1.0}[scale]
        advantages.append((reward - mean(others if leave_one_out else group)) / divisor)
    return advantages


def assert_close(got, want, atol=1e-6):
    assert got.dtype == torch.float32
    want = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=atol)


REWARDS = [0.0, 1.0, 1.0, 0.25, -3.0, 7.5, 0.1, 0.2, 1e-3, 2e-3, 3e-3, 5e-3]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("group_size", [2, 3, 4, 6, 12])
def test_groups_of_one_size(group_size, scale):
    got = outcome_advantages(torch.tensor(REWARDS), group_size, scale=scale)
    assert_close(got, equation(REWARDS, [i // group_size for i in range(12)], scale))


IDS = [7, -1, 7, 2**40, -1, 7, 3, 7, -1, 0, 0, -(2**62)]  # groups of 4, 3, 2, 1, 1, 1


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_of_ids(scale, leave_one_out):
    options = {"scale": scale, "leave_one_out": leave_one_out}
    got = outcome_advantages(torch.tensor(REWARDS), group_ids=torch.tensor(IDS), **options)
    assert_close(got, equation(REWARDS, IDS, scale, leave_one_out))


def test_groups_of_ids_are_independent():
    """Equal rewards give exactly 0; a NaN propagates to its group alone."""
    ids = torch.arange(21) % 3
    rewards = torch.where(ids == 0, 0.1, torch.rand(21))
    rewards[4] = NAN
    for leave_one_out in (False, True):
        got = outcome_advantages(rewards, group_ids=ids, leave_one_out=leave_one_out)
        assert got[ids == 0].tolist() == [0.0] * 7
        assert got[ids == 1].isnan().all() and got[ids == 2].isfinite().all()
    assert outcome_advantages(torch.zeros(0), group_ids=ids[:0]).shape == (0,)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_give_exactly_zero(scale, dtype):
    # The mean of seven times 0.1 is not 0.1 after rounding, in float32 and in float64.
    rewards = torch.tensor([0.1] * 7 + [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=dtype)
    got = outcome_advantages(rewards, 7, scale=scale)
    assert got[:7].tolist() == [0.0] * 7
    assert got[7] > 0 and (got[8:] < 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64], ids=str)
def test_every_dtype_gives_float32(dtype):
    rewards = torch.tensor([0, 1, 1, 1, 0, 0])
    got = outcome_advantages(rewards.to(dtype), 3)
    assert got.dtype == torch.float32 and torch.equal(got, outcome_advantages(rewards.float(), 3))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
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


def gae_equation(rewards, values, mask, gamma, lam):
    """The docstring's recursion, from the last active token."""
    advantages, returns = torch.zeros(2, *mask.shape, dtype=torch.float64)
    for b in range(mask.shape[0]):
        advantage = value = 0.0
        for t in reversed(range(mask.shape[1])):
            if mask[b, t]:
                delta = rewards[b, t].item() + gamma * value - values[b, t].item()
                advantage = delta + gamma * lam * advantage
                value = values[b, t].item()
                advantages[b, t], returns[b, t] = advantage, advantage + value
    return advantages.tolist(), returns.tolist()


def token_batch(B=4, T=37, seed=0):
    """Rewards, values and a mask with prefixes, holes and an empty row; NaN where masked."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, B, T, generator=generator)
    lengths = torch.randint(T // 2, T + 1, (B, 1), generator=generator)
    mask = (torch.arange(T) < lengths) & (torch.rand(B, T, generator=generator) < 0.8)
    mask[-1] = False
    return rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1), (1, 1), (0.99, 0), (0, 1)])
def test_gae(gamma, lam, dtype):
    rewards, values, mask = token_batch()
    got = gae_advantages(rewards, values, mask.to(dtype), gamma=gamma, lam=lam)
    for tensor, want in zip(got, gae_equation(rewards, values, mask, gamma, lam), strict=True):
        assert_close(tensor, want)
        assert (tensor[~mask] == 0).all()


def test_gae_with_lambda_1_is_the_discounted_return_minus_the_value():
    rewards, values, _ = token_batch(T=9)
    rewards, values = rewards.nan_to_num(0), values.nan_to_num(0).requires_grad_()
    discount = 0.9 ** (torch.arange(9) - torch.arange(9)[:, None]).double()
    want = rewards.double() @ discount.triu().T
    advantages, returns = gae_advantages(rewards, values, gamma=0.9, lam=1.0)
    assert not advantages.requires_grad and not returns.requires_grad
    assert_close(returns, want.tolist())
    assert_close(advantages, (want - values).tolist())


@pytest.mark.parametrize("decay", [1.0, 0.9999, 0.95, 1e-3, 1e-30, 0.0])
def test_gae_of_long_sequences(decay):
    """The reward of the last of 32768 tokens adds decay^n to the token n before it."""
    rewards = torch.zeros(1, 32768)
    rewards[0, -1] = 1.0
    got, _ = gae_advantages(rewards, torch.zeros(1, 32768), gamma=1.0, lam=decay)
    want = decay ** torch.arange(32767, -1, -1, dtype=torch.float64)[None]
    assert_close(got, want.tolist(), atol=1e-37)
    summed, _ = gae_advantages(torch.ones_like(rewards), torch.zeros(1, 32768), lam=decay)
    assert_close(summed, want.flip(1).cumsum(1).flip(1).tolist())


def test_whiten():
    advantages, _, mask = token_batch()
    got = whiten(advantages, mask)
    active = advantages[mask].double()
    assert_close(got[mask], ((active - active.mean()) / active.std()).tolist())
    assert (got[~mask] == 0).all()
    assert whiten(torch.tensor([3.0, NAN]), torch.tensor([1, 0])).tolist() == [0.0, 0.0]
    assert (
        whiten(torch.full((3, 2), 0.1)).abs().max() < 1e-6 and whiten(torch.zeros(0)).numel() == 0
    )


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

    ids, ends, tokens = zeros(6, dtype=torch.int32), zeros(6, 4, dtype=torch.int64), zeros(6, 9)
    if where == "cuda":
        request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
        torch.cuda.set_sync_debug_mode("error")
    for scale in ("group", "batch", "none"):
        outcome_advantages(zeros(6), 3, scale=scale, leave_one_out=True)
        assert outcome_advantages(zeros(6), group_ids=ids, scale=scale).shape == (6,)
    assert process_advantages(zeros(6, 4), ends, 9, group_ids=ids).shape == (6, 9)
    assert gae_advantages(tokens, tokens, tokens)[1].shape == (6, 9)
    assert whiten(tokens, tokens).shape == mask_truncated(tokens, ids > 0).shape == (6, 9)


def outcome(*shape, size=2, **options):
    return lambda: outcome_advantages(torch.zeros(shape), size, **options)


def process(*shape, ends=((0, 0),), length=3, **options):
    return lambda: process_advantages(torch.zeros(shape), torch.tensor(ends), length, 1, **options)


def gae(*rest, **options):
    return lambda: gae_advantages(torch.zeros(2, 3), *rest, **options)


IDS2, VALUES = torch.tensor([0, 0]), torch.zeros(2, 3)
BAD = {
    "two dimensions": (outcome(2, 2), r"rewards must have shape \(B,\), got \(2, 2\)"),
    "list": (lambda: outcome_advantages([0.0], 1), r"rewards must be a tensor .*got \[0.0\]"),
    "indivisible": (outcome(6, size=4), "group_size 4 does not divide the 6 rewards"),
    "zero": (outcome(6, size=0), "group_size must be an integer >= 1, got 0"),
    "fraction": (outcome(6, size=1.5), "group_size must be an integer >= 1, got 1.5"),
    "scale": (outcome(6, scale="one"), "scale must be one of group, batch, none, got 'one'"),
    "neither": (outcome(2, size=None), "exactly one of group_size and group_ids .*got neither"),
    "both": (outcome(2, group_ids=IDS2), "exactly one of group_size and group_ids .*got both"),
    "ids": (outcome(3, size=None, group_ids=IDS2), r"group_ids .*\(3,\) on cpu, got \(2,\)"),
    "kind of ids": (outcome(2, size=None, group_ids=IDS2 / 2), "group_ids must be integers"),
    "ends": (process(1, 3), r"step_ends must have shape \(1, 3\) on cpu, got \(1, 2\)"),
    "kind of ends": (process(1, 2, ends=((0.5, 1.0),)), "step_ends must be integers"),
    "late step": (process(1, 2, ends=((3, 0),)), "step_ends must be < 3, got 3"),
    "length": (process(1, 2, length=-1), "completion_length must be an integer >= 0, got -1"),
    "values": (gae(VALUES.T), r"values must have shape \(2, 3\) on cpu, got \(3, 2\)"),
    "mask": (gae(VALUES, IDS2), r"mask must have shape \(2, 3\)"),
    "gamma": (gae(VALUES, gamma=1.1), r"gamma must be a number in \[0, 1\], got 1.1"),
    "lam": (gae(VALUES, lam=NAN), r"lam must be a number in \[0, 1\], got nan"),
    "truncated": (lambda: mask_truncated(VALUES, IDS2), "truncated must be bool, got torch.int64"),
    "device": (lambda: whiten(VALUES, VALUES.to("meta")), "mask .*on cpu, got .*on meta"),
}


@pytest.mark.parametrize("call", BAD)
def test_invalid_arguments(call):
    with pytest.raises(ValueError, match=BAD[call][1]):
        BAD[call][0]()
