"""Checks that a checkpoint belongs to the run that resumes from it."""

import dataclasses
import json
import zlib
from collections.abc import Sequence
from typing import Any

from grpo_fused.trainer.reference import is_peft_model

# Keys of `run_metadata` that must be the same in the checkpoint.
FIXED = ("distributed", "rows", "content of rows", "frozen weights", "adapters")


def run_metadata(trainer) -> dict[str, Any]:
    """Describes a run as JSON: its progress, its settings, and the data and model it uses."""
    return {
        "step": trainer.step,
        "rollouts": trainer.rollouts,
        "refreshed": trainer.refreshed,
        "ranks": trainer.ranks.size,
        "distributed": trainer.ranks.distributed,
        "rows": len(trainer.data),
        "content of rows": trainer.data_checksum,
        "frozen weights": trainer.frozen_checksum,
        "adapters": adapter_settings(trainer.unwrapped),
        "config": dataclasses.asdict(trainer.config),
    }


def agreed_values(config, data: Sequence[dict], model) -> dict[str, Any]:
    """Returns what every rank of a run must have been given alike, by name."""
    settings = {name: repr(value) for name, value in dataclasses.asdict(config).items()}
    for name in ("output_dir", "report_to", "progress_bar"):  # matters to the rank that writes
        settings.pop(name)
    model = type(model).__name__, [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    values = {"the model": zlib.crc32(repr(model).encode())}
    return settings | values | {"the number of rows": len(data), "data": checksum_rows(data)}


def check_same_run(saved: dict[str, Any], current: dict[str, Any], config) -> None:
    """Checks that resuming gives the run that would have happened without the interruption.

    Args:
        saved: `run_metadata` from the checkpoint.
        current: `run_metadata` of the trainer that resumes.
        config: dataclass of the current settings.

    Raises:
        ValueError: naming the first setting that differs.
    """
    for name in FIXED:
        if saved.get(name) != current[name]:
            raise ValueError(
                f"resume: {name} is {current[name]}, the checkpoint has {saved.get(name)}"
            )
    is_constant = getattr(config, "lr_scheduler_type", "").startswith("constant")
    for field in dataclasses.fields(config):
        if field.metadata.get("mutable_on_resume") or field.name not in saved["config"]:
            continue
        if field.name == "max_steps" and is_constant:
            continue  # the learning rate of earlier steps does not depend on it
        value, before = getattr(config, field.name), saved["config"][field.name]
        if value != before:
            raise ValueError(f"resume: {field.name} is {value!r}, the checkpoint has {before!r}")


def adapter_settings(model) -> dict[str, Any] | None:
    """Returns the settings of a peft model's adapters as JSON values; None without adapters."""
    if not is_peft_model(model):
        return None
    settings = {name: config.to_dict() for name, config in model.peft_config.items()}
    text = json.dumps(settings, default=lambda x: sorted(x) if isinstance(x, set) else str(x))
    return json.loads(text)


def checksum_rows(rows: Sequence[dict], num_rows: int = 100) -> int:
    """Returns a checksum over about `num_rows` evenly spaced rows, equal in every process."""
    step = max(1, len(rows) // num_rows)
    return zlib.crc32(repr([_stable(rows[i]) for i in range(0, len(rows), step)]).encode())


def _stable(value):
    """Replaces values whose `repr` differs between processes: sets, and objects with an address."""
    if isinstance(value, dict):
        return sorted(repr((_stable(key), _stable(inner))) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return [_stable(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_stable(inner)) for inner in value)
    is_plain = value is None or isinstance(value, (str, bytes, int, float))
    return value if is_plain else type(value).__name__
