"""Options of a dataclass: what a field takes; from a YAML file and `--name value`."""

import math
import textwrap
import types
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from grpo_fused.checks import check_choice, nearest

NOTHING = ("", "none", "null", "~")
NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def option(
    default, text, *, low=-math.inf, high=math.inf, above=-math.inf, choices=None, free=False
):
    """A field that says what it means and what it takes.

    Args:
        default: its value; a list or dict is copied for every config.
        text: what it means, with its unit.
        low, high, above: bounds of a number or of a list's; low and high may be reached.
        choices: the values of a string.
        free: it may change when a run is resumed, whose results do not depend on it.
    """
    metadata = dict(help=text, low=low, high=high, above=above, choices=choices, free=free)
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_field(this, value):
    """One value against what its field says that it takes."""
    kind = _not_none(this.type)
    if value is None and kind is not this.type:
        return
    outer = get_origin(kind)
    if outer and not isinstance(value, outer):
        raise ValueError(f"{this.name} must be a {outer.__name__}, got {value!r}")
    values = value.values() if outer is dict else value if outer is list else [value]
    for one in values:
        check_value(this.name, one, get_args(kind)[-1] if outer else kind, this.metadata)


def check_value(name, value, kind, rules):
    """A str, bool, int or finite float within the bounds of `option`."""
    types = (int, float) if kind is float else kind
    if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be {NAMES[kind]}, got {value!r}")
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


def load_options(cls, path: str | Path | None = None, overrides: Sequence[str] = ()):
    """An instance of a dataclass, from a YAML file and then from `--name value` arguments.

    Values are read as text and converted by the type of their field, never guessed: `no` is a str
    for a str and False for a bool, `1e-6` is a float. A list may be one value; a field of a dict
    is `--objective.epsilon_low 0.1`; - and _ in names of arguments are the same.

    Args:
        cls: a dataclass with fields of bool, int, float, str, list, dict or Optional of these.
        path: of a YAML file with one mapping, or None.
        overrides: arguments as they come from a shell.

    Returns:
        An instance of `cls`, whose own checks have run.

    Raises:
        ValueError: a missing or broken file, an unknown name (with the nearest one), a name given
            twice in a file, a value that is not of the field's type, or what `cls` refuses.
    """
    hints = get_type_hints(cls)
    values = {}
    for name, value, where in _from_file(path) + _from_arguments(overrides, hints):
        name, _, key = name.partition(".")
        _check_name(name, hints, where)
        if key:
            if get_origin(_not_none(hints[name])) is not dict:
                raise ValueError(f"{where}: {name} has no parts, got {name}.{key}")
            inside = values.setdefault(name, {})
            values[name] = (inside or {}) | _convert({key: value}, hints[name], name, where)
        else:
            values[name] = _convert(value, hints[name], name, where)
    return cls(**values)


def format_options(cls, width: int = 100) -> str:
    """The fields of a dataclass for a help text: name, type, default and `metadata["help"]`."""
    hints = get_type_hints(cls)
    lines = []
    for this in fields(cls):
        default = this.default
        if default is MISSING:
            default = None if this.default_factory is MISSING else this.default_factory()
        lines.append(f"  --{this.name} {_name_of(hints[this.name])}")
        text = this.metadata.get("help", "")
        choices = this.metadata.get("choices")
        if choices:
            text += f"; one of {', '.join(choices)}"
        text += f" (default: {'none' if default is None else default})"
        lines += textwrap.wrap(text, width - 8, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _from_file(path):
    """[(name, value, where)]; values are text, lists or dicts of text."""
    if path is None:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"config {path} cannot be read: {reason}") from error
    try:
        loader = yaml.BaseLoader(text)  # all scalars are text: the fields' types decide
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"config {path} must hold `name: value` lines, got a {node.id}")
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
        raise ValueError(f"config {path}{line} is not YAML: {error}") from error


def _from_arguments(arguments, hints):
    """[(name, value, where)] of --name value and --name=value."""
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
        if get_origin(_not_none(hints[name.partition(".")[0]])) in (list, dict) and value:
            try:
                value = yaml.load(value, yaml.BaseLoader)
            except yaml.YAMLError as error:
                raise ValueError(f"--{name}: {value!r} is not YAML, like [a, b]") from error
        found.append((name, value, f"--{name}"))
    return found


def _check_name(name, hints, where):
    if name not in hints:
        raise ValueError(f"{where}: there is no option {name}{nearest(name, hints)}")


def _convert(value: Any, hint, name, where):
    """A text, or a list or dict of texts, as the type says."""
    kind = _not_none(hint)
    if kind is not hint and isinstance(value, str) and value.lower() in NOTHING:
        return None
    outer, inner = get_origin(kind), get_args(kind)
    if outer is list:
        values = value if isinstance(value, list) else [value] if value else []
        return [_convert(one, inner[0], name, where) for one in values]
    if outer is dict and isinstance(value, dict):
        return {key: _convert(one, inner[1], f"{name}.{key}", where) for key, one in value.items()}
    wanted = _name_of(hint)
    if not isinstance(value, str) or outer is dict:
        raise ValueError(f"{where}: {name} must be {wanted}, got {value!r}")
    if kind is str:
        return value
    try:
        if kind is bool:
            return TRUTH[value.lower()]
        number = float(value) if kind is float else _integer(value)
    except (ValueError, KeyError):
        raise ValueError(f"{where}: {name} must be {wanted}, got {value!r}") from None
    return number


def _integer(text):
    """An int; 1e3 and 2_000 are some too."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def _not_none(hint):
    """The type X of X | None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _name_of(hint):
    kind = _not_none(hint)
    outer, inner = get_origin(kind), get_args(kind)
    if outer is list:
        name = f"a list of {NAMES[inner[0]].split()[-1]}s"
    elif outer is dict:
        name = f"a mapping from names to {NAMES[inner[1]].split()[-1]}s"
    else:
        name = NAMES[kind]
    return name if kind is hint else f"{name} or none"
