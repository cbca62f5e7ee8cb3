"""Train a tiny model for a few steps with a TRL trainer, and compare metrics and weights."""

import contextlib
import warnings
from typing import NamedTuple

import torch
from datasets import Dataset
from tiny_models import TINY
from transformers import AutoConfig, AutoModelForCausalLM
from trl import GRPOConfig

from grpo_fused.demo import make_tokenizer

STEPS = 6
WARNING = "TRL computes the loss, without grpo_fused: "
TIMES = ("time", "runtime", "per_second", "flos", "epoch")


class Run(NamedTuple):
    """Metrics of each step, final weights by name, and reasons of fallbacks to TRL."""

    log: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    warnings: list[str]
    trainer: object


def save_model(folder, **options):
    """Save a tiny Qwen3 and its tokenizer; TRL loads the reference model from the folder."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = AutoConfig.for_model("qwen3", **TINY | {"vocab_size": len(tokenizer)} | options)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.bos_token_id = None
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def mixture():
    """Make a mixture of experts, whose router has an auxiliary loss."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    tokenizer = make_tokenizer()
    config = AutoConfig.for_model("qwen3_moe", **TINY | experts | {"vocab_size": len(tokenizer)})
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.bos_token_id = None
    return AutoModelForCausalLM.from_config(config)


def score(prompts, completions, **columns):
    """Return deterministic rewards that differ within a group."""
    return [sum(map(ord, text)) % 7 / 7 + len(text) / 10 for text in completions]


def make_trainer(
    trainer_class, model, output_dir, *, peft_config=None, config_class=GRPOConfig, **options
):
    """Make a trainer for STEPS optimizer steps of a model, or of the one in a folder."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # for adapters
    config = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "adam_epsilon": 1e-6,  # gradients of rounding errors must not become steps
        "logging_steps": 1,
        "seed": 3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    prompts = [f"{a}?{b}=" if a % 2 else f"{a}=" for a in range(10) for b in range(4)]
    data = Dataset.from_dict({"prompt": prompts})
    return trainer_class(
        model=model if isinstance(model, torch.nn.Module) else str(model),
        args=config_class(**config | options),
        reward_funcs=score,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )


def train(trainer_class, model, output_dir, *, before=None, **options):
    """Make a trainer, call `before` on it, and train."""
    trainer = make_trainer(trainer_class, model, output_dir, **options)
    if before is not None:
        before(trainer)
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(None):
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(warning.message) for warning in caught]
    reasons = [text.partition(WARNING)[2] for text in messages if text.startswith(WARNING)]
    log = [
        {name: value for name, value in row.items() if not name.endswith(TIMES)}
        for row in trainer.state.log_history[:-1]
    ]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return Run(log, weights, reasons, trainer)


def differences(run, other):
    """Compute the largest difference of each metric, and of weights, between two runs."""
    found = {}
    for row, like in zip(run.log, other.log, strict=True):
        assert row.keys() == like.keys(), row.keys() ^ like.keys()
        for name, value in row.items():
            apart = 0.0 if value == like[name] or value != value != like[name] else None
            apart = abs(value - like[name]) if apart is None else apart
            found[name] = max(found.get(name, 0.0), apart)
    weights = [(run.weights[name] - other.weights[name]).abs().max() for name in other.weights]
    return found | {"weights": float(max(weights))}
