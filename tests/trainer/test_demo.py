"""The demo learns, writes its files, saves its work on Ctrl-C and rejects invalid options."""

import dataclasses
import json
import re
import signal

import pytest
import torch
from trainer_runs import signal_after
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fused import GRPOTrainerConfig, __version__, cli
from grpo_fused.demo import DemoOptions, make_problems, reward_of
from grpo_fused.trainer import TrainingError, TrainResult

KEYS = ["step", "reward", "reward_std", "loss", "kl", "entropy", "clip_ratio/region_mean"]
SMALL = ["--prompts-per-step", "3", "--num-generations", "4"]


@pytest.fixture(autouse=True)
def same_number_of_threads():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def read_metrics(output_dir):
    with open(output_dir / "metrics.jsonl") as lines:
        return [json.loads(line) for line in lines]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def share_right(checkpoint, problems):
    """Greedy accuracy of a saved model, computed with transformers and `reward_of` alone."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    prompts, answers = zip(*problems, strict=True)
    inputs = tokenizer(list(prompts), return_tensors="pt", return_token_type_ids=False)
    sequences = model.generate(**inputs, do_sample=False)
    texts = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :])
    return mean(reward_of(text, answer) for text, answer in zip(texts, answers, strict=True))


def test_the_model_learns_and_everything_is_written(tmp_path, capsys):
    assert cli.main(["demo", "--output-dir", str(tmp_path), "--steps", "120"]) == 0

    evaluated, *metrics = read_metrics(tmp_path)
    assert evaluated["step"] == 0 and evaluated["eval/reward"] < 0.2
    assert [line["step"] for line in metrics] == list(range(1, 241))
    assert all(line.keys() >= set(KEYS) for line in metrics)
    first, last = metrics[:20], metrics[-20:]  # two updates with each rollout
    first_reward, last_reward = (mean(line["reward"] for line in lines) for lines in (first, last))
    assert first_reward < 0.2
    assert last_reward > 0.8
    assert mean(line["entropy"] for line in last) < mean(line["entropy"] for line in first)
    assert metrics[-1]["kl"] > 0.1
    assert any(line["clip_ratio/region_mean"] > 0 for line in metrics)
    held_out = metrics[-1]["eval/reward"]
    assert held_out > 0.6
    ended, accuracy = capsys.readouterr().out.splitlines()[-2:]
    assert accuracy == f"held-out accuracy: {held_out:.2f} (20 prompts, greedy)"
    assert re.fullmatch(
        rf"trained 240 of 240 steps in .*; reward {first_reward:.3g} -> {last_reward:.3g}; (no .*; "
        rf")?model, metrics.jsonl, reward.png in {tmp_path}",
        ended,
    )

    picture = (tmp_path / "reward.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 20_000
    assert share_right(tmp_path / "model", make_problems()[0]) > 0.8
    assert share_right(tmp_path / "model", make_problems()[1]) == pytest.approx(held_out)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"metrics.jsonl", "reward.png", "model"}


def test_interrupt_saves_the_run(tmp_path, capsys, default_sigint):
    path = tmp_path / "metrics.jsonl"
    with signal_after(signal.SIGINT, path, lines=3):
        assert cli.main(["demo", "--output-dir", str(tmp_path), "--steps", "100000", *SMALL]) == 130
    metrics = read_metrics(tmp_path)
    assert [line["step"] for line in metrics] == list(range(len(metrics)))
    message = capsys.readouterr().out.splitlines()[-1]
    assert message.startswith("interrupted after ") and "of 200000 steps" in message
    assert message.endswith(f"model, metrics.jsonl, reward.png, checkpoints in {tmp_path}")
    assert (tmp_path / "reward.png").stat().st_size > 5_000
    assert 0 <= share_right(tmp_path / "model", make_problems()[1]) <= 1


def test_a_seed_repeats_and_a_second_run_replaces_the_first(tmp_path, no_plot):
    options = ["demo", "--output-dir", str(tmp_path / "a" / "b"), *SMALL]
    runs = []
    for steps in ("4", "3"):
        # 0, because the learning rate of a step depends on the number of steps
        assert cli.main([*options, "--steps", steps, "--learning-rate", "0"]) == 0
        runs.append(read_metrics(tmp_path / "a" / "b"))
    assert [run[-1]["step"] for run in runs] == [8, 6]
    for one, other in zip(runs[0][1:], runs[1][1:], strict=False):
        assert [one[key] for key in KEYS] == [other[key] for key in KEYS]


def test_a_run_replaces_an_interrupted_one(tmp_path, no_plot):
    """An interrupted run leaves a checkpoint, and `grpo-fused train` would refuse its folder."""
    (tmp_path / "checkpoint-3").mkdir()
    assert cli.main(["demo", "--output-dir", str(tmp_path), "--steps", "1", *SMALL]) == 0
    assert not (tmp_path / "checkpoint-3").exists()


def test_options_reach_the_trainer(tmp_path, no_plot, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    options = ["--steps", "3", "--beta", "0", "--num-iterations", "1", "--prompts-per-step", "2"]
    options += ["--num-generations", "3", "--learning-rate", "0.01", "--threads", "2"]
    options += ["--loss-type", "gspo"]
    assert cli.main(["demo", "--output-dir", str(tmp_path), *options]) == 0
    lines = read_metrics(tmp_path)[1:]
    assert threads[0] == 2 and len(lines) == 3
    for i, line in enumerate(lines):
        assert "kl" not in line and line["clip_ratio/region_mean"] == 0  # no reference, on policy
        assert 6 <= line["num_tokens"] <= 12
        assert line["learning_rate"] == pytest.approx(0.01 * (1 - i / 3))


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("7<eos>", 1.0),
        ("7<eos><pad>", 1.0),
        ("7", 0.0),
        ("77", 0.0),
        ("3<eos>", 0.0),
        ("<eos><pad>", 0.0),
        ("7<pad>", 0.0),
    ],
)
def test_reward(text, reward):
    assert reward_of(text, "7") == reward


def test_problems_are_split_without_overlap():
    train, held_out = make_problems()
    assert (len(train), len(held_out)) == (80, 20)
    assert len(set(train) | set(held_out)) == 100
    assert ("7?3=", "7") in train + held_out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "must be at least 1, got 0"),
        ("--steps", "many", "invalid int value: 'many'"),
        ("--seed", "-1", "must be from 0 to 4294967295, got -1"),
        ("--prompts-per-step", "0", "must be at least 1, got 0"),
        ("--num-generations", "1", "must be at least 2, got 1"),
        ("--loss-type", "grop", "must be one of grpo, "),
        ("--beta", "-0.1", "must be at least 0, got -0.1"),
        ("--learning-rate", "nan", "must be at least 0, got nan"),
        ("--learning-rate", "inf", "must be at least 0, got inf"),
        ("--num-iterations", "0", "must be at least 1, got 0"),
        ("--threads", "0", "must be at least 1, got 0"),
        ("--output-dir", __file__, "is not a directory"),
        ("--max-steps", "0", "must be at least 1, got 0"),
        ("--prompts-per-rollout", "0", "must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(capsys, option, value, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", option, value])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: " in error and message in error


def test_options_are_spelled_as_those_of_train(monkeypatch, tmp_path, capsys):
    """With - or _, and by the names of the config; the names of before keep working."""
    given = []
    ended = TrainResult(1, None, None, None, 0.0, 0, 0, tmp_path)
    monkeypatch.setattr("grpo_fused.demo.run_demo", lambda options: given.append(options) or ended)
    for text in (
        "--output_dir a_b --max_steps 6 --prompts_per_rollout 4 --loss_type gspo",
        "--output-dir a_b --max-steps 6 --prompts-per-rollout 4 --loss-type gspo",
        "--output_dir=a_b --steps=3 --prompts_per_step=4 --loss_type=gspo",
        "--output-dir a_b --steps 3 --prompts-per-step 4 --loss-type gspo",
    ):
        assert cli.main(["demo", *text.split()]) == 0
    assert given == given[:1] * 4 and str(given[0].output_dir) == "a_b"
    assert (given[0].max_steps, given[0].prompts_per_rollout) == (6, 4)
    assert cli.main(["demo"]) == 0 and given[-1].max_steps == 500
    fields = {field.name for field in dataclasses.fields(GRPOTrainerConfig)}
    assert set(DemoOptions._fields) - fields == {"threads"}
    with pytest.raises(SystemExit):
        cli.main(["demo", "--steps", "3", "--max-steps", "3"])
    assert "--steps and --max-steps: give one of them" in capsys.readouterr().err


def test_errors_of_a_demo_take_one_line(monkeypatch, capsys):
    def fails(options):
        raise TrainingError("no space left")

    monkeypatch.setattr("grpo_fused.demo.run_demo", fails)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "grpo-fused demo: no space left\n"


def test_version(capsys):
    assert cli.main(["train", "--version"]) == 0
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"grpo-fused {__version__}\n" * 2
