"""Soft overlong punishment: its formula, and how it joins the rewards."""

import math

import pytest
import torch
from trainer_runs import EOS, HELD_OUT, RewardScores, trainer_of

from grpo_fused import GRPOTrainerConfig
from grpo_fused.trainer.collect import collect
from grpo_fused.trainer.rewards import Rewards
from grpo_fused.trainer.rewards.overlong import punish_overlong, soft_overlong_punishment


def equation_13(length, limit, cache):
    """As DAPO's paper prints it."""
    if length <= limit - cache:
        return 0.0
    if length <= limit:
        return ((limit - cache) - length) / cache
    return -1.0


@pytest.mark.parametrize("limit, cache", [(10, 4), (10, 10), (7, 1), (20480, 4096)])
def test_formula(limit, cache):
    edges = (0, 1, limit - cache - 1, limit - cache, limit - cache + 1, limit - 1, limit, limit + 3)
    lengths = [length for length in edges if length >= 0]
    expected = [equation_13(length, limit, cache) for length in lengths]
    found = soft_overlong_punishment(torch.tensor(lengths), limit, cache)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-7)
    assert found[lengths.index(limit)] == -1 and found[lengths.index(limit - cache)] == 0


IDS = [[5] * 2, [5] * 4, [5] * 3, [5] * 4]


def test_it_is_one_more_reward_of_weight_1():
    def some(completions):
        return [1.0, 0.5, None, None]

    def other(completions):
        return [1.0, None, 2.0, None]

    scores = Rewards([some, other], [2.0, 3.0])([""] * 4, [""] * 4, IDS, {})
    found = punish_overlong(scores, IDS, 4, 2)
    assert found.total[:3].tolist() == [5.0, 0.0, 5.5] and math.isnan(found.total[3])
    assert list(found.each) == ["some", "other", "overlong_punishment"]
    assert found.each["overlong_punishment"][:3].tolist() == [0.0, -1.0, -0.5]
    assert math.isnan(found.each["overlong_punishment"][3]), "no reward stays no reward"
    assert found.weights == [2.0, 3.0, 1.0] and found.steps is None
    assert scores.total[:3].tolist() == [5.0, 1.0, 6.0] and len(scores.each) == 2
    assert punish_overlong(scores, IDS, 4, None) is scores


def test_of_steps_it_is_the_last():
    def steps(completions):
        return [[(0, 1.0), (1, 2.0)], [(3, 1.0)], [], None]

    found = punish_overlong(Rewards(steps)([""] * 4, [""] * 4, IDS, {}), IDS, 4, 2)
    assert found.steps == [[(0, 1.0), (1, 2.0), (1, 0.0)], [(3, 1.0), (3, -1.0)], [], []]
    assert found.total[:2].tolist() == [3.0, 0.0]
    number = punish_overlong(Rewards(lambda completions: [1.0] * 4)([""] * 4, [""] * 4, IDS, {}),
                             IDS, 4, 2)  # fmt: skip
    assert number.as_steps(IDS)[1] == [(3, 1.0), (3, -1.0)], "where another rank has steps"


def test_a_function_of_its_name_is_refused():
    def overlong_punishment(completions):
        return [0.0] * 4

    scores = Rewards(overlong_punishment)([""] * 4, [""] * 4, IDS, {})
    with pytest.raises(ValueError, match="rewards must not have the name overlong_punishment"):
        punish_overlong(scores, IDS, 4, 2)


def growing(prompts, trainer):
    """Completions of 1 to 4 tokens in each group."""
    return {"completion_ids": [[5] * (row % 4) + [EOS] for row in range(len(prompts))]}


def ones(prompts, completions, completion_ids, columns):
    totals = torch.ones(len(prompts))
    return RewardScores(totals, {"ones": totals})


def test_training_rewards_have_it_and_evaluations_have_not(tmp_path):
    options = {"rewards": ones, "rollout_fn": growing, "max_completion_length": 4, "max_steps": 1}
    options |= {"eval_data": HELD_OUT[:4], "eval_steps": 1, "soft_punish_cache": 2}
    trainer, records = trainer_of(tmp_path, **options)
    trainer.train()
    assert records[1]["reward"] == pytest.approx(1 - 1.5 / 4)
    assert records[1]["rewards/ones"] == 1
    assert records[1]["rewards/overlong_punishment"] == pytest.approx(-1.5 / 4)
    assert records[1]["eval/reward"] == 1 and records[1]["grad_norm"] > 0
    plain, records = trainer_of(tmp_path / "plain", **options | {"soft_punish_cache": None})
    plain.train()
    assert records[1]["reward"] == 1 and records[1]["grad_norm"] == 0


def test_dynamic_sampling_looks_at_rewards_before_the_punishment():
    """In DAPO, groups are left out by accuracy: a difference of lengths keeps none."""
    options = {"rewards": ones, "rollout_fn": growing, "max_completion_length": 4}
    options |= {"soft_punish_cache": 2, "dynamic_sampling_rounds": 3}
    metrics = collect(trainer_of("unused", **options)[0]).metrics
    assert metrics["dynamic_sampling/rounds"] == 3 and metrics["dynamic_sampling/kept_ratio"] == 0
    assert metrics["dynamic_sampling/reward"] == pytest.approx(1 - 1.5 / 4), "of what is trained on"


def test_the_cache_must_fit_the_limit():
    with pytest.raises(ValueError, match="soft_punish_cache must be at most .* = 8, got 9"):
        GRPOTrainerConfig(soft_punish_cache=9, max_completion_length=8)
    GRPOTrainerConfig(soft_punish_cache=8, max_completion_length=8)
    with pytest.raises(ValueError, match="soft_punish_cache must be none with pass_at_k, .* got 4"):
        GRPOTrainerConfig(soft_punish_cache=4, pass_at_k=2)
