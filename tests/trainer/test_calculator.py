"""examples/calculator.py: what the tool runs, what a rollout of several turns is, and learning."""

import sys
from pathlib import Path

import pytest
import torch

from grpo_fused.trainer.collect import collect

ROOT = Path(__file__).parents[2]
SMALL = {"prompts_per_rollout": 2, "num_generations": 4, "micro_batch_size": 8, "max_steps": 2}
SMALL |= {"progress_bar": False}
sys.path.append(str(ROOT / "examples"))

import calculator  # noqa: E402


@pytest.mark.parametrize(
    "expression, result",
    [
        ("38*47", "1786"),
        (" 1 - 3 ", "-2"),
        ("-(2+3)*+4", "-20"),
        ("1/4", "0.25"),
        ("1e3/3", "333.333"),
        ("7" * 99, "7" * 99),
        ("(" * 40 + "1" + ")" * 40, "1"),
        ("-" * 98 + "1", "1"),
    ],
)
def test_arithmetic(expression, result):
    assert calculator.calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "", "3*", "007", "1/0", "1e999", "1e999-1e999", "9**9**9", "2<3", "1,2", "[1]", "1j",
        "True", "'a'*3", "x", "x:=1", "abs(-1)", "open('ran','w')", "__import__('os').mkdir('ran')",
        "1 if 2", "lambda:1", "(1).real", "3%2", "1<<99", "~1", "3\x00", "1" * 101, "(" * 100,
        "+".join("1" * 60),
    ],
)  # fmt: skip
def test_anything_else_is_not_run(expression, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert calculator.calculate(expression) == "?"
    assert not list(tmp_path.iterdir())


# The first turns of the rows, then the second of those whose first was a call, in 14 tokens.
TURNS = [
    ["3*7=.", "21.", "3*7=", "9*9=.", "3+=.", "1+1+1+1=.", "22222+11111=.", ""],
    ["21.", "9*9=.", "?3.", "4"],
]
TEXTS = ["3*7=.21;21.", "21.", "3*7=", "9*9=.81;9*9=.", "3+=.?;?3.", "1+1+1+1=.4;4",
         "22222+11111=.", ""]  # fmt: skip
WRITTEN = ["21;", "", "", "81;", "?;", "4;", "", ""]  # by the calculator


def scripted(folder, **options):
    """(trainer, calls): its sampler says TURNS, "." is the end; calls are (prompts, options)."""
    trainer = calculator.make_trainer(str(folder), **SMALL | {"max_steps": 1} | options)
    calls = []

    def generate(model, prompt_ids, **given):
        calls.append((trainer.tokenizer.batch_decode(prompt_ids), given))
        turns = TURNS[(len(calls) - 1) % 2]
        return [tokens_of(trainer, text) for text in turns]

    trainer.sampler.generate = generate
    return trainer, calls


def tokens_of(trainer, text):
    return trainer.tokenizer(text.replace(".", "<eos>"))["input_ids"]


def test_turns_become_completions(tmp_path):
    trainer, calls = scripted(tmp_path)
    prompts = [f"{row}+1?" for row in range(8)]
    output = calculator.roll_out(prompts, trainer)
    assert output["completion_ids"] == [tokens_of(trainer, text) for text in TEXTS]
    for text, written, mask in zip(TEXTS, WRITTEN, output["completion_mask"], strict=True):
        first = text.index(written) if written else len(text)
        assert mask == [int(not first <= i < first + len(written)) for i in range(len(text))]
    # Cut off, a second call, no room behind the reply; and an empty turn that no end follows.
    assert output["truncated"] == [False, False, True, True, False, True, True, True]
    assert output["turns"][0] == ["3*7=", "21"] and output["turns"][4] == ["3+=", "?3"]
    (first, given), (second, later) = calls
    assert first == prompts and given["max_new_tokens"] == 14
    asked = [0, 3, 4, 5]
    shown = [TEXTS[i][: TEXTS[i].index(";") + 1].replace(".", "<eos>") for i in asked]
    assert second == [prompts[i] + text for i, text in zip(asked, shown, strict=True)]
    assert later["max_new_tokens"] == 14 - len("3+=.?;") and later["temperature"] == 1.0


def test_what_the_calculator_wrote_is_not_trained_on_and_rewards_see_turns(tmp_path):
    trainer, _ = scripted(tmp_path, mask_truncated_completions=True)
    experience = collect(trainer)
    batch, kept = experience.batch, [0, 1, 4]  # the others are truncated
    for row in range(8):
        tokens = batch.completion_ids[row][batch.completion_mask[row]]
        own = TURNS[0][row].replace(".", "<eos>") if row in kept else ""
        own += {0: "21<eos>", 4: "?3<eos>"}.get(row, "")
        assert trainer.tokenizer.decode(tokens) == own, row
    texts = trainer.tokenizer.batch_decode(batch.completion_ids[:1])
    assert texts[0].startswith("3*7=<eos>21;21<eos>"), "the model reads it all the same"
    assert batch.attended[0].sum() == len(TEXTS[0])
    assert experience.num_items == [float(batch.completion_mask.sum())]


def test_log_probabilities_of_the_calculator_s_tokens_do_not_enter(tmp_path, no_plot):
    found = []
    for value in (0.0, -50.0, float("nan")):
        trainer, _ = scripted(tmp_path / str(value), max_steps=1)

        def scored(prompts, trainer, value=value):
            output = calculator.roll_out(prompts, trainer)
            output["logprobs"] = [[-2.5 if m else value for m in mask]
                                  for mask in output["completion_mask"]]  # fmt: skip
            return output

        trainer.rollout_fn = scored
        trainer.train()
        (line,) = trainer.run_log.history
        found.append({k: v for k, v in line.items() if "seconds" not in k})
    assert found[0] == found[1] == found[2]
    assert found[0]["num_tokens"] == sum(map(len, TEXTS)) - sum(map(len, WRITTEN))
    assert found[0]["rollout/weight_mean"] != 1 and found[0]["grad_norm"] > 0


def test_rewards():
    assert calculator.asks([["3*7=", "21"], ["3*"], [""]], ["3*7?"] * 3) == [1.0, 0.5, 0.0]
    logged = {}
    turns = [["3*7=", "21"], ["21"], ["3*7=", "24"], ["3*7="]]
    assert calculator.answers(turns, ["21"] * 4, logged.__setitem__) == [1.0, 0.0, 0.5, 0.0]
    assert logged == {"solved": 0.25}


def test_the_example_runs(tmp_path, no_plot):
    trainer = calculator.make_trainer(str(tmp_path), **SMALL)
    assert trainer.train().step == 2
    assert all(0 <= line["solved"] <= 1 for line in trainer.run_log.history)
    assert trainer.run_log.history[0]["grad_norm"] > 0


@pytest.mark.slow
def test_the_example_learns_to_ask(tmp_path, no_plot):
    """The first of the two things, in a fifth of the steps."""
    torch.set_num_threads(1)
    trainer = calculator.make_trainer(str(tmp_path), max_steps=80, progress_bar=False)
    trainer.train()
    asked = [line["rewards/asks"] for line in trainer.run_log.history]
    assert sum(asked[:10]) / 10 < 0.1 and sum(asked[-10:]) / 10 > 0.2
