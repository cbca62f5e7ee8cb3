"""The command `grpo-fused train`: builds a trainer from a config and trains."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from grpo_fused.trainer.reward_training import RewardTraining
from grpo_fused.trainer.rewards import Rewards
from grpo_fused.trainer.rewards.reward_model import RewardModel
from grpo_fused.trainer.run.data import load_rows
from grpo_fused.trainer.run.evaluation import evaluate
from grpo_fused.trainer.run.loading import has_adapter, load_model, quantized_options
from grpo_fused.trainer.run.report import record
from grpo_fused.trainer.run.sources import Rows, has_subsets, is_hub_name
from grpo_fused.trainer.run.summary import TrainResult, last_line
from grpo_fused.trainer.run.train_config import TrainConfig
from grpo_fused.trainer.run.validation import check_output_dir
from grpo_fused.trainer.trainer import GRPOTrainer

TRAIN_SEED, EVAL_SEED = 0, 1  # of generated tasks: no held-out row is a training row


def make_trainer(config: TrainConfig) -> GRPOTrainer:
    """Loads the model, data and rewards of a config and returns their trainer.

    Raises:
        ValueError: the model, data or rewards cannot be loaded or do not fit the settings.
    """
    check_output_dir(config.output_dir)
    data, eval_data = load_data(config), load_eval_data(config)
    rewards = make_rewards(config)
    if has_adapter(config.model) and (config.lora_rank or distribution(config)):
        raise ValueError(
            f"model {config.model} holds an adapter, which is trained further: lora_rank must be 0 "
            "and the model not be distributed; or merge it (peft's merge_and_unload) and train a "
            "new one"
        )
    if config.quantization and not (config.lora_rank or has_adapter(config.model)):
        raise ValueError(
            f"quantization {config.quantization} requires lora_rank, because quantized weights "
            "cannot be trained, got 0"
        )
    transformers.set_seed(config.seed)
    distributed = distribution(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer or config.model)
        dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        options = distributed | quantized_options(config.quantization, dtype)
        model = load_model(config.model, dtype, **options)
    except (OSError, ValueError) as error:
        where = "" if Path(config.model).is_dir() else " (there is no such folder)"
        raise ValueError(f"model {config.model} cannot be loaded{where}: {error}") from error
    return GRPOTrainer(
        model,
        rewards,
        config,
        data,
        tokenizer=tokenizer,
        eval_data=eval_data,
        peft_config=make_lora_config(config),
    )


def distribution(config: TrainConfig) -> dict[str, Any]:
    """Returns keywords of `from_pretrained`; none if Accelerate wraps the model.

    Raises:
        ValueError: the ranks are not a multiple of tensor_parallel_size; or they are more, and
            neither DDP nor FSDP2 combines with it.
    """
    tensor, world = config.tensor_parallel_size, int(os.environ.get("WORLD_SIZE", 1))
    if tensor == 1 and not config.fully_shard:
        return {}
    if world % tensor:
        raise ValueError(f"tensor_parallel_size must divide the {world} ranks, got {tensor}")
    if world > tensor and not config.fully_shard:
        raise ValueError(
            f"fully_shard is needed for {world // tensor} data-parallel ranks with "
            f"tensor_parallel_size {tensor}, got False"
        )
    from transformers import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=tensor, fsdp_size=world // tensor)}


def train(config: TrainConfig) -> TrainResult:
    """Trains, then prints how the run ended and where its results are."""
    transformers.utils.logging.disable_progress_bar()
    trainer = make_trainer(config)
    result = trainer.train()
    if trainer.accelerator.is_main_process:
        print(last_line(result, config))
        if result.signal:
            record(last_line(result, config))  # or a launcher reports a failure without a cause
    return result


def evaluate_model(config: TrainConfig) -> None:
    """Prints the means of `evaluate` for the model of a config, a line of JSON, and writes nothing.

    Raises:
        ValueError: there is no eval_data; as `make_trainer`.
    """
    transformers.utils.logging.disable_progress_bar()
    trainer = make_trainer(replace(config, report_to=[]))
    means = evaluate(trainer)
    if trainer.accelerator.is_main_process:
        print(json.dumps(means))


def make_rewards(config: TrainConfig) -> Rewards:
    """Returns the rewards of a config, with the training of its reward_model, if it has one."""
    if config.reward_model is None:
        return Rewards(config.rewards, config.reward_weights)
    assert config.preference is not None
    try:
        model = RewardModel(config.reward_model)
    except OSError as error:
        raise ValueError(f"reward_model {config.reward_model} cannot be loaded: {error}") from error
    history = [] if config.reward_data is None else load_rows(config.reward_data)
    training = RewardTraining(model, config.preference, history)
    return Rewards([*config.rewards, model], config.reward_weights, training)


def load_data(config: TrainConfig) -> Rows:
    """Loads the training rows of a config, or opens their stream."""
    return load_rows(
        config.data,
        columns=config.data_columns,
        subset=config.data_config,
        split=config.data_split,
        revision=config.data_revision,
        streaming=config.data_streaming,
        system_prompt=config.system_prompt,
        task_size=config.task_rows,
        task_seed=2 * config.seed + TRAIN_SEED,
    )


def load_eval_data(config: TrainConfig) -> Rows | None:
    """Loads the held-out rows of a config, if it has any; a file needs no subset or revision."""
    if config.eval_data is None:
        return None
    source = config.eval_data
    return load_rows(
        source,
        columns=config.data_columns,
        subset=config.data_config if has_subsets(source) else None,
        split=config.eval_data_split or config.data_split,
        revision=config.data_revision if is_hub_name(source) else None,
        system_prompt=config.system_prompt,
        task_size=config.task_rows,
        task_seed=2 * config.seed + EVAL_SEED,
    )


def make_lora_config(config: TrainConfig):
    """Returns the LoraConfig of a config, or None without adapters."""
    if not config.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=config.lora_target_modules or "all-linear",
    )
