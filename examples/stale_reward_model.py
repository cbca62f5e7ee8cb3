"""A reward model that stays as it is goes stale; one that is trained further does not.

    python examples/stale_reward_model.py runs/stale docs/reward-model.png

A tiny policy that names the larger of two digits in half of the cases is trained further by the
scores of a reward model, once of one that was trained on pairs of its first samples and stays as
it is, once of one that is trained further after every iteration (DeepSeekMath, Algorithm 1) on
pairs of the new samples and a tenth of earlier ones. Pairs come from the true answers, which the
policy never sees.
"""

import argparse
import os
import platform
import time
import warnings
from pathlib import Path

import torch
import transformers
from accelerate.utils import set_seed

from grpo_fused.demo import make_model, make_problems, make_tokenizer
from grpo_fused.trainer import (
    GRPOTrainer,
    GRPOTrainerConfig,
    RewardModel,
    Rewards,
    RewardTraining,
)
from grpo_fused.trainer.rewards.builtin import exact_match
from grpo_fused.trainer.run.log import read_metrics

ROWS = [{"prompt": p, "answer": a} for part in make_problems() for p, a in part]
STEPS, ITERATIONS = 300, 30
COMMON = {
    "prompts_per_rollout": 16,
    "num_generations": 8,
    "micro_batch_size": 128, "beta": 0.0,
    "max_completion_length": 4,
    "adam_betas": [0.9, 0.99],
    "save_steps": None,
    "report_to": [], "progress_bar": False,
    "reward_learning_rate": 1e-3,
    "reward_batch_size": 32,
}


def make_reward_model(folder: Path) -> str:
    """Saves a sequence classifier of random weights, and returns its folder."""
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "vocab_size": len(tokenizer), "num_labels": 1}
    config = transformers.LlamaConfig(**sizes, pad_token_id=tokenizer.pad_token_id)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trainer_of(folder, policy, rewards, **options) -> GRPOTrainer:
    config = GRPOTrainerConfig(output_dir=str(folder), **COMMON | options)
    training = options.get("reward_training")
    return GRPOTrainer(policy, rewards, config, ROWS, reward_training=training)


def train(folder, policy, rewards, reward_training=None, **options) -> list[dict]:
    """Trains a policy from a folder or model; returns its metrics by step."""
    config = GRPOTrainerConfig(output_dir=str(folder), **COMMON | options)
    trainer = GRPOTrainer(
        policy, rewards, config, ROWS, tokenizer=make_tokenizer(), reward_training=reward_training
    )
    trainer.train()
    return read_metrics(Path(folder) / "metrics.jsonl")


def main(folder: Path, picture: Path | None, warm=100, pairs_steps=20, steps=STEPS, iterations=ITERATIONS, beta=0.0, lr=1e-3, rlr=1e-3, epochs=1, first_epochs=4) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    set_seed(0)
    t=time.time()
    truth = train(folder / "start", make_model(make_tokenizer()), exact_match, max_steps=warm, learning_rate=2e-3)
    print("warm", [round(x["reward"],2) for x in truth[::10]], time.time()-t)
    start = str(folder / "start" / "model")

    # The first reward model: trained on samples of a policy that stays as it is.
    model = RewardModel(make_reward_model(folder / "random"), batch_size=256)
    training = RewardTraining(model, exact_match)
    first = train(folder / "first", start, Rewards(model), training, max_steps=2*pairs_steps, iterations=2, learning_rate=0.0, reward_epochs=first_epochs, reward_learning_rate=rlr)
    print("first rm", first[-1]["reward_model/accuracy"], first[0]["reward_model/accuracy"], [x["reward_model/pairs"] for x in first if "reward_model/pairs" in x], time.time()-t)
    history = [pair for _, pair in training.history]
    for name, iters in (("fixed", 1), ("retrained", iterations)):
        model = RewardModel(str(folder / "first" / "reward_model"), batch_size=256)
        training = RewardTraining(model, exact_match, history) if iters > 1 else None
        run = train(folder / name, start, Rewards([model, exact_match], [1.0, 0.0]), training, max_steps=steps, iterations=iters, learning_rate=lr, beta=beta, reward_learning_rate=rlr, reward_epochs=epochs, reference_refresh_rollouts=None)
        print(name, time.time()-t)
        for key in ("reward", "rewards/exact_match", "completions/mean_length", "reward_model/accuracy"):
            print("  ", key, [round(x.get(key, float("nan")),2) for x in run[::steps//15]])


if __name__ == "__main__":
    import sys, tempfile, json
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    with tempfile.TemporaryDirectory() as d:
        import grpo_fused.trainer.run.log as L
        L.plot_history = lambda *a: None
        main(Path(d), None, **options)
