"""examples/recipes: every recipe is valid as it stands, and runs on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from grpo_fused import cli
from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.run.options import load_options
from grpo_fused.trainer.run.train_config import TrainConfig

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
SIZES = {"prompts_per_rollout": 8, "num_generations": 4, "max_completion_length": 4}
SIZES |= {"max_prompt_length": 8, "micro_batch_size": 8, "progress_bar": "false", "report_to": "[]"}
REWARDS = """
def some(completions):
    return [float(chat[0]["content"][:1] in ("1", "2", "3")) for chat in completions]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tiny model that has a chat template, and a reward that differs in a group."""
    folder = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for one in messages %}{{ one.content }}{% endfor %}="
    make_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run(path, files, tmp_path, monkeypatch, no_plot):
    """To the second rollout, with other sizes, and a reward of which a tiny model gets some."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(ROOT)  # where the data of the recipes is
    config = load_options(TrainConfig, path)
    steps = config.minibatches + 1
    given = SIZES | {"model": files / "model", "output_dir": tmp_path, "max_steps": steps}
    given["rewards"] = f"{files}/rewards.py:some"
    if config.soft_punish_cache:
        given["soft_punish_cache"] = 2
    command = ["train", str(path)]
    command += [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert cli.main(command) == 0
    lines = list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert max(line["grad_norm"] for line in lines) > 0
    assert "kl" not in lines[0] and lines[0]["ratio/max"] == 1
    if path.stem == "dapo":
        assert lines[0]["learning_rate"] == 0 < lines[1]["learning_rate"] < 1e-8, "warm-up"
        assert lines[0]["rewards/overlong_punishment"] < 0
        assert 0 < lines[0]["dynamic_sampling/kept_ratio"] < 1
        assert lines[0]["dynamic_sampling/rounds"] > 1
        assert lines[0]["dynamic_sampling/filled_ratio"] == 0


def test_sizes_of_dapo_are_those_of_the_paper():
    """Sequences of an update, tokens without punishment, and warm-up in rollouts."""
    config = load_options(TrainConfig, ROOT / "examples" / "recipes" / "dapo.yaml")
    sequences = config.prompts_per_rollout * config.num_generations
    assert sequences // config.minibatches == 512
    assert config.max_completion_length - config.soft_punish_cache == 16384
    assert config.warmup_steps == 20 * config.steps_per_rollout
    objective = config.objective_or_default
    assert (objective.epsilon_low, objective.epsilon_high) == (0.2, 0.28)
