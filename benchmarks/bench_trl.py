"""A step of TRL's trainer, stock and with the drop-in: `_compute_loss`, backward, AdamW.

    pytest benchmarks/bench_trl.py --lines runs/trl.jsonl

The model, the batch and the optimizer are the same, and so are loss and metrics before anything is
timed. Generation and rewards, which the drop-in leaves to TRL, are not part of the step.
"""

import functools
import importlib
import tempfile

import pytest
import torch

from benchmarks.bench_step import (
    CPU_LENGTHS,
    CPU_MODEL,
    CUDA_LENGTHS,
    CUDA_MODEL,
    PROMPT,
    make_batch,
    make_model,
)
from benchmarks.record import record

CLASSES = {
    "fused": ("grpo_fused.integrations.trl", "FusedGRPOTrainer"),
    "trl": ("trl", "GRPOTrainer"),
}
LOSSES = ("dapo", "vespo")  # fused with the head; TRL's own loss on our log-probabilities


def make_trainer(name, loss_type, sizes, device, dtype):
    """A trainer on which `_compute_loss` works without a rollout."""
    module, trainer_class = CLASSES[name]
    trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
    demo = importlib.import_module("grpo_fused.demo")
    args = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="bench_trl"),
        loss_type=loss_type,
        use_cpu=device == "cpu",
        bf16=False,
        num_generations=2,
        report_to="none",
        gradient_checkpointing=False,
    )
    trainer = getattr(importlib.import_module(module), trainer_class)(
        model=make_model(sizes, device, dtype),
        args=args,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1="]}),
        processing_class=demo.make_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    trainer.model.train()
    return trainer


def make_inputs(lengths, V, device):
    """The inputs that TRL passes to `_compute_loss`."""
    input_ids, ids, mask, advantages, old_logps = make_batch(lengths, V, device)
    return {
        "prompt_ids": input_ids[:, :PROMPT],
        "prompt_mask": torch.ones_like(input_ids[:, :PROMPT]),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old_logps,
        "num_items_in_batch": mask.sum(),
    }


def build(loss_type, sizes, lengths, device, dtype):
    """(inputs, steps, prepare) of `record`; each trainer has a model of its own."""
    inputs = make_inputs(lengths, sizes["vocab_size"], device)

    def step_of(name):
        trainer = make_trainer(name, loss_type, sizes, device, dtype)
        optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-5)

        def step():
            trainer._compute_loss(trainer.model, inputs).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # AdamW's state is there from now on
        return step

    steps = {name: functools.cache(functools.partial(step_of, name)) for name in CLASSES}
    return inputs, {name: lambda make=make: make()() for name, make in steps.items()}, lambda: None


def assert_same(loss_type, sizes, lengths, device, dtype, tolerance):
    found = []
    for name in CLASSES:
        trainer = make_trainer(name, loss_type, sizes, device, dtype)
        loss = trainer._compute_loss(
            trainer.model, make_inputs(lengths, sizes["vocab_size"], device)
        )
        metrics = {metric: values[0] for metric, values in trainer._metrics["train"].items()}
        found.append({"loss": loss.item()} | metrics)
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[x] - theirs[x]) <= tolerance * (1 + abs(theirs[x])) for x in ours), found


def time_step(benchmark, loss_type, sizes, lengths, device, dtype, tolerance):
    pytest.importorskip("trl", reason="trl is not installed")
    assert_same(loss_type, sizes, lengths, device, dtype, tolerance)
    make = functools.partial(build, loss_type, sizes, lengths, device, dtype)
    name = f"a step of TRL's trainer, {loss_type}, {str(dtype)[6:]}"
    record(benchmark, name, device, make, lambda inputs: {})
    benchmark.extra_info |= {"step": sizes, "lengths": lengths}


@pytest.mark.parametrize("loss_type", LOSSES)
def bench_trl_step_cpu(benchmark, loss_type):
    time_step(benchmark, loss_type, CPU_MODEL, CPU_LENGTHS, "cpu", torch.float32, 1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("loss_type", LOSSES)
def bench_trl_step_cuda(benchmark, loss_type):
    time_step(benchmark, loss_type, CUDA_MODEL, CUDA_LENGTHS, "cuda", torch.bfloat16, 2e-2)
