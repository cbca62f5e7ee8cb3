"""`grpo-fused train`: from a config to a trained model in its output_dir."""

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fused.trainer.config import TrainConfig
from grpo_fused.trainer.data import load_rows
from grpo_fused.trainer.rewards import Rewards
from grpo_fused.trainer.tracking import RunLog
from grpo_fused.trainer.trainer import GRPOTrainer, TrainResult


def make_trainer(config: TrainConfig) -> GRPOTrainer:
    """The trainer of a config, with its model, data, rewards and log.

    Raises:
        ValueError: a model, data or rewards that are not there, or settings that do not fit them.
    """
    data, eval_data = rows_of(config, config.data, 0), None
    if config.eval_data is not None:
        eval_data = rows_of(config, config.eval_data, 1)
    rewards = Rewards(config.rewards, config.reward_weights)
    transformers.set_seed(config.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer or config.model)
        dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype)
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
        peft_config=adapters_of(config),
        run_log=run_log,
    )


def train(config: TrainConfig) -> TrainResult:
    """Trains and says where everything is."""
    transformers.utils.logging.disable_progress_bar()
    trainer = make_trainer(config)
    result = trainer.train()
    if trainer.accelerator.is_main_process:
        ended = f"interrupted after {result.step}" if result.signal else f"trained {result.step}"
        print(f"{ended} of {config.max_steps} steps; model/ and metrics.jsonl in ", end="")
        print(f"{config.output_dir}; --resume latest goes on" if result.signal else
              config.output_dir)  # fmt: skip
    return result


def rows_of(config, source, part):
    """Rows of a source; training (part 0) and held-out rows (1) of one task are others."""
    return load_rows(
        source,
        columns=config.data_columns,
        split=config.data_split,
        system_prompt=config.system_prompt,
        task_size=config.task_rows,
        task_seed=2 * config.seed + part,
    )


def adapters_of(config):
    """LoRA's settings, or None."""
    if not config.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=config.lora_target_modules or "all-linear",
    )
