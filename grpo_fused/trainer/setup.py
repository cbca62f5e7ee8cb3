"""What a trainer checks and makes before its first step."""

import dataclasses
import warnings
from types import SimpleNamespace

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor


class TrainerState(SimpleNamespace):
    """What rewards get as `trainer_state`: of TRL's the two that a reward may depend on."""

    def __init__(self, trainer):
        super().__init__(trainer=trainer)

    @property
    def global_step(self) -> int:
        return self.trainer.step

    @property
    def max_steps(self) -> int:
        return self.trainer.config.max_steps


def check_trackers(names):
    """Accelerate leaves out, without a word, what is not installed."""
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ValueError(
                f"report_to: {name} is not installed or unknown to Accelerate, which has "
                f"{', '.join(available) or 'none'}"
            )


def check_accelerator(config, accelerator):
    """An Accelerator of one's own has settings of its own."""
    accumulated = accelerator.gradient_accumulation_steps
    if accumulated != 1:
        raise ValueError(
            "the accelerator's gradient_accumulation_steps must be 1, micro_batch_size cuts "
            f"steps, got {accumulated}"
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and max(parallel.tp_size, parallel.cp_size) > 1:
        raise ValueError(
            "the accelerator's ranks must each have rows of their own (data parallel, sharded or "
            f"not), got tensor parallel {parallel.tp_size}, context parallel {parallel.cp_size}"
        )
    project = getattr(accelerator, "project_configuration", None)
    if getattr(project, "automatic_checkpoint_naming", False):
        raise ValueError(
            "the accelerator's automatic_checkpoint_naming must be False: checkpoints would lie "
            "outside of the folder that is listed, synced and named as one"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP must be version 2 (fsdp_version: 2): version 1 hands generate and the reference "
            "flat shards"
        )
    if accelerator.mixed_precision != config.mixed_precision:
        raise ValueError(
            f"mixed_precision is {config.mixed_precision!r}, that of the accelerator is "
            f"{accelerator.mixed_precision!r}"
        )


def check_model(model, config):
    """What the ranks share of a model before it is prepared, and what fp16 can scale."""
    name, weight = next(iter(model.named_parameters()))
    if isinstance(weight, DTensor):
        raise ValueError(
            f"model must be whole on every rank, got {name} as a DTensor: FSDP2 shards it when it "
            "is prepared; tensor parallel ranks would each get rows of their own"
        )
    if config.mixed_precision == "fp16" and weight.dtype == torch.float16:
        raise ValueError(
            "mixed_precision fp16 wants a model in float32, whose gradients it can scale, got "
            f"{name} in {weight.dtype}"
        )


def hyperparameters(config):
    """Settings as trackers take them: numbers, booleans and text."""
    settings = dataclasses.asdict(config).items()
    return {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in settings}


def check_rows(name, data):
    """Rows that have a prompt each."""
    if isinstance(data, dict):
        raise ValueError(f"{name} must be rows, got a dict of {', '.join(map(str, data))}")
    if data is not None and not hasattr(data, "__len__"):
        raise ValueError(f"{name} must have a length, got {type(data).__name__}")
    if data is None or len(data) == 0:
        raise ValueError(f"{name} has no rows")
    if not isinstance(data[0], dict) or "prompt" not in data[0]:
        raise ValueError(f'{name}: rows must be dicts with a "prompt", got {data[0]!r}')
    return data


def rows_per_rank(config, num_processes):
    """Sequences of one rank in a rollout: whole groups, and as many in each minibatch."""
    prompts = config.prompts_per_rollout
    if prompts % num_processes:
        raise ValueError(
            f"prompts_per_rollout must be a multiple of the {num_processes} ranks, that groups "
            f"stay together, got {prompts}"
        )
    rows = prompts // num_processes * config.num_generations
    if rows % config.minibatches:
        raise ValueError(
            f"minibatches must divide the {rows} sequences of each of {num_processes} ranks, "
            f"got {config.minibatches}"
        )
    if config.num_generations == 1:
        warnings.warn(
            "num_generations is 1: outcome rewards of a group of one have advantage 0 and train "
            "nothing; only rewards of several steps do",
            stacklevel=3,
        )
    return rows


def split_columns(rows):
    """(prompts, columns) of rows: what is no prompt goes to the rewards, None where it lacks."""
    for row in rows:
        if "prompt" not in row:
            raise ValueError(f'a row has no "prompt": {row!r}')
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    return [row["prompt"] for row in rows], {
        name: [row.get(name) for row in rows] for name in names
    }


def make_optimizer(model, config):
    """AdamW on what is trained; norms and biases do not decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=tuple(config.adam_betas),
    )
