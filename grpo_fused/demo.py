"""The demo task: a tiny language model learns by GRPO to name the larger of two digits."""

import random
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from accelerate.utils import set_seed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from grpo_fused.trainer import GRPOTrainer, GRPOTrainerConfig
from grpo_fused.trainer.run.checkpoint import delete_checkpoint, list_checkpoints
from grpo_fused.trainer.run.log import RunLog
from grpo_fused.trainer.run.summary import TrainResult, last_line

ANSWER_LENGTH = 2  # a digit and the end token


class DemoOptions(NamedTuple):
    """Options of `grpo-fused demo`; the command line documents them and sets their defaults."""

    output_dir: Path
    max_steps: int
    seed: int
    prompts_per_rollout: int
    num_generations: int
    loss_type: str
    beta: float
    learning_rate: float
    num_iterations: int
    threads: int


def make_problems() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Returns all 100 pairs of prompt and answer, as ("7?3=", "7"): 80 to train on, 20 held out."""
    problems = [(f"{a}?{b}=", str(max(a, b))) for a in range(10) for b in range(10)]
    random.Random(0).shuffle(problems)  # the same split for every seed
    return problems[20:], problems[:20]


def reward_of(text: str, answer: str) -> float:
    """Returns 1 if a completion is the answer and the end token, perhaps padded; else 0."""
    return float(text.partition("<eos>")[:2] == (answer, "<eos>"))


def make_tokenizer(characters: str = "0123456789?=") -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per character, after a padding and an end token."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
        padding_side="left",
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Returns a causal language model with 76,000 random weights."""
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.Qwen3ForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=ANSWER_LENGTH,
        do_sample=True,
        top_k=0,  # the default, 50, would sample from another distribution than that of the loss
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def make_trainer(options: DemoOptions) -> GRPOTrainer:
    """Returns the trainer of a new model on the demo task."""
    set_seed(options.seed)
    tokenizer = make_tokenizer()

    def reward(completion_ids, answer, **columns):
        return list(map(reward_of, tokenizer.batch_decode(completion_ids), answer))

    data, held_out = (
        [{"prompt": prompt, "answer": answer} for prompt, answer in problems]
        for problems in make_problems()
    )
    config = GRPOTrainerConfig(
        output_dir=str(options.output_dir),
        max_steps=options.max_steps,
        seed=options.seed,
        prompts_per_rollout=options.prompts_per_rollout,
        num_generations=options.num_generations,
        num_iterations=options.num_iterations,
        micro_batch_size=options.prompts_per_rollout * options.num_generations,
        max_completion_length=ANSWER_LENGTH,
        loss_type=options.loss_type,
        beta=options.beta,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        adam_betas=[0.9, 0.99],
        eval_steps=max(1, options.max_steps // 10),
        save_steps=None,
        report_to=[],
    )
    return GRPOTrainer(
        make_model(tokenizer),
        reward,
        config,
        data,
        tokenizer=tokenizer,
        eval_data=held_out,
        run_log=RunLog(options.output_dir, f"larger digit, {options.loss_type} loss"),
    )


def run_demo(options: DemoOptions) -> TrainResult:
    """Trains a new model; writes metrics.jsonl during training, then reward.png and model/."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    for checkpoint in list_checkpoints(options.output_dir):  # left by an interrupted run
        delete_checkpoint(checkpoint)
    trainer = make_trainer(options)
    weights = f"{trainer.unwrapped.num_parameters():,} weights on {trainer.accelerator.device}"
    print(f"{weights}, loss {options.loss_type}")
    result = trainer.train()
    print(last_line(result, trainer.config, can_resume=False))
    if not result.signal:
        assert trainer.run_log is not None  # `make_trainer` gave it one
        held_out = trainer.run_log.history[-1]["eval/reward"]
        print(f"held-out accuracy: {held_out:.2f} (20 prompts, greedy)")
    return result
