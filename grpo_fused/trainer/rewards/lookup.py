"""Looks rewards up: built-in functions by name, functions by path or module, reward models."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from grpo_fused.checks import nearest
from grpo_fused.trainer.rewards.builtin import BUILTIN, PACKAGES
from grpo_fused.trainer.rewards.reward_model import load_reward_model
from grpo_fused.trainer.run.errors import locate


def find_reward(name: str) -> Callable:
    """Returns the reward function that a config refers to.

    Args:
        name: "path.py:function", "package.module:function", a name in BUILTIN, or the folder of a
            reward model.

    Raises:
        ValueError: there is no such reward; its package is not installed; its file cannot be
            imported; the folder holds no reward model.
    """
    parts = name.replace(",", " ").split()
    if len(parts) > 1 and not Path(name).exists() and any(":" in p or p in BUILTIN for p in parts):
        raise ValueError(f"rewards: several are a list, [{', '.join(parts)}], got {name!r}")
    source, colon, attribute = name.rpartition(":")
    if not colon:
        if name in BUILTIN:
            if name in PACKAGES and importlib.util.find_spec(name) is None:
                package = PACKAGES[name]
                raise ValueError(f"rewards: {name} needs {package}: pip install {package}")
            return BUILTIN[name]
        if (Path(name) / "config.json").is_file():
            return load_reward_model(name)
        if name.endswith(".py") and Path(name).is_file():
            raise ValueError(f"rewards: {name} needs the name of a function, {name}:function")
        raise ValueError(
            "rewards must be path.py:function, package.module:function, the folder of a reward "
            f"model, or one of {', '.join(BUILTIN)}, got {name!r}{nearest(name, BUILTIN)}"
        )
    module = _import_file(source) if source.endswith(".py") else _import_module(source)
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        near = nearest(attribute, names) or f", only {', '.join(names) or 'none at all'}"
        raise ValueError(f"rewards: {source} has no function {attribute}{near}")
    return function


def _import_file(path) -> ModuleType:
    if not Path(path).is_file():
        raise ValueError(f"rewards: there is no file {path}")
    resolved = Path(path).resolve()
    name = f"rewards_of_{resolved.stem}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(
            f"rewards: {path} cannot be imported ({type(error).__name__}{locate(error)}: {error})"
        ) from error
    return module


def _import_module(name) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"rewards: module {name} cannot be imported ({type(error).__name__}: {error})"
        ) from error
