"""Checks that a checkpoint belongs to the run that resumes from it."""

import dataclasses
import json
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from grpo_fused.trainer.reference import is_peft_model

WAY_OUT = (
    "set it back, or start a new run, in another output_dir, from the weights in the model/ that a "
    "finished or interrupted run leaves"
)

VOLATILE = (
    "_name_or_path",
    "architectures",
    "dtype",
    "transformers_version",
)  # changed by saving a model


def _number(rows: int | str) -> str:
    return f"{rows} rows" if isinstance(rows, int) else rows  # "a stream"


def _frozen(current: float | None, saved: float | None) -> str:
    if saved is None:
        return "some weights are frozen, but the checkpoint is of a run that trained all of them"
    if current is None:
        return "all weights are trained, but the checkpoint is of a run with frozen weights"
    return (
        "the frozen weights are not those of the checkpoint, which only has the trained ones "
        f"(their sum of magnitudes is {current}, it was {saved}): the base model is another"
    )


def _adapters(current: dict | None, saved: dict | None) -> str:
    if saved is None or current is None:
        has, had = ("no ", "") if current is None else ("", "no ")
        return f"the model has {has}adapters, the checkpoint is of a run with {had}adapters"
    for name in sorted(current.keys() | saved.keys()):
        if current.get(name) != saved.get(name):
            return _difference(f"of adapter {name}", current.get(name, {}), saved.get(name, {}))
    raise AssertionError("the adapters are equal")


def _reward_model(current: dict | None, saved: dict | None) -> str:
    if saved is None or current is None:
        trains, trained = ("no", "one") if current is None else ("a", "none")
        return (
            f"{trains} reward model is trained, the checkpoint is of a run that trained {trained}"
        )
    return _difference("of the reward model", current, saved)


def _difference(of_what: str, current: dict, saved: dict) -> str:
    """Names the first setting that differs."""
    name = min(k for k in current.keys() | saved.keys() if current.get(k) != saved.get(k))
    return f"{name} {of_what} is {current.get(name)!r}, the checkpoint has {saved.get(name)!r}"


# What of `run_metadata` must be the same in the checkpoint, and what a difference means.
FIXED: dict[str, Callable[[Any, Any], str]] = {
    "distributed": lambda current, saved: (
        f"the model is {'' if current else 'not '}distributed by transformers, that of the "
        f"checkpoint was{'' if saved else ' not'}"
    ),
    "rows": lambda current, saved: (
        f"data has {_number(current)}, the checkpoint had {_number(saved)}"
    ),
    "content of rows": lambda current, saved: (
        "the rows of data are not those of the checkpoint (their checksum is "
        f"{current}, it was {saved})"
    ),
    "model": lambda current, saved: _difference("of the model", current or {}, saved or {}),
    "adapters": _adapters,
    "reward model": _reward_model,
    "frozen weights": _frozen,
}


def run_metadata(trainer) -> dict[str, Any]:
    """Describes a run as JSON: its progress, its settings, and the data and model it uses."""
    training = trainer.reward_training
    return {
        "step": trainer.step,
        "rollouts": trainer.rollouts,
        "data position": trainer.data_position,
        "refreshed": trainer.refreshed,
        "ranks": trainer.ranks.size,
        "distributed": trainer.ranks.distributed,
        **trainer.order.content,
        "place in data": trainer.order.state_dict(trainer.data_position),
        "model": model_settings(trainer.unwrapped),
        "frozen weights": trainer.frozen_checksum,
        "adapters": adapter_settings(trainer.unwrapped),
        "reward model": None if training is None else model_settings(training.model.model),
        "config": dataclasses.asdict(trainer.config),
    }


def agreed_values(config, content: dict[str, Any], model) -> dict[str, Any]:
    """Returns what every rank of a run must have been given alike, by name.

    `content` is that of the data's order.
    """
    settings = {name: repr(value) for name, value in dataclasses.asdict(config).items()}
    for name in ("output_dir", "report_to", "progress_bar"):  # matters to the rank that writes
        settings.pop(name)
    model = type(model).__name__, [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    values = {"the model": zlib.crc32(repr(model).encode())}
    rows = {"the number of rows": content["rows"], "data": content["content of rows"]}
    return settings | values | rows


def check_same_run(saved: dict[str, Any], current: dict[str, Any], config) -> None:
    """Checks that resuming gives the run that would have happened without the interruption.

    Warns of settings that may change, but not without any effect.

    Args:
        saved: `run_metadata` from the checkpoint.
        current: `run_metadata` of the trainer that resumes.
        config: dataclass of the current settings.

    Raises:
        ValueError: naming the first setting that differs, and the way out.
    """
    for name, is_what in FIXED.items():
        if name in saved and saved[name] != current[name]:
            raise ValueError(f"resume: {is_what(current[name], saved[name])}; {WAY_OUT}")
    is_constant = getattr(config, "lr_scheduler_type", "").startswith("constant")
    for field in dataclasses.fields(config):
        mutable = field.metadata.get("mutable_on_resume")
        if mutable is True or field.name not in saved["config"]:
            continue
        if field.name == "max_steps" and is_constant and getattr(config, "iterations", 1) == 1:
            continue  # neither learning rate nor iterations of earlier steps depend on it
        value, before = getattr(config, field.name), saved["config"][field.name]
        if value == before:
            continue
        differs = f"resume: {field.name} is {value!r}, the checkpoint has {before!r}"
        if field.name == "micro_batch_size" and config.objective_or_default.couples == "batch":
            differs += f" ({config.loss_type} selects tokens of a micro-batch by comparing them)"
        elif mutable:
            warnings.warn(f"{differs}: {mutable}", stacklevel=2)
            continue
        raise ValueError(f"{differs}; {WAY_OUT}")


def model_settings(model) -> dict[str, Any] | None:
    """Returns the settings of a transformers model as JSON values, without where it came from."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        return None
    settings = json.loads(json.dumps(config.to_diff_dict(), default=str))
    return {k: v for k, v in settings.items() if k not in VOLATILE}


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
