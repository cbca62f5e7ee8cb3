"""TRL's GRPO trainer with one import changed.

    pip install ".[trl]"
    python examples/trl_grpo.py [MODEL]

Without MODEL, a tiny model with random weights learns to answer with even digits, in seconds on a
CPU. The same script for TRL alone differs only in the import that is marked below.
"""

import sys
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.integrations.trl import FusedGRPOTrainer as GRPOTrainer  # not: from trl


def share_of_even_digits(completions, **columns):
    return [sum(c in "02468" for c in text) / max(len(text), 1) for text in completions]


def main():
    if len(sys.argv) > 1:
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], padding_side="left")
    else:
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=4,
            max_steps=30,
            learning_rate=3e-3,
            logging_steps=1,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        reward_funcs=share_of_even_digits,
        train_dataset=Dataset.from_dict({"prompt": [f"{i % 10}=" for i in range(64)]}),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    print(f"mean reward of the first five steps: {first:.2f}, of the last five: {last:.2f}")


if __name__ == "__main__":
    main()
