"""Dynamic sampling: which groups are trained on, what travels with them, and what is counted."""

import pytest
import torch
from trainer_runs import EOS, RewardScores, stream_of, trainer_of

from grpo_fused import GRPOTrainerConfig
from grpo_fused.demo import make_tokenizer
from grpo_fused.trainer.collect import collect
from grpo_fused.trainer.order import epoch_order
from grpo_fused.trainer.rewards import Rewards

TOKENS = make_tokenizer()
# 13 rows, whose epochs end within a round; the groups of prompts that begin with 0 are equal.
ROWS = [{"prompt": f"{a}?{b}=", "answer": str(a * b)} for a, b in
        [(0, 1), (1, 2), (0, 3), (0, 4), (1, 5), (0, 6), (2, 7), (3, 8), (0, 9), (0, 5), (4, 2),
         (0, 7), (0, 8)]]  # fmt: skip
RUN = {"prompts_per_rollout": 3, "num_generations": 4, "max_completion_length": 4, "data": ROWS}


def varied(prompts, trainer):
    """Everything that a rollout_fn may return, different for each place of a group."""
    ids = [[3 + row % 4, 5, EOS][row % 3 :] for row in range(len(prompts))]
    return {
        "completion_ids": ids,
        "logprobs": [[-0.1 * token - 0.01 * i for i, token in enumerate(row)] for row in ids],
        "completion_mask": [[1] * (len(row) - 1) + [int(len(row) < 3)] for row in ids],
        "truncated": [len(row) == 1 for row in ids],
        "support": [[[token, token + 1, 13 - i] for i, token in enumerate(row)] for row in ids],
        "length": list(map(len, ids)),
    }


def by_place(prompts, completions, completion_ids, columns):
    """Different rewards in a group, except where the prompt begins with 0."""
    rewards = [int(p[0]) * (row % 4) for row, p in enumerate(prompts)]
    totals = torch.tensor(rewards, dtype=torch.float32)
    extra = {"prompt": list(prompts)}
    metrics = {"first": [float(prompts[0][0])]}
    return RewardScores(totals, {"place": totals}, metrics=metrics, extra=extra)


