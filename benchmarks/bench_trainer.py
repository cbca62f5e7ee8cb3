"""Overhead of the trainer over generation, model and loss, at most 5 %, and its time against TRL's.

    pytest benchmarks/bench_trainer.py --lines runs/trainer.jsonl

Seconds inside of `generate`, forward passes with the loss in them, backward and the optimizer are
compared with those of the whole: rollout, rewards, advantages, old and reference log-probabilities,
two updates, metrics. TRL 1.16's trainer does the same on the same model, in the same run. Measured
is the CPU time of one thread, which other work on the machine hardly changes.
"""

import importlib
import time

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from benchmarks import measure
from benchmarks.bench_step import CPU_MODEL, make_model
from grpo_fused import GRPOTrainer, GRPOTrainerConfig

LIMIT = 0.05
ROUNDS = 2


def reward(completions, **columns):
    """Differs within every group: a sequence without an advantage would cost less."""
    return [float(len(text) % 7) for text in completions]


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


# Two steps use each rollout: 8 prompts x 8 completions of 32 tokens, 16 sequences at once.
SHARED = {"max_steps": 2 * ROUNDS + 2, "num_iterations": 2, "num_generations": 8, "beta": 0.04}
SHARED |= {"max_completion_length": 32, "learning_rate": 1e-5}


def make_parts():
    tokenizer = make_tokenizer(CPU_MODEL["vocab_size"])
    model = make_model(CPU_MODEL, "cpu", torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    data = [{"prompt": " ".join(f"w{2 + (7 * i + j) % 999}" for j in range(16))} for i in range(64)]
    return tokenizer, model, data


def build(folder):
    tokenizer, model, data = make_parts()
    options = {"prompts_per_rollout": 8, "micro_batch_size": 16, "save_steps": None}
    options |= {"report_to": [], "progress_bar": False}
    config = GRPOTrainerConfig(output_dir=str(folder), **SHARED, **options)
    return GRPOTrainer(
        model, reward, config, data, tokenizer=tokenizer, accelerator=Accelerator(cpu=True)
    )


def trl_seconds(folder):
    """Processor seconds of a rollout and its two steps with TRL's own trainer."""
    trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
    callback = importlib.import_module("transformers").TrainerCallback
    tokenizer, model, data = make_parts()
    model.save_pretrained(folder / "model")  # TRL loads its reference from there
    model = type(model).from_pretrained(folder / "model")
    laps = []

    class Laps(callback):
        def on_step_end(self, *args, **kwargs):
            laps.append(time.process_time())

    options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}
    options |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    options |= {"disable_tqdm": True, "gradient_checkpointing": False, "logging_steps": 1}
    options |= {"lr_scheduler_type": "constant", "use_bias_correction_kl": False}  # as ours
    trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=trl.GRPOConfig(output_dir=str(folder), **SHARED, **options),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[Laps()],
    ).train()
    return (laps[-1] - laps[1]) / ROUNDS


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
        trl = trl_seconds(tmp_path / "trl")
    finally:
        torch.set_num_threads(threads)
    (start, before), (end, after) = steps[1], steps[-1]  # the first rollout warms up
    share, ours = 1 - (after - before) / (end - start), (end - start) / ROUNDS
    benchmark.extra_info |= measure.environment("cpu") | {
        **{"case": "a rollout of 64 completions and two steps, float32", "threads": 1},
        **{"rollout_seconds": {"fused": ours, "trl": trl}, "overhead": share},
        "inside": {name: seconds / (ROUNDS + 1) for name, seconds in inside.seconds.items()},
    }
    print(f"\noutside of generation, model, loss and optimizer: {share:.1%} of {ours:.2f} s")
    print(f"TRL: {trl:.2f} s")
    assert share <= LIMIT
