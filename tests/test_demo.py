"""The demo learns, writes what it promises, survives Ctrl-C and refuses bad options."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fused import LOSSES, cli
from grpo_fused.demo import make_model, make_problems, make_tokenizer, reward_of, roll_out

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
    """Greedy accuracy of a checkpoint, with nothing of ours but the reward."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    prompts, answers = zip(*problems, strict=True)
    inputs = tokenizer(list(prompts), return_tensors="pt", return_token_type_ids=False)
    sequences = model.generate(**inputs, do_sample=False)
    texts = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :])
    return mean(reward_of(text, answer) for text, answer in zip(texts, answers, strict=True))


def test_the_model_learns_and_everything_is_written(tmp_path, capsys):
    assert cli.main(["demo", "--output-dir", str(tmp_path), "--steps", "120"]) == 0

    metrics = read_metrics(tmp_path)
    assert [line["step"] for line in metrics] == list(range(1, 121))
    assert all(list(line) == [*KEYS, "seconds"] for line in metrics)
    first, last = metrics[:10], metrics[-10:]
    first_reward, last_reward = (mean(line["reward"] for line in lines) for lines in (first, last))
    assert first_reward < 0.2
    assert last_reward > 0.8
    assert mean(line["entropy"] for line in last) < mean(line["entropy"] for line in first)
    assert metrics[-1]["kl"] > 0.1
    assert any(line["clip_ratio/region_mean"] > 0 for line in metrics)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"mean reward: {first_reward:.2f} (first 10 steps) -> {last_reward:.2f} (last 10 steps)"
    )

    picture = (tmp_path / "reward.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 20_000
    assert share_right(tmp_path / "checkpoint", make_problems()[0]) > 0.8
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"metrics.jsonl", "reward.png", "checkpoint"}


def test_interrupt_saves_and_says_so(tmp_path):
    # A shell that starts pytest in the background leaves SIGINT ignored: the child resets it.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from grpo_fused.cli import main; sys.exit(main())"
    )
    arguments = ["demo", "--output-dir", str(tmp_path), "--steps", "100000", *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,  # not the checkout, whose folders must not be importable
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    metrics_path = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics_path.exists() and metrics_path.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)

    assert process.returncode == 130
    metrics = read_metrics(tmp_path)
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    message = output.splitlines()[-1]
    assert message.startswith("interrupted after ") and "of 100000 steps" in message
    assert f"saved metrics.jsonl, reward.png and checkpoint/ in {tmp_path}" in message
    assert (tmp_path / "reward.png").stat().st_size > 5_000
    assert 0 <= share_right(tmp_path / "checkpoint", make_problems()[1]) <= 1


def test_a_seed_repeats_and_a_second_run_replaces_the_first(tmp_path):
    options = ["demo", "--output-dir", str(tmp_path / "a" / "b"), *SMALL]
    runs = []
    for steps in ("4", "3"):
        # same learning rates: a schedule over 4 steps would differ from one over 3
        assert cli.main([*options, "--steps", steps, "--learning-rate", "0"]) == 0
        runs.append(read_metrics(tmp_path / "a" / "b"))
    assert [len(run) for run in runs] == [4, 3]
    for one, other in zip(runs[0], runs[1], strict=False):
        assert [one[key] for key in KEYS] == [other[key] for key in KEYS]


def test_beta_zero_still_reports_the_kl(tmp_path):
    options = ["--steps", "3", "--beta", "0", "--learning-rate", "0.01", *SMALL]
    assert cli.main(["demo", "--output-dir", str(tmp_path), *options]) == 0
    assert read_metrics(tmp_path)[-1]["kl"] > 0


def test_one_iteration_is_on_policy_and_never_clips(tmp_path):
    options = ["--steps", "3", "--num-iterations", "1", "--learning-rate", "0.01", *SMALL]
    assert cli.main(["demo", "--output-dir", str(tmp_path), *options]) == 0
    assert [line["clip_ratio/region_mean"] for line in read_metrics(tmp_path)] == [0.0] * 3


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_runs(tmp_path, loss_type):
    options = ["--steps", "2", "--loss-type", loss_type, *SMALL]
    assert cli.main(["demo", "--output-dir", str(tmp_path), *options]) == 0
    assert len(read_metrics(tmp_path)) == 2


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


def test_rollout_groups_are_neighbours_and_the_mask_ends_with_the_end_token():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    rollout = roll_out(make_model(tokenizer), tokenizer, ["1?2=", "9?0="], num_generations=40)
    prompts = tokenizer.batch_decode(rollout.sequences[:, :4])
    assert prompts == ["1?2="] * 40 + ["9?0="] * 40
    ends_at_once = 0
    for ids, mask in zip(rollout.completion_ids.tolist(), rollout.completion_mask, strict=True):
        length = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else 2
        assert mask.tolist() == [True] * length + [False] * (2 - length)
        ends_at_once += length == 1
    assert ends_at_once > 0
    assert torch.equal(rollout.attention_mask[:, 4:], rollout.completion_mask.long())


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
    ],
)
def test_bad_options_are_named(capsys, option, value, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", option, value])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: " in error and message in error


def test_without_the_extra_help_works_and_the_demo_names_what_is_missing(tmp_path):
    program = (
        "import sys; sys.modules.update(transformers=None, tqdm=None)\n"
        "from grpo_fused.cli import main; sys.exit(main())"
    )

    def run(*arguments):
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    shown = run("demo", "--help")
    assert shown.returncode == 0 and "--num-generations" in shown.stdout
    refused = run("demo")
    assert refused.returncode == 1
    assert refused.stderr == (
        'grpo-fused demo needs tqdm, transformers: pip install "grpo-fused[train]"\n'
    )
    assert list(tmp_path.iterdir()) == []
