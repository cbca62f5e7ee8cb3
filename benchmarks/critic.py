"""What PPO's critic costs: the demo's task learned with and without one, memory and time.

    python -m benchmarks.critic [--learn] [--cost]

prints two tables in Markdown; docs/trainer/ppo.md has them. GRPO's advantages come from the group,
PPO's from a critic: a value head on the policy's trunk, or a model of its own. All sample the same
number of completions. Each run has a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import GenerationConfig

from benchmarks import measure
from benchmarks.bench_step import make_model
from benchmarks.bench_trainer import make_tokenizer
from grpo_fused import GRPOTrainer, GRPOTrainerConfig, demo

RUNS = {
    "GRPO": {},
    "PPO, shared trunk": {"algorithm": "ppo", "loss_type": "ppo", "critic": "shared"},
    "PPO, critic of its own": {"algorithm": "ppo", "loss_type": "ppo", "critic": "copy"},
}
# 36 million weights, most of them in the trunk.
MODEL = {"hidden_size": 512, "num_hidden_layers": 10, "intermediate_size": 1536}
MODEL |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096}
COST = {"prompts_per_rollout": 4, "num_generations": 4, "num_iterations": 2, "max_steps": 6}
COST |= {"max_completion_length": 64, "micro_batch_size": 4, "learning_rate": 1e-6, "beta": 0.04}
QUIET = {"save_steps": None, "report_to": [], "progress_bar": False}


def learn(name: str, folder: str) -> dict:
    """Trains on the demo's task; returns when it was learned and how well."""
    set_seed(0)
    torch.set_num_threads(1)
    tokenizer = demo.make_tokenizer()

    def reward(completion_ids, answer, **columns):
        return list(map(demo.reward_of, tokenizer.batch_decode(completion_ids), answer))

    data, held_out = (
        [{"prompt": prompt, "answer": answer} for prompt, answer in problems]
        for problems in demo.make_problems()
    )
    options = {"prompts_per_rollout": 16, "num_generations": 16, "micro_batch_size": 256}
    options |= {"num_iterations": 2, "max_steps": 500, "max_completion_length": 2, "beta": 0.04}
    options |= {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "adam_betas": [0.9, 0.99]}
    config = GRPOTrainerConfig(
        output_dir=folder, eval_steps=500, **options | QUIET | {"loss_type": "dapo"} | RUNS[name]
    )
    trainer = GRPOTrainer(
        *(demo.make_model(tokenizer), reward, config, data),
        tokenizer=tokenizer,
        eval_data=held_out,
        accelerator=Accelerator(cpu=True),
    )
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    rewards = [line["reward"] for line in trainer.run_log.history if "reward" in line][::2]
    means = [sum(rewards[i : i + 20]) / 20 for i in range(len(rewards) - 19)]
    reached = next((i + 20 for i, mean in enumerate(means) if mean > 0.9), None)
    accuracy = trainer.run_log.history[-1]["eval/reward"]
    return {"reached": reached, "last": means[-1], "accuracy": accuracy, "seconds": seconds}


def cost(name: str, folder: str) -> dict:
    """Measures memory and processor seconds of two rollouts with their four updates."""
    set_seed(0)
    torch.set_num_threads(1)
    measure.keep_no_freed_memory()
    model = make_model(MODEL, "cpu", torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    data = [{"prompt": " ".join(f"w{2 + (7 * i + j) % 999}" for j in range(16))} for i in range(64)]
    trainer = GRPOTrainer(
        *(model, lambda completions, **columns: [float(len(c) % 7) for c in completions]),
        GRPOTrainerConfig(output_dir=folder, **COST | QUIET | RUNS[name]),
        data,
        tokenizer=make_tokenizer(MODEL["vocab_size"]),
        accelerator=Accelerator(cpu=True),
    )
    laps, log = [], trainer.log

    def lap(metrics):
        log(metrics)
        laps.append(time.process_time())

    trainer.log = lap
    trainer.train()
    models = [trainer.unwrapped, *([] if trainer.critic is None else [trainer.critic.unwrapped])]
    weights = sum(p.numel() for model in models for p in model.parameters())
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return {"weights": weights, "peak": 1024 * int(status), "seconds": (laps[-1] - laps[1]) / 2}


def in_a_process(what: str, name: str) -> dict:
    """Runs `learn` or `cost` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.critic", "--run", what, name, folder]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        what, name, folder = options.run
        print(json.dumps({"learn": learn, "cost": cost}[what](name, folder)))
        return
    if options.learn or not options.cost:
        print("| | mean reward above 0.9 after | last 20 rollouts | held out | CPU seconds |")
        print("| --- | --- | --- | --- | --- |")
        for name in RUNS:
            found = in_a_process("learn", name)
            reached = f"{found['reached']} rollouts" if found["reached"] else "not within 250"
            print(
                f"| {name} | {reached} | {found['last']:.2f} | {found['accuracy']:.2f} "
                f"| {found['seconds']:.0f} |",
                flush=True,
            )
    if options.cost or not options.learn:
        print("| | trained weights | peak memory | CPU seconds a rollout and its two updates |")
        print("| --- | --- | --- | --- |")
        for name in RUNS:
            found = in_a_process("cost", name)
            print(
                f"| {name} | {found['weights'] / 1e6:.1f} million "
                f"| {found['peak'] / 2**20:.0f} MiB | {found['seconds']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
