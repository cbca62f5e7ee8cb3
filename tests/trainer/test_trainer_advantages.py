"""Advantages that the settings of a run choose, against direct calls of the functions."""

import pytest
import torch
from trainer_runs import RewardScores, trainer_of

from grpo_fused import (
    GRPOTrainerConfig,
    multi_reward_advantages,
    outcome_advantages,
    pass_at_k_advantages,
)
from grpo_fused.trainer.collect import collect
from grpo_fused.trainer.experience import step_advantages
from grpo_fused.trainer.rewards import Rewards

GROUPS = torch.arange(16) // 4
ADVANTAGES = {
    "maxrl": ({"scale_rewards": "mean"}, {"scale": "mean"}),
    "reinforce++": ({"baseline": "batch"}, {"group_ids": torch.zeros_like(GROUPS)}),
    "reinforce++-baseline": ({"scale_rewards": "centred"}, {"scale": "centred"}),
    "rloo": (
        {"baseline": "leave_one_out", "scale_rewards": "none"},
        {"leave_one_out": True, "scale": "none"},
    ),
    "opo": ({"baseline": "length", "scale_rewards": "none"}, {"scale": "none"}),
}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_of_the_config(tmp_path, name):
    """Every advantage is that of its function; completions without a reward do not count."""
    options, wanted = ADVANTAGES[name]
    totals = torch.rand(16, generator=torch.Generator().manual_seed(0))
    totals[[2, 9]] = float("nan")

    def rewards(*_):
        return RewardScores(totals, {})

    def odd_lengths(prompts, trainer):
        ids = [[4, 5][: 1 + i % 2] for i in range(len(prompts))]
        masks = [[int(i % 3 > 0)] * len(x) for i, x in enumerate(ids)]
        return {"completion_ids": ids, "completion_mask": masks}

    trainer, _ = trainer_of(tmp_path, rewards=rewards, rollout_fn=odd_lengths, **options)
    batch = collect(trainer).batch
    kept = ~totals.isnan()
    if name == "opo":
        lengths = batch.completion_mask.sum(1)
        assert len(lengths.unique()) == 3
        wanted = wanted | {"lengths": lengths[kept]}
    wanted = {"group_ids": GROUPS} | wanted
    wanted["group_ids"] = wanted["group_ids"][kept]
    assert torch.equal(batch.advantages[kept], outcome_advantages(totals[kept], **wanted))
    assert (batch.advantages[~kept] == 0).all() and batch.advantages.norm() > 0.5


def test_advantages_for_pass_at_k(tmp_path):
    totals = (torch.arange(16) % 5 == 0).float()
    trainer, _ = trainer_of(tmp_path, rewards=lambda *_: RewardScores(totals, {}), pass_at_k=2)
    assert torch.equal(collect(trainer).batch.advantages, pass_at_k_advantages(totals, 2, 4))


def test_advantages_of_several_rewards(tmp_path):
    """GDPO, with the weights of the functions; one of them scores only some completions."""
    passed = [float(i % 3 == 0) for i in range(16)]
    lengths = [None if i % 5 == 0 else float(i) for i in range(16)]
    rewards = Rewards([lambda **_: passed, lambda **_: lengths], [1.0, 0.5])
    options = {"multi_objective_aggregation": "normalize_then_sum"}
    trainer, _ = trainer_of(tmp_path, rewards=rewards, **options)
    nan = float("nan")
    table = torch.tensor([passed, [nan if x is None else x for x in lengths]]).T
    wanted = multi_reward_advantages(table, 4, weights=torch.tensor([1.0, 0.5]))
    assert torch.equal(collect(trainer).batch.advantages, wanted) and wanted.norm() > 1
    totals = RewardScores(torch.tensor(passed), {})
    trainer, _ = trainer_of(tmp_path, rewards=lambda *_: totals, **options)
    with pytest.raises(ValueError, match="must be sum_then_normalize for rewards without weights"):
        collect(trainer)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale_rewards": "mean"}, "scale_rewards must be group or none for process .*'mean'"),
        ({"baseline": "length"}, "baseline must be group for process rewards, got 'length'"),
        ({"pass_at_k": 2}, "pass_at_k must be none for process rewards, got 2"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation must be sum_then_normalize for process rewards",
        ),
    ],
)
def test_process_rewards_have_no_other_advantages(options, message):
    with pytest.raises(ValueError, match=message):
        step_advantages([[(0, 1.0)]] * 8, 1, GRPOTrainerConfig(**options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"baseline": "token"}, "baseline must be one of group, leave_one_out, .*got 'token'"),
        ({"pass_at_k": 9}, "pass_at_k must be at most num_generations = 8, got 9"),
        ({"pass_at_k": 0}, "pass_at_k must be at least 1, got 0"),
        (
            {"pass_at_k": 2, "scale_rewards": "none"},
            "scale_rewards must be group with pass_at_k, got 'none'",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "baseline": "length"},
            "baseline must be group with multi_objective_aggregation norm.*, got 'length'",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "pass_at_k": 2},
            "pass_at_k must be none with multi_objective_aggregation normalize_then_sum, got 2",
        ),
    ],
)
def test_settings_that_would_be_ignored(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOTrainerConfig(**options)
