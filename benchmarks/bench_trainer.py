"""What the trainer adds to generation, model and loss: at most 5 % of a step.

    pytest benchmarks/bench_trainer.py --benchmark-json runs/trainer.json

Seconds inside of `generate`, forward passes with the loss in them, backward and the optimizer are
set against those of the whole step: rollout, rewards, advantages, old and reference
log-probabilities, two updates, metrics. One thread and its processor time, which a busy machine
does not stretch.
"""

import time

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from benchmarks.bench_step import CPU_MODEL, make_model
from grpo_fused import GRPOTrainer, GRPOTrainerConfig

LIMIT = 0.05
ROUNDS = 2


class Scores:
    def __init__(self, total):
        self.total, self.each, self.steps = total, {"length": total}, None


def rewards(prompts, completions, completion_ids, columns):
    return Scores(torch.tensor([float(len(set(text.split()))) for text in completions]))


def make_tokenizer(size):
    vocab = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, size)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


class Inside:
    """Processor seconds inside of functions that are wrapped, the outermost ones alone."""

    def __init__(self):
        self.seconds, self.depth = {}, 0

    def wrap(self, owner, name):
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            self.depth += 1
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    spent = time.process_time() - start
                    self.seconds[name] = self.seconds.get(name, 0.0) + spent

        setattr(owner, name, timed)


def build(folder):
    """A trainer two of whose steps use each rollout: 8 prompts x 8 completions of 32 tokens."""
    tokenizer = make_tokenizer(CPU_MODEL["vocab_size"])
    model = make_model(CPU_MODEL, "cpu", torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    data = [{"prompt": " ".join(f"w{2 + (7 * i + j) % 999}" for j in range(16))} for i in range(64)]
    config = GRPOTrainerConfig(
        output_dir=str(folder),
        max_steps=2 * ROUNDS + 2,
        num_iterations=2,
        beta=0.04,
        micro_batch_size=16,
        max_completion_length=32,
        save_steps=None,
        report_to=[],
        progress_bar=False,
    )
    return GRPOTrainer(
        model, rewards, config, data, tokenizer=tokenizer, accelerator=Accelerator(cpu=True)
    )


def bench_overhead(benchmark, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer, inside, steps = build(tmp_path), Inside(), []
    inside.wrap(trainer.unwrapped, "generate")
    for owner, name in [
        (trainer.policy, "_through_head"),
        *((trainer.accelerator, name) for name in ("backward", "clip_grad_norm_")),
        *((trainer.optimizer, name) for name in ("step", "zero_grad")),
    ]:
        inside.wrap(owner, name)
    log = trainer.log

    def lap(metrics):
        log(metrics)
        steps.append((time.process_time(), sum(inside.seconds.values())))

    trainer.log = lap
    try:
        benchmark.pedantic(trainer.train, rounds=1, iterations=1)
    finally:
        torch.set_num_threads(threads)
    (start, before), (end, after) = steps[1], steps[-1]  # the first rollout warms up
    share = 1 - (after - before) / (end - start)
    benchmark.extra_info |= {
        **{"overhead": share, "step_seconds": (end - start) / ROUNDS},
        "inside": {name: seconds / (ROUNDS + 1) for name, seconds in inside.seconds.items()},
    }
    print(f"\noutside of generation, model, loss and optimizer: {share:.1%} of a rollout's step")
    assert share <= LIMIT
