"""A reward model that stays as it is goes stale; one that is trained further does not.

    python examples/stale_reward_model.py runs/stale docs/reward-model.png

A tiny policy, which names the larger of two digits in half of the cases, is trained by the scores
of a reward model: once of one that was trained on samples of this first policy and stays as it is,
once of the same model trained further in iterations (DeepSeekMath, Algorithm 1), on pairs of new
samples and a tenth of earlier ones. True answers make the pairs; the policy never sees them.
"""

import argparse
import warnings
from pathlib import Path

import torch
import transformers
from accelerate.utils import set_seed

from grpo_fused.demo import make_model, make_problems, make_tokenizer
from grpo_fused.trainer import GRPOTrainer, GRPOTrainerConfig, RewardModel, Rewards, RewardTraining
from grpo_fused.trainer.rewards.builtin import exact_match
from grpo_fused.trainer.run.log import read_metrics

ROWS = [{"prompt": p, "answer": a} for problems in make_problems() for p, a in problems]
SCORE, ACCURACY = "rewards/reward_model", "rewards/exact_match"
WINDOW = 15  # steps of a running mean
SETTINGS = {
    "prompts_per_rollout": 16,
    "num_generations": 8,
    "micro_batch_size": 128,
    "max_completion_length": 4,
    "adam_betas": [0.9, 0.99],
    "reward_learning_rate": 1e-3,
    "reward_batch_size": 32,
    "reward_epochs": 4,
    "save_steps": None,
    "report_to": [],
    "progress_bar": False,
}


def train(folder, policy, rewards, **options) -> list[dict]:
    """Trains a policy, and saves it; returns the metrics of every step."""
    config = GRPOTrainerConfig(output_dir=str(folder), **SETTINGS | options)
    trainer = GRPOTrainer(policy, rewards, config, ROWS, tokenizer=make_tokenizer())
    trainer.train()
    return read_metrics(folder / "metrics.jsonl")


def load_reward_model(folder: Path) -> RewardModel:
    return RewardModel(str(folder / "reward_model"), batch_size=256)


def save_random_reward_model(folder: Path) -> None:
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "vocab_size": len(tokenizer), "num_labels": 1}
    config = transformers.LlamaConfig(**sizes, pad_token_id=tokenizer.pad_token_id)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder / "reward_model")
    tokenizer.save_pretrained(folder / "reward_model")


def run(folder: Path, steps: int) -> dict[str, list[dict]]:
    """Returns the metrics of both runs."""
    set_seed(0)
    model = make_model(make_tokenizer())
    train(folder / "start", model, exact_match, max_steps=40, learning_rate=2e-3)
    policy = str(folder / "start" / "model")

    # A learning rate of 0: four rollouts of this policy give the pairs of one training.
    save_random_reward_model(folder / "random")
    reward_model = load_reward_model(folder / "random")
    training = RewardTraining(reward_model, exact_match)
    options = {"max_steps": 8, "iterations": 2, "learning_rate": 0.0}
    train(folder / "first", policy, Rewards(reward_model, training=training), **options)
    known = [pair for _, pair in training.history]

    found = {}
    for name in ("stays as it is", "trained further every 3 rollouts"):
        reward_model = load_reward_model(folder / "first")
        training, options = None, {"max_steps": steps, "learning_rate": 3e-4}
        if name != "stays as it is":
            training = RewardTraining(reward_model, exact_match, known)
            options["iterations"] = steps // 3
        # With weight 0 the truth is measured only.
        rewards = Rewards([reward_model, exact_match], [1.0, 0.0], training)
        found[name] = train(folder / name.replace(" ", "-"), policy, rewards, **options)
    return found


def running_mean(history: list[dict], name: str) -> list[float]:
    values = [line[name] for line in history]
    parts = [values[max(0, i - WINDOW) : i] for i in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def draw(found: dict[str, list[dict]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for (name, history), color in zip(found.items(), ("#a63603", "#08519c"), strict=True):
        for axes, metric in ((top, SCORE), (bottom, ACCURACY)):
            axes.plot([line[metric] for line in history], color=color, alpha=0.25)
            axes.plot(running_mean(history, metric), color=color, linewidth=2, label=name)
    top.set(ylabel="reward model's score")
    top.set_title("the reward model", loc="left")
    top.legend(frameon=False)
    bottom.set(ylabel="true accuracy", xlabel="optimizer step", ylim=(0, 1))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder for the runs, which must not exist")
    parser.add_argument("picture", type=Path, nargs="?", help="PNG to draw")
    parser.add_argument("--steps", type=int, default=180, help="of each run, a multiple of 3")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "replay_fraction")  # of the first training
    torch.set_num_threads(1)
    found = run(options.folder, options.steps)
    for name, history in found.items():
        for metric in (SCORE, ACCURACY):
            means = running_mean(history, metric)
            first, last = means[:WINDOW][-1], means[-1]
            print(f"{name}: {metric} {first:.2f} -> {last:.2f}")
    if options.picture is not None:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
