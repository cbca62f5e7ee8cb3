"""Checks of the settings, model, data and accelerator before the first training step."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType

from grpo_fused.trainer.run.config import GRPOTrainerConfig
from grpo_fused.trainer.run.data import is_stream, split_columns


def check_trackers(names: Sequence[str]) -> None:
    """Checks that all trackers are installed; Accelerate silently skips missing ones.

    Raises:
        ValueError: a tracker is not available.
    """
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ValueError(
                f"report_to: {name} is not installed or unknown to Accelerate; available are "
                f"{', '.join(available) or 'none'}"
            )


def check_output_dir(folder: str) -> None:
    """Checks, without creating it, that a folder exists or can be created, and be written to.

    Raises:
        ValueError: naming the option and the reason.
    """
    path = Path(folder).absolute()
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # ValueError: a character that no name can have
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"output_dir {folder!r} cannot be written to: {reason}") from error
    while not os.path.lexists(path):
        path = path.parent
    if not path.is_dir():
        raise ValueError(f"output_dir must be a folder, got {folder!r}: {path} is not one")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir {folder!r} cannot be written to: no permission in {path}")


def create_output_dir(folder: str) -> None:
    """Creates output_dir where it is missing.

    Raises:
        ValueError: naming the option and the reason.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {folder!r} cannot be created: {error.strerror}") from error


def make_accelerator(config: GRPOTrainerConfig) -> Accelerator:
    """Returns an Accelerator with the precision and trackers of a config."""
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # or ranks do not find each other
        mixed_precision=config.mixed_precision,
        log_with=config.report_to or None,
        project_dir=config.output_dir,
    )


def check_accelerator(config, accelerator: Accelerator) -> None:
    """Checks that a user's Accelerator agrees with the config and only splits data.

    Raises:
        ValueError: the accelerator has an unsupported setting.
    """
    num_accumulated = accelerator.gradient_accumulation_steps
    if num_accumulated != 1:
        raise ValueError(
            "the accelerator's gradient_accumulation_steps must be 1, because micro_batch_size "
            f"already controls accumulation, got {num_accumulated}"
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and max(parallel.tp_size, parallel.cp_size) > 1:
        raise ValueError(
            "the accelerator must be data parallel (DDP or FSDP2), got tensor parallel size "
            f"{parallel.tp_size}, context parallel size {parallel.cp_size}; for tensor parallelism "
            "load the model with a DistributedConfig of transformers"
        )
    project = getattr(accelerator, "project_configuration", None)
    if getattr(project, "automatic_checkpoint_naming", False):
        raise ValueError(
            "the accelerator's automatic_checkpoint_naming must be False, because the trainer "
            "names checkpoints itself"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP must be version 2 (fsdp_version: 2), because version 1 passes flat shards to "
            "generate and to the reference model"
        )
    if accelerator.mixed_precision != config.mixed_precision:
        raise ValueError(
            f"mixed_precision is {config.mixed_precision!r}, but the accelerator has "
            f"{accelerator.mixed_precision!r}"
        )


def check_model(model, config) -> None:
    """Checks a model before Accelerate prepares it.

    Raises:
        ValueError: the model has float16 weights with mixed_precision fp16.
    """
    name, weight = next(iter(model.named_parameters()))
    if config.mixed_precision == "fp16" and weight.dtype == torch.float16:
        raise ValueError(
            "mixed_precision fp16 requires a float32 model, because gradients of float16 weights "
            f"cannot be scaled, got {name} in {weight.dtype}"
        )


def check_config(config: Any) -> None:
    """Checks that a config is one of this trainer's, and that its logs can be written.

    Raises:
        ValueError: naming its type, or the option.
    """
    if not isinstance(config, GRPOTrainerConfig):
        hint = "; GRPOTrainerConfig(**config) makes one" if isinstance(config, dict) else ""
        got = type(config).__name__
        raise ValueError(f"config must be a GRPOTrainerConfig, got {got}{hint}")
    check_trackers(config.report_to)
    check_output_dir(config.output_dir)


def check_first_row(trainer) -> None:
    """Checks that the first row can be tokenized, and that rows have what rewards require.

    Rows of a list may differ in their columns, and count together. A rollout_fn may do both
    otherwise; reading a stream would move it.

    Raises:
        ValueError: as `Sampler.encode` and `Rewards.check_columns`.
    """
    if trainer.rollout_fn is not None or is_stream(trainer.data):
        return
    first = [trainer.data[0]]
    trainer.sampler.encode(*split_columns(first))
    rows = trainer.data if isinstance(trainer.data, list) else first
    trainer.rewards.check_columns(split_columns(rows)[1])


def count_rows_per_rank(config, num_ranks: int) -> int:
    """Returns the sequences per data-parallel rank of a rollout, equal for all.

    Raises:
        ValueError: sequences or minibatches cannot be divided among the ranks.
    """
    rows = config.prompts_per_rollout * config.num_generations
    if rows % num_ranks:
        raise ValueError(
            "prompts_per_rollout * num_generations must be a multiple of the "
            f"{num_ranks} ranks, got {config.prompts_per_rollout} * {config.num_generations}"
        )
    rows //= num_ranks
    if rows % config.minibatches:
        raise ValueError(
            f"minibatches must divide the {rows} sequences of each of {num_ranks} ranks, "
            f"got {config.minibatches}"
        )
    return rows


def check_refreshed(config: GRPOTrainerConfig, training: Any) -> None:
    """Checks that iterations refresh something: a reference or, with `training`, a reward model.

    Raises:
        ValueError: they do not.
    """
    if config.iterations > 1 and not config.beta and training is None:
        raise ValueError(
            "iterations requires beta > 0 or the training of a reward model, because nothing "
            f"else is refreshed, got {config.iterations}"
        )
