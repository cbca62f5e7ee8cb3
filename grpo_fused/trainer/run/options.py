"""Dataclass fields as options: declared with bounds, read from YAML and the command line."""

import math
import textwrap
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from grpo_fused.checks import check_choice, nearest

T = TypeVar("T")
NULLS = ("", "none", "null", "~")
TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def option(
    default: Any,
    help: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    choices: Sequence[str] | None = None,
    mutable_on_resume: bool = False,
) -> Any:
    """Declares a dataclass field with a description and the values it accepts.

    Args:
        default: default value; a list or dict is copied for every instance.
        help: what the option means, with its unit.
        low, high: smallest and largest number, inclusive; for a list they apply to each entry.
        above: exclusive lower bound.
        choices: the strings it accepts.
        mutable_on_resume: whether a resumed run may change it, because no result depends on it.
    """
    metadata = dict(help=help, low=low, high=high, above=above, choices=choices)
    metadata["mutable_on_resume"] = mutable_on_resume
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_field(option: Field, value: Any) -> None:
    """Checks a value against the type and bounds of the field that `option` declared.

    Raises:
        ValueError: the value has another type or is out of bounds.
    """
    kind = _without_none(option.type)
    if value is None and kind is not option.type:
        return
    outer = get_origin(kind)
    if outer and not isinstance(value, outer):
        raise ValueError(f"{option.name} must be a {outer.__name__}, got {value!r}")
    values = value.values() if outer is dict else value if outer is list else [value]
    for one in values:
        _check_value(option.name, one, get_args(kind)[-1] if outer else kind, option.metadata)


def _check_value(name, value, kind, rules):
    """Checks one str, bool, int or finite float."""
    types = (int, float) if kind is float else kind
    if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be {TYPE_NAMES[kind]}, got {value!r}")
    if rules["choices"] is not None:
        check_choice(name, value, rules["choices"])
    if kind in (bool, str):
        return
    low, high, above = rules["low"], rules["high"], rules["above"]
    if not (low <= value <= high and value > above and math.isfinite(value)):
        bounds = [f"at least {low}"] if low > -math.inf else []
        bounds += [f"above {above}"] if above > -math.inf else []
        bounds += [f"at most {high}"] if high < math.inf else []
        raise ValueError(f"{name} must be {' and '.join(bounds) or 'finite'}, got {value}")


def load_options(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Makes an instance of a dataclass from a YAML file and `--name value` arguments.

    The type of a field decides how its value is read: `no` is a string for a str and False for a
    bool, and `1e-6` is a float. A list option also accepts a single value. One entry of a dict
    option is `--objective.epsilon_low 0.1`. Argument names may use - instead of _.

    Args:
        cls: dataclass with fields of type bool, int, float, str, list, dict, or one of these or
            None.
        path: YAML file with one mapping; None for no file.
        overrides: command-line arguments, which take precedence over the file.

    Raises:
        ValueError: the file is missing or invalid; an option is unknown (the message suggests the
            nearest name), given twice in the file, or has a value of another type; `cls` rejects
            the values.
    """
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value, where in _from_file(path) + _from_arguments(overrides, hints):
        name, _, key = name.partition(".")
        _check_name(name, hints, where)
        if key:
            if get_origin(_without_none(hints[name])) is not dict:
                raise ValueError(f"{where}: {name} is not a mapping, got {name}.{key}")
            entries = values.setdefault(name, {})
            values[name] = (entries or {}) | _convert({key: value}, hints[name], name, where)
        else:
            values[name] = _convert(value, hints[name], name, where)
    return cls(**values)


def format_options(cls: type, width: int = 100) -> str:
    """Formats the fields of a dataclass for a help text: name, type, description, default."""
    hints = get_type_hints(cls)
    lines = []
    for option in fields(cls):
        default = option.default
        if default is MISSING:
            default = None if option.default_factory is MISSING else option.default_factory()
        lines.append(f"  --{option.name} {_type_name(hints[option.name])}")
        text = option.metadata.get("help", "")
        choices = option.metadata.get("choices")
        if choices:
            text += f"; one of {', '.join(choices)}"
        text += f" (default: {'none' if default is None else default})"
        lines += textwrap.wrap(text, width - 8, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _from_file(path):
    """Returns [(name, value, where)]; values are strings, or lists or dicts of strings."""
    if path is None:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"config {path} cannot be read: {reason}") from error
    try:
        loader = yaml.BaseLoader(text)  # reads every scalar as a string
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"config {path} must contain `name: value` lines, got a {node.id}")
        found = []
        for key, value in node.value:
            where = f"{path}, line {key.start_mark.line + 1}"
            name = loader.construct_object(key, deep=True)
            if name in [earlier for earlier, _, _ in found]:
                raise ValueError(f"{where}: {name} is given twice")
            found.append((str(name), loader.construct_object(value, deep=True), where))
        return found
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"config {path}{line} is not valid YAML: {error}") from error


def _from_arguments(arguments, hints):
    """Returns [(name, value, where)] from `--name value` and `--name=value`."""
    found = []
    arguments = list(arguments)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"expected --name value, got {argument!r}")
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        _check_name(name.partition(".")[0], hints, f"--{name}")
        if not equals:
            if not arguments or arguments[0].startswith("--"):
                raise ValueError(f"--{name}: a value is missing")
            value = arguments.pop(0)
        if get_origin(_without_none(hints[name.partition(".")[0]])) in (list, dict) and value:
            try:
                value = yaml.load(value, yaml.BaseLoader)
            except yaml.YAMLError as error:
                raise ValueError(f"--{name}: {value!r} is not valid YAML, like [a, b]") from error
        found.append((name, value, f"--{name}"))
    return found


def _check_name(name, hints, where):
    if name not in hints:
        raise ValueError(f"{where}: there is no option {name}{nearest(name, hints)}")


def _convert(value: Any, hint, name, where):
    """Converts a string, or a list or dict of strings, to the type of its field."""
    kind = _without_none(hint)
    if kind is not hint and isinstance(value, str) and value.lower() in NULLS:
        return None
    outer, inner = get_origin(kind), get_args(kind)
    if outer is list:
        values = value if isinstance(value, list) else [value] if value else []
        return [_convert(one, inner[0], name, where) for one in values]
    if outer is dict and isinstance(value, dict):
        return {key: _convert(one, inner[1], f"{name}.{key}", where) for key, one in value.items()}
    wanted = _type_name(hint)
    if not isinstance(value, str) or outer is dict:
        raise ValueError(f"{where}: {name} must be {wanted}, got {value!r}")
    if kind is str:
        return value
    try:
        if kind is bool:
            return BOOLEANS[value.lower()]
        return float(value) if kind is float else _parse_int(value)
    except (ValueError, KeyError):
        raise ValueError(f"{where}: {name} must be {wanted}, got {value!r}") from None


def _parse_int(text):
    """Reads an int; 1e3 and 2_000 are integers too."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def _without_none(hint):
    """Returns X for the type X | None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _type_name(hint):
    kind = _without_none(hint)
    outer, inner = get_origin(kind), get_args(kind)
    if outer is list:
        name = f"a list of {TYPE_NAMES[inner[0]].split()[-1]}s"
    elif outer is dict:
        name = f"a mapping from names to {TYPE_NAMES[inner[1]].split()[-1]}s"
    else:
        name = TYPE_NAMES[kind]
    return name if kind is hint else f"{name} or none"
