"""Tiny trainers on the demo's task, with rewards and logs in memory."""

import contextlib
import json
import os
import threading

import torch
from accelerate import Accelerator

from grpo_fused import GRPOTrainer, GRPOTrainerConfig
from grpo_fused.demo import make_model, make_problems, make_tokenizer
from grpo_fused.trainer.rewards import Rewards, RewardScores

ROWS = [{"prompt": prompt, "answer": answer} for prompt, answer in make_problems()[0]]
HELD_OUT = [{"prompt": prompt, "answer": answer} for prompt, answer in make_problems()[1]]
SMALL = {"prompts_per_rollout": 4, "num_generations": 4, "micro_batch_size": 8, "max_steps": 4}
SMALL |= {"max_completion_length": 2, "learning_rate": 1e-2, "report_to": [], "save_steps": None}
SMALL |= {"progress_bar": False}


def each(rows):
    yield from rows


def stream_of(rows):
    """A stream in one shard; `from_generator` would make one of every row of a list."""
    import datasets

    return datasets.IterableDataset.from_generator(each, gen_kwargs={"rows": tuple(rows)})


class FunctionRewards(Rewards):
    """Rewards computed by one function with the signature of `Rewards.__call__`."""

    def __init__(self, function):
        self.function, self.trainer_state = function, None

    def __call__(self, *arguments):
        return self.function(*arguments)


class MemoryLog:
    """A RunLog that keeps everything in memory."""

    def __init__(self):
        self.steps, self.tables, self.closed = {}, {}, 0

    def write(self, step, metrics):
        self.steps[step] = json.loads(json.dumps(metrics))

    def extend(self, step, metrics):
        self.write(step, self.steps.get(step, {}) | metrics)

    def completions(self, name, rows):
        self.tables[name] = rows

    def close(self):
        self.closed += 1


EOS = 1  # of `make_tokenizer`


def partial_credit(prompts, completions, completion_ids, columns):
    """Partial credit, so that a model of random weights has groups that differ."""
    exact = [
        float(text == answer) for text, answer in zip(completions, columns["answer"], strict=True)
    ]
    digits = [float(text[:1].isdigit()) + 0.1 * len(text) for text in completions]
    exact, digits = torch.tensor(exact), torch.tensor(digits)
    return RewardScores(exact + digits, {"exact": exact, "digits": digits})


def scored(prompts, trainer):
    """A rollout_fn with the log-probabilities of a sampler, of which one is not known."""
    draw = torch.Generator().manual_seed(0)
    ids = [[4, 5, EOS], [6, EOS], [7, 8, 9], [EOS]] * (len(prompts) // 4)
    logprobs = [(-3 * torch.rand(len(row), generator=draw)).tolist() for row in ids]
    logprobs[0][1] = float("nan")  # a token that the sampler could not score
    return {"completion_ids": ids, "logprobs": logprobs, "spent": [1.5] * len(ids)}


def trainer_of(
    folder, *, rewards=partial_credit, data=ROWS, model=None, tokenizer=None, seed=3, **options
):
    """(trainer, records): a tiny trainer, and a dict that it fills with the metrics by step."""
    objects = ("eval_data", "peft_config", "rollout_fn", "on_refresh", "run_log", "accelerator")
    given = {name: options.pop(name) for name in objects if name in options}
    tokenizer = tokenizer or make_tokenizer()
    if model is None:
        torch.manual_seed(seed)
        model = make_model(tokenizer)
    config = GRPOTrainerConfig(output_dir=str(folder), **{**SMALL, **options})
    if "accelerator" not in given:
        given["accelerator"] = Accelerator(cpu=True, mixed_precision=config.mixed_precision)
    given.setdefault("run_log", MemoryLog())  # draws no plot
    rewards = rewards if isinstance(rewards, Rewards) else FunctionRewards(rewards)
    trainer = GRPOTrainer(model, rewards, config, data, tokenizer=tokenizer, **given)
    records = {}
    log = trainer.log

    def record(metrics, **options):
        records[trainer.step] = {k: v for k, v in metrics.items() if "seconds" not in k}
        log(metrics, **options)

    trainer.log = record
    return trainer, records


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.unwrapped.named_parameters()}


@contextlib.contextmanager
def signal_after(number, path, lines):
    """Sends this process a signal as soon as a file has so many lines."""
    stopped = threading.Event()

    def watch():
        while not stopped.wait(0.01):
            if path.exists() and path.read_text().count("\n") >= lines:
                os.kill(os.getpid(), number)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
