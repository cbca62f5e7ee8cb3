"""The command `grpo-fused train`: builds a trainer from a config and trains."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from grpo_fused.trainer.reward_training import RewardTraining
from grpo_fused.trainer.rewards import Rewards
from grpo_fused.trainer.rewards.reward_model import RewardModel
from grpo_fused.trainer.run.config import TrainConfig
from grpo_fused.trainer.run.data import load_rows
from grpo_fused.trainer.run.loading import has_adapter, load_model, quantized_options
from grpo_fused.trainer.run.log import RunLog
from grpo_fused.trainer.trainer import GRPOTrainer, TrainResult

TRAIN_SEED, EVAL_SEED = 0, 1  # of generated tasks: no held-out row is a training row


def make_trainer(config: TrainConfig) -> GRPOTrainer:
    """Loads the model, data and rewards of a config and returns their trainer.

    Raises:
        ValueError: the model, data or rewards cannot be loaded or do not fit the settings.
    """
    data, eval_data = load_source(config, config.data, TRAIN_SEED), None
    if config.eval_data is not None:
        eval_data = load_source(config, config.eval_data, EVAL_SEED)
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
        raise ValueError(f"model {config.model} cannot be loaded: {error}") from error
    run_log = RunLog(config.output_dir, f"{config.model}, {config.loss_type} loss")
    return GRPOTrainer(
        model,
        rewards,
        config,
        data,
        tokenizer=tokenizer,
        eval_data=eval_data,
        peft_config=make_lora_config(config),
        run_log=run_log,
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
        ended = f"interrupted after {result.step}" if result.signal else f"trained {result.step}"
        hint = "; --resume latest continues the run" if result.signal else ""
        print(
            f"{ended} of {config.max_steps} steps; model/ and metrics.jsonl in "
            f"{config.output_dir}{hint}"
        )
    return result


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


def load_source(config: TrainConfig, source: str, task_seed: int) -> Sequence[dict]:
    """Loads rows of a source; `task_seed` is TRAIN_SEED or EVAL_SEED."""
    return load_rows(
        source,
        columns=config.data_columns,
        split=config.data_split,
        system_prompt=config.system_prompt,
        task_size=config.task_rows,
        task_seed=2 * config.seed + task_seed,
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
