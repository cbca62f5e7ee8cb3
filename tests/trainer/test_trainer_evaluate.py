"""Evaluation of a model by the command, and what rewards log in it."""

import json
import os

import pytest
import torch
from trainer_runs import HELD_OUT, trainer_of

from grpo_fused import cli
from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.rewards import Rewards
from grpo_fused.trainer.run.evaluation import evaluate


def digits(completions, answer, log_metric):
    log_metric("exact", sum(map(str.__eq__, completions, answer)) / len(answer))
    return [float(text[:1].isdigit()) for text in completions]


@pytest.fixture
def folder(tmp_path):
    """A folder with a model and held-out rows."""
    torch.manual_seed(3)
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    return tmp_path


def test_log_metric_in_an_evaluation(tmp_path):
    """The mean over batches, as in a rollout."""
    options = {"eval_data": HELD_OUT, "eval_steps": 2, "eval_batch_size": 5, "max_steps": 2}
    trainer, records = trainer_of(tmp_path, rewards=Rewards(digits), **options)
    trainer.train()
    found = evaluate(trainer)
    assert records[2]["eval/exact"] == found["eval/exact"]
    assert 0 <= found["eval/exact"] <= found["eval/reward"]
    assert "exact" in records[1]


def test_the_command_evaluates_a_model(folder, capsys):
    """The numbers of an evaluation in training; nothing is written."""
    trainer, _ = trainer_of(
        folder / "run",
        rewards=Rewards("exact_match"),
        eval_data=HELD_OUT,
        eval_steps=1,
    )
    expected = evaluate(trainer)
    given = {"model": folder / "model", "data": folder / "held.jsonl"}
    given |= {"eval_data": folder / "held.jsonl", "rewards": "exact_match"}
    given |= {"output_dir": folder / "out", "max_completion_length": 2}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert cli.main(["evaluate", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == pytest.approx(expected)
    assert not (folder / "out").exists()
    assert cli.main(["evaluate", *words[:4], "--rewards", "exact_match"]) == 1
    assert "requires eval_data" in capsys.readouterr().err


def test_a_reader_that_stops(monkeypatch):
    """As `grpo-fused train --help | head`."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert cli.main(["train", "--help"]) == 141


def test_a_connection_that_breaks_is_no_reader_that_stops(monkeypatch):
    def breaks(*_):
        raise BrokenPipeError("server")

    monkeypatch.setattr(cli, "with_config", breaks)
    with pytest.raises(BrokenPipeError, match="server"):
        cli.main(["train", "config.yaml"])