def prompts_of(trainer, batch):
    """The prompt of each group; those of its completions are the same."""
    rows = zip(batch.prompt_ids, batch.prompt_mask, strict=True)
    found = [TOKENS.decode(ids[mask]) for ids, mask in rows]
    size = trainer.config.num_generations
    assert all(found[row] == found[row // size * size] for row in range(len(found)))
    return found[::size]


def data_order(size=100):
    """The prompts of the first rows of a run, epoch after epoch."""
    order = [row for epoch in range(size) for row in epoch_order(0, epoch, len(ROWS))]
    return [ROWS[row]["prompt"] for row in order]


@pytest.mark.parametrize("is_stream", [False, True])
def test_every_prompt_is_trained_on_or_left_out_once_an_epoch(is_stream):
    """Prompts that a batch gives back come next, of a stream too, wherever it is resumed."""
    options, order = RUN | {"dynamic_sampling_rounds": 9}, data_order()
    if is_stream:
        options |= {"data": stream_of(ROWS), "shuffle": False}
        order = [row["prompt"] for row in ROWS] * 99
    trainer, _ = trainer_of("unused", rewards=by_place, rollout_fn=varied, **options)
    differing = [place for place, prompt in enumerate(order) if prompt[0] != "0"]
    rounds = set()
    for rollout in range(8):
        start = trainer.data_position
        if is_stream and rollout % 3 == 2:
            place, again = trainer.order.state_dict(start), trainer_of("unused", **options)[0]
            again.order.load_state_dict(place, start)
            trainer.order = again.order
        experience = collect(trainer)
        expected = differing[3 * rollout : 3 * rollout + 3]
        assert prompts_of(trainer, experience.batch) == [order[place] for place in expected]
        assert trainer.data_position == expected[-1] + 1
        number = experience.metrics["dynamic_sampling/rounds"]
        assert number == -(-(expected[-1] + 1 - start) // 3)
        assert experience.metrics["dynamic_sampling/filled_ratio"] == 0
        rounds.add(number)
        assert experience.batch.advantages.view(3, 4).std(1).min() > 0.9
    assert len(rounds) > 1 and trainer.rollouts == 8


def test_without_it_groups_of_equal_rewards_stay():
    trainer, _ = trainer_of("unused", rewards=by_place, rollout_fn=varied, **RUN)
    for rollout in range(3):
        experience = collect(trainer)
        assert prompts_of(trainer, experience.batch) == data_order()[3 * rollout : 3 * rollout + 3]
        assert trainer.data_position == 3 * rollout + 3
        assert not any("dynamic" in name for name in experience.metrics)


def test_at_the_bound_groups_of_equal_rewards_fill_the_batch():
    options = RUN | {"prompts_per_rollout": 6, "dynamic_sampling_rounds": 2}
    trainer, _ = trainer_of("unused", rewards=by_place, rollout_fn=varied, **options)
    experience = collect(trainer)
    drawn = data_order()[:12]
    kept = [place for place, prompt in enumerate(drawn) if prompt[0] != "0"]
    equal = [place for place, prompt in enumerate(drawn) if prompt[0] == "0"]
    assert len(kept) == 5, "the case has to be one in which the batch is not full"
    places = sorted(kept + equal[:1])
    assert prompts_of(trainer, experience.batch) == [drawn[place] for place in places]
    assert trainer.data_position == 12, "all are used up"
    zero = (experience.batch.advantages.view(6, 4) == 0).all(1).tolist()
    assert zero == [place in equal for place in places]
    metrics = experience.metrics
    names = ("rounds", "kept_ratio", "filled_ratio")
    found = [metrics[f"dynamic_sampling/{name}"] for name in names]
    assert found == pytest.approx([2, 5 / 12, 1 / 6])
    assert experience.num_items == [float(experience.batch.completion_mask.sum())]


def test_metrics_are_over_all_completions_and_one_over_the_batch():
    trainer, _ = trainer_of(
        "unused", rewards=by_place, rollout_fn=varied, dynamic_sampling_rounds=9, **RUN
    )
    metrics = collect(trainer).metrics
    number = int(metrics["dynamic_sampling/rounds"])
    drawn = data_order()[: 3 * number]
    firsts = torch.tensor([float(prompt[0]) for prompt in drawn])
    kept = firsts[firsts > 0]
    assert number > 1 and len(kept) < len(drawn)
    assert metrics["reward"] == metrics["rewards/place"] == pytest.approx(1.5 * firsts.mean())
    assert metrics["dynamic_sampling/reward"] == pytest.approx(1.5 * kept[:3].mean())
    assert metrics["dynamic_sampling/kept_ratio"] == pytest.approx(len(kept) / len(drawn))
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 - len(kept) / len(drawn))
    assert metrics["first"] == pytest.approx(firsts[::3].mean()), "log_metric, of every round"


def test_everything_of_a_completion_travels_with_it():
    trainer, _ = trainer_of(
        "unused", rewards=by_place, rollout_fn=varied, dynamic_sampling_rounds=9,
        completions_steps=1, completions_rows=12, **RUN,
    )  # fmt: skip
    batch = collect(trainer).batch
    offsets, kept = batch.support(14)
    counts = offsets.diff().view(batch.completion_ids.shape)
    kept = iter(kept.tolist())
    prompts = prompts_of(trainer, batch)
    places = [place for place, prompt in enumerate(data_order()) if prompt[0] != "0"]
    sampled = varied([""] * 12, None)["completion_ids"]
    for row in range(12):
        mask = batch.attended[row]
        ids = batch.completion_ids[row][mask].tolist()
        assert ids == sampled[places[row // 4] % 3 * 4 + row % 4]
        expected = [-0.1 * token - 0.01 * i for i, token in enumerate(ids)]
        assert batch.sampling_logps[row][mask].tolist() == pytest.approx(expected)
        active = [1] * (len(ids) - 1) + [int(len(ids) < 3)]
        assert batch.completion_mask[row][mask].int().tolist() == active
        for i, token in enumerate(ids):
            assert counts[row, i] == 3
            assert [next(kept) for _ in range(3)] == [token, token + 1, 13 - i]
    table = trainer.run_log.tables[1]
    totals = [float(int(prompts[row // 4][0]) * (row % 4)) for row in range(12)]
    assert [row["reward"] for row in table] == totals == [row["place"] for row in table]
    assert [row["prompt"] for row in table] == [prompts[row // 4] for row in range(12)]


def test_rewards_of_none_are_no_difference():
    """A group without any reward, or with one alone, is left out."""

    def given(prompts, completions, completion_ids, columns):
        totals = by_place(prompts, completions, completion_ids, columns).total
        for row, prompt in enumerate(prompts):
            if prompt[0] == "1" and row % 4 != 2:
                totals[row] = float("nan")
            if prompt[0] == "0" and row % 4 == 2:
                totals[row] = float("nan")
        return RewardScores(totals, {"place": totals})

    trainer, _ = trainer_of(
        "unused", rewards=given, rollout_fn=varied, dynamic_sampling_rounds=9, **RUN
    )
    expected = [prompt for prompt in data_order() if prompt[0] in "234"]
    assert prompts_of(trainer, collect(trainer).batch) == expected[:3]


def test_log_probabilities_in_some_rounds_only_are_an_error():
    calls = []

    def changing(prompts, trainer):
        calls.append(prompts)
        output = varied(prompts, trainer)
        return output if len(calls) == 1 else output | {"logprobs": None}

    options = {"dynamic_sampling_rounds": 9, "rewards": by_place, "rollout_fn": changing}
    trainer, _ = trainer_of("unused", **options, **RUN)
    with pytest.raises(ValueError, match="rollout_fn must return logprobs whenever it is called"):
        collect(trainer)


def test_a_mask_in_some_rounds_only_means_that_the_policy_sampled_the_rest():
    calls = []

    def changing(prompts, trainer):
        calls.append(prompts)
        output = varied(prompts, trainer)
        return output if len(calls) == 1 else output | {"completion_mask": None}

    options = {"dynamic_sampling_rounds": 9, "rewards": by_place, "rollout_fn": changing}
    batch = collect(trainer_of("unused", **options, **RUN)[0]).batch
    masked = (batch.attended & ~batch.completion_mask).view(3, -1).any(1)
    assert len(calls) > 1 and masked.any() and not masked.all()


def test_process_rewards_are_refused():
    def steps(completions, **columns):
        return [[(0, float(row))] for row in range(len(completions))]

    trainer, _ = trainer_of(
        "unused", rewards=Rewards(steps), rollout_fn=varied, dynamic_sampling_rounds=2, **RUN
    )
    with pytest.raises(ValueError, match="dynamic_sampling_rounds must be 1 for process rewards"):
        collect(trainer)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="dynamic_sampling_rounds must be 1 with num_generations"):
        GRPOTrainerConfig(dynamic_sampling_rounds=2, num_generations=1)
