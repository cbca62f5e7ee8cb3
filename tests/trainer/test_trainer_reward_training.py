"""Iterative GRPO: the reward model is trained further on judged samples and replayed pairs."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from reward_models import first_digit, load_reward_model, pairs_of, save_reward_model
from trainer_runs import EOS, HELD_OUT, ROWS, trainer_of, weights_of

from grpo_fused import GRPOTrainerConfig
from grpo_fused.trainer import Rewards, RewardTraining, TrainConfig
from grpo_fused.trainer.reward_training import select_pairs
from grpo_fused.trainer.run.checkpoint import list_checkpoints
from grpo_fused.trainer.run.command import make_rewards, make_trainer

ITERATIVE = {"iterations": 3, "max_steps": 6, "num_iterations": 2, "beta": 0.1}
ITERATIVE |= {"reward_learning_rate": 1e-2, "reward_batch_size": 6, "replay_fraction": 0.4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward") / "model")


def trainer_with(folder, tmp_path, *, preference=first_digit, history=(), model=None, **options):
    model = model or load_reward_model(folder)
    training = RewardTraining(model, preference, history)
    rewards = Rewards(model, training=training)
    return trainer_of(tmp_path, rewards=rewards, **ITERATIVE | options)


def test_the_best_of_a_group_is_paired_with_the_worst():
    nan = math.nan
    scores = [0.0, 3.0, 1.0, 2.0, nan, 1.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0, nan, nan, nan, 1.0]
    texts = [str(i) for i in range(16)]
    assert select_pairs(texts, scores, 4) == [(1, 0), (3, 2), (7, 6)]
    texts[1] = texts[0]  # a judge that contradicts itself
    assert select_pairs(texts, scores, 4) == [(3, 2), (7, 6)]
    assert select_pairs([], [], 4) == []


def bradley_terry(model, pairs, number):
    """The loss of a batch of `number` pairs, one text at a time."""
    total = 0.0
    for pair in pairs:
        scores = []
        for name in ("chosen", "rejected"):
            ids = model.tokenizer(pair["prompt"] + pair[name], return_tensors="pt")["input_ids"]
            scores.append(model.model(ids).logits[0, 0])
        total = total + torch.log1p(torch.exp(scores[1] - scores[0])) / number
    return total


def test_a_training_is_adamw_on_the_bradley_terry_loss(folder, tmp_path):
    """The second of two trainings: other pairs, some of the first, and the same optimizer."""
    trainer, _ = trainer_with(folder, tmp_path, history=pairs_of(9), max_grad_norm=0.0)
    training = trainer.reward_training
    training.model.batch_size = 5  # texts at once: two pairs
    copied = copy.deepcopy(training.model)
    adamw = torch.optim.AdamW(copied.model.parameters(), lr=1e-2, weight_decay=0.0)
    batches = []
    step = training._step

    def noted(pairs):
        batches.append(list(pairs))
        return step(pairs)

    training._step = noted
    for start, new in ((9, 9), (18, 12)):
        training.pairs = pairs_of(new, start)
        earlier = [pair for _, pair in training.history]
        assert len(earlier) == start
        batches.clear()
        training.train()
        trained = sum(batches, [])
        replayed = new * 2 // 3  # 0.4 of the whole
        assert [p in trained for p in pairs_of(new, start)] == [True] * new
        assert sum(p in earlier for p in trained) == replayed
        assert [len(batch) for batch in batches] == ([6, 6, 3] if new == 9 else [6, 6, 6, 2])
        total = 0.0
        for batch in batches:
            loss = bradley_terry(copied, batch, len(batch))
            loss.backward()
            adamw.step()
            adamw.zero_grad()
            total += loss.item()
        metrics = training.metrics
        assert metrics["reward_model/loss"] == pytest.approx(total / len(batches), abs=1e-5)
        assert metrics["reward_model/pairs"] == new
        assert metrics["reward_model/replayed"] == replayed
    for mine, wanted in zip(
        training.model.model.parameters(), copied.model.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, wanted, atol=2e-4, rtol=1e-3)
    assert training.pairs == [] and len(training.history) == 30


def test_the_history_is_a_uniform_sample_of_bounded_size(folder, tmp_path):
    trainer, _ = trainer_with(folder, tmp_path, replay_size=200)
    training = trainer.reward_training
    for i in range(40):
        training.trainings = i
        training._remember([{"iteration": i, "number": j} for j in range(50)])
    assert len(training.history) == 200
    found = [pair["iteration"] for _, pair in training.history]
    assert 60 < sum(i < 20 for i in found) < 140, "an old pair stays as likely as a new one"


def test_an_iteration_refreshes_reference_and_reward_model(folder, tmp_path):
    seen = []

    def on_refresh(trainer):
        mine = trainer.reference.model.parameters()
        assert all(map(torch.equal, mine, trainer.unwrapped.parameters()))
        training = trainer.reward_training
        seen.append((trainer.step, training.trainings, len(training.history)))

    trainer, records = trainer_with(folder, tmp_path, on_refresh=on_refresh)
    before = [p.clone() for p in trainer.reward_training.model.model.parameters()]
    trainer.train()
    assert [(step, number) for step, number, _ in seen] == [(2, 1), (4, 2)]
    assert 0 < seen[0][2] < seen[1][2]
    logged = [step for step, metrics in records.items() if "reward_model/loss" in metrics]
    assert logged == [3, 4, 5, 6], "with the two steps of the rollout that follows"
    assert records[3]["reward_model/pairs"] == seen[0][2] and records[3]["kl"] == 0
    assert 0 <= records[1]["reward_model/accuracy"] <= 1
    assert -1 <= records[1]["reward_model/preference"] <= 9
    saved = load_reward_model(str(tmp_path / "reward_model")).model
    for old, new, loaded in zip(
        before, trainer.reward_training.model.model.parameters(), saved.parameters(), strict=True
    ):
        assert torch.equal(new, loaded) and not torch.equal(old, new)


def test_the_share_of_pairs_that_the_reward_model_orders_as_the_judge_does(folder, tmp_path):
    def sampled(prompts, trainer):
        return {"completion_ids": [[2 + i % 4, EOS] for i in range(len(prompts))]}

    model = load_reward_model(folder)
    texts = [row["prompt"] + str(i) for row in ROWS[:1] for i in range(4)]
    scores = model.score(texts).tolist()
    options = {"rollout_fn": sampled, "data": ROWS[:1], "reward_learning_rate": 0.0}
    trainer, records = trainer_with(folder, tmp_path, model=model, **options)
    trainer.train()
    wanted = ((scores[3] > scores[0]) + (scores[2] > scores[1])) / 2
    assert records[1]["reward_model/accuracy"] == wanted
    assert records[1]["reward_model/preference"] == 1.5


# The reward model is trained before steps 3 and 5; a rollout takes two steps.
def test_resuming_is_bit_identical(folder, tmp_path):
    options = {"eval_data": HELD_OUT[:4], "eval_steps": 2, "replay_size": 20}
    options |= {"history": pairs_of(5)}
    saving = {"save_steps": 1, "save_total_limit": None}
    torch.manual_seed(0)
    whole, expected = trainer_with(folder, tmp_path / "whole", **saving, **options)
    whole.train()
    end = whole.reward_training.state_dict()
    for path in list_checkpoints(tmp_path / "whole")[:-1]:
        first = int(path.name.split("-")[1])
        model = load_reward_model(folder, seed=first)
        resumed, records = trainer_with(
            folder, tmp_path / "again", model=model, resume=str(path), seed=99, **options
        )
        resumed.train()
        assert records == {step: expected[step] for step in range(first + 1, 7)}, path.name
        assert all(torch.equal(weights_of(resumed)[n], w) for n, w in weights_of(whole).items())
        state = resumed.reward_training.state_dict()
        assert all(state[name] == end[name] for name in ("history", "pairs", "trainings"))
        for name, weight in end["model"].items():
            assert torch.equal(state["model"][name], weight), (path.name, name)
        for number, values in end["optimizer"]["state"].items():
            for name, value in values.items():
                assert torch.equal(state["optimizer"]["state"][number][name], value)
    last = list_checkpoints(tmp_path / "whole")[-1]
    other, _ = trainer_of(tmp_path / "again", resume=str(last), **ITERATIVE)
    with pytest.raises(ValueError, match="resume: no reward model is trained, .* trained one"):
        other.train()
    larger = load_reward_model(folder)
    larger.model.config.rms_norm_eps = 0.1
    other, _ = trainer_with(
        folder, tmp_path / "again", model=larger, resume=str(last), history=pairs_of(5),
        replay_size=20,
    )  # fmt: skip
    with pytest.raises(ValueError, match="rms_norm_eps of the reward model is 0.1, the checkpoint"):
        other.train()
    longer, _ = trainer_with(
        folder, tmp_path / "again", resume=str(last), history=pairs_of(5), replay_size=20,
        max_steps=12,
    )  # fmt: skip
    with pytest.raises(ValueError, match="resume: max_steps is 12, the checkpoint has 6"):
        longer.train()


def test_less_history_than_its_share_is_said(folder, tmp_path):
    trainer, _ = trainer_with(folder, tmp_path, history=pairs_of(3))
    training = trainer.reward_training
    training.pairs = pairs_of(9, 9)
    with pytest.warns(UserWarning, match="0.4 asks for 6 pairs .* 9 new ones, but there are 3$"):
        training.train()
    assert training.metrics["reward_model/replayed"] == 3
    training.history, training.pairs = [], pairs_of(9)
    with pytest.warns(UserWarning, match=r"there are 0; a history \(reward_data\) gives"):
        training.train()


def test_an_iteration_in_which_nothing_differs_is_said(folder, tmp_path):
    trainer, records = trainer_with(folder, tmp_path, preference=lambda completions: [None] * 16)
    before = [p.clone() for p in trainer.reward_training.model.model.parameters()]
    with pytest.warns(UserWarning, match="model is not trained: in this iteration, no two compl"):
        trainer.train()
    after = trainer.reward_training.model.model.parameters()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert records[3]["reward_model/pairs"] == 0 and "reward_model/loss" not in records[3]
    assert "reward_model/accuracy" not in records[1]


def test_a_gradient_that_is_not_finite_is_not_applied(folder, tmp_path):
    trainer, _ = trainer_with(folder, tmp_path, save_steps=1)
    model = trainer.reward_training.model.model
    trainer.on_refresh = None

    def broken(parameter):
        parameter.grad.fill_(math.nan)

    model.score.weight.register_post_accumulate_grad_hook(broken)
    message = "grad_norm of reward model model is nan in its training 1; the step is not applied"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-2"
    again, _ = trainer_with(folder, tmp_path, resume="latest")
    assert again.train().step == 6


def test_chats_are_judged_and_trained_on(folder, tmp_path):
    data = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS[:8]]
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = load_reward_model(folder)
    model.tokenizer.chat_template = template
    policy_tokenizer = copy.deepcopy(model.tokenizer)
    judged = []

    def judge(completions, **columns):
        judged.extend(completions)
        return first_digit([messages[-1]["content"] for messages in completions])

    trainer, records = trainer_with(
        folder, tmp_path, model=model, preference=judge, data=data, tokenizer=policy_tokenizer,
        save_steps=6,
    )  # fmt: skip
    trainer.train()
    assert judged[0][0]["role"] == "assistant" and records[3]["reward_model/pairs"] > 0
    pair = trainer.reward_training.history[0][1]
    assert pair["prompt"] in [row["prompt"] for row in data]
    assert pair["chosen"] in judged and pair["rejected"] in judged


@pytest.mark.parametrize(
    "options, message",
    [
        ({"iterations": 1, "beta": 0.0}, "requires iterations above 1 or reference_refresh_rollo"),
        ({"iterations": 4}, "iterations must divide max_steps .* = 3 rollouts, got 4"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"reference_refresh_rollouts": 1}, "reference_refresh_rollouts must be none with itera"),
        ({"replay_fraction": 1.0}, "replay_fraction must be below 1, got 1.0"),
        ({"replay_size": 0}, "replay_size must be at least 1, got 0"),
        ({"history": [{"prompt": "a", "chosen": "b"}]}, "row 0 of the history .* must have prompt"),
        ({"history": [*pairs_of(1), {"prompt": "a", "chosen": "b", "rejected": []}]}, "row 1 of"),
        ({"history": ["a"]}, "row 0 of the history of a reward model .* got 'a'"),
        (
            {"rewards": first_digit},
            "its model must be one of the rewards, got first",
        ),
        ({"model": first_digit}, "model must be a RewardModel, got function"),
    ],
)
def test_bad_input_is_an_error_that_names_it(folder, tmp_path, options, message):
    options = ITERATIVE | options
    model = options.pop("model", None) or load_reward_model(folder)
    with pytest.raises(ValueError, match=message):
        training = RewardTraining(model, first_digit, options.pop("history", ()))
        rewards = Rewards(options.pop("rewards", model), training=training)
        trainer_of(tmp_path, rewards=rewards, **options)
    assert not list(tmp_path.iterdir())


def test_iterations_without_anything_to_refresh(tmp_path):
    with pytest.raises(ValueError, match="iterations requires beta > 0 or the training .* 2"):
        trainer_of(tmp_path, iterations=2)
    assert GRPOTrainerConfig(max_steps=12, iterations=3, num_iterations=2).refresh_rollouts == 2
    assert GRPOTrainerConfig(beta=0.1, reference_refresh_rollouts=7).refresh_rollouts == 7


GIVEN = {"model": "m", "data": "d", "reward_model": "r", "preference": "exact_match"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"preference": None}, "reward_model r requires a preference to train it by, got none"),
        ({"reward_model": None}, "rewards is required"),
        ({"reward_model": None, "rewards": ["x"]}, "preference requires reward_model, got 'exact"),
        (
            {"reward_model": None, "preference": None, "rewards": ["x"], "reward_data": "y"},
            "reward_data requires reward_model, got 'y'",
        ),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights must be one per reward, 1, got 2"),
    ],
)
def test_settings_of_train(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**GIVEN | options)
    assert TrainConfig(**GIVEN).rewards == []


def test_train_from_a_config(folder, tmp_path):
    rows, pairs = tmp_path / "rows.jsonl", tmp_path / "pairs.jsonl"
    rows.write_text("\n".join(f'{{"prompt": "{r["prompt"]}", "answer": "1"}}' for r in ROWS[:8]))
    pairs.write_text('{"prompt": "1?2=", "chosen": "2", "rejected": "1"}')
    trainer_of(tmp_path / "start", max_steps=1)[0].train()
    options = {"model": str(tmp_path / "start" / "model"), "data": str(rows), "beta": 0.1}
    options |= {"output_dir": str(tmp_path / "run"), "reward_model": folder, "report_to": []}
    options |= {"preference": "exact_match", "reward_data": str(pairs), "rewards": ["exact_match"]}
    options |= {"iterations": 2, "max_steps": 2, "reward_weights": [0.5, 2.0]}
    trainer = make_trainer(TrainConfig(**options))
    assert list(trainer.rewards.functions) == ["exact_match", "model"]
    assert trainer.rewards.weights == [0.5, 2.0]
    assert trainer.reward_training.given_history == [
        {"prompt": "1?2=", "chosen": "2", "rejected": "1"}
    ]
    with pytest.raises(ValueError, match="reward_model .*/nowhere cannot be loaded"):
        make_rewards(SimpleNamespace(**options | {"reward_model": str(tmp_path / "nowhere")}))
