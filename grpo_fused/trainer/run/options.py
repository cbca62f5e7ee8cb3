"""Dataclass fields as options: declared with bounds, read from YAML and the command line.

pydantic converts and checks the values. Ours are the wording of errors, with the line of the file
and the nearest name, and the help text.
"""

import contextlib
import functools
import re
import textwrap
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import pydantic
import yaml

from grpo_fused.checks import check_choice, nearest

T = TypeVar("T")
NULLS = ("", "none", "null", "~")
TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
BOUND_NAMES = {"ge": "at least", "gt": "above", "le": "at most"}
BOUND_ERRORS = ("greater_than_equal", "greater_than", "less_than_equal", "finite_number")


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
    mutable_on_resume: bool | str = False,
) -> Any:
    """Declares a dataclass field with a description and the values it accepts.

    Args:
        default: default value; a list or dict is copied for every instance.
        help: what the option means, with its unit.
        low, high: smallest and largest number, inclusive.
        above: exclusive lower bound.
        choices: the strings it accepts.
        mutable_on_resume: whether a resumed run may change it, because no result depends on it; or
            what then differs, in words.
    """
    bounds = {name: x for name, x in (("ge", low), ("gt", above), ("le", high)) if x is not None}
    metadata = dict(help=help, bounds=bounds, choices=choices, mutable_on_resume=mutable_on_resume)
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_options(options: Any) -> None:
    """Checks every field of a dataclass against its type and what `option` declared.

    Raises:
        ValueError: the first value of another type or out of bounds; numbers must be finite.
    """
    for this in fields(options):
        _validate(type(options), this, getattr(options, this.name), strict=True)


def load_options(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Makes an instance of a dataclass from a YAML file and `--name value` arguments.

    The type of a field decides how its value is read: `no` is a string for a str and False for a
    bool, and `1e-6` is a float; values of a dict[str, Any] are read by the rules of YAML. A list
    option also accepts a single value. One entry of a dict option is `--objective.epsilon_low 0.1`.
    Argument names may use - instead of _.

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
    hints, declared = get_type_hints(cls), {this.name: this for this in fields(cls)}  # type: ignore
    values: dict[str, Any] = {}
    for name, node, where in _from_file(path) + _from_arguments(overrides, hints):
        name, _, key = name.partition(".")
        _check_name(name, hints, where)
        value = _plain(node, hints[name])
        if key:
            if get_origin(_without_none(hints[name])) is not dict:
                raise ValueError(f"{where}: {name} is not a mapping, got {name}.{key}")
            value = {key: value}
        try:
            value = _validate(cls, declared[name], value, strict=False)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        values[name] = (values.get(name) or {}) | value if key else value
    return cls(**values)


def format_options(cls: type, width: int = 100) -> str:
    """Formats the fields of a dataclass for a help text: name, type, description, default."""
    hints = get_type_hints(cls)
    lines = []
    # Options of the command itself come first: model, data and rewards are among them.
    own = [this for this in fields(cls) if this.name in cls.__annotations__]
    for this in [*own, *(this for this in fields(cls) if this not in own)]:
        default = this.default
        if default is MISSING:
            default = None if this.default_factory is MISSING else this.default_factory()
        lines.append(f"  --{this.name} {_type_name(hints[this.name])}")
        text = this.metadata.get("help", "")
        choices = this.metadata.get("choices")
        if choices:
            text += f"; one of {', '.join(choices)}"
        if default == "" and hints[this.name] is str:
            text += " (required)"
        else:
            shown = repr(default) if isinstance(default, str) and not default.strip() else default
            text += f" (default: {'none' if default is None else shown})"
        lines += textwrap.wrap(text, width - 8, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


@functools.cache
def _validators(cls: type) -> dict[str, pydantic.TypeAdapter]:
    """Returns pydantic's validator of every field."""
    hints, finite = get_type_hints(cls), pydantic.ConfigDict(allow_inf_nan=False)
    bounds = {this.name: this.metadata.get("bounds", {}) for this in fields(cls)}
    return {
        name: pydantic.TypeAdapter(Annotated[hints[name], pydantic.Field(**rules)], config=finite)
        for name, rules in bounds.items()
    }


def _validate(cls: type, this: Field, value: Any, strict: bool) -> Any:
    """Checks the value of a field, and converts it unless `strict`."""
    try:
        value = _validators(cls)[this.name].validate_python(value, strict=strict)
    except pydantic.ValidationError as error:
        raise ValueError(_explain(this, get_type_hints(cls)[this.name], error)) from None
    choices = this.metadata.get("choices")
    if choices is not None and value is not None:
        check_choice(this.name, value, choices)
    return value


def _explain(this: Field, hint: Any, error: pydantic.ValidationError) -> str:
    """Words pydantic's first error: what must be what, and what came."""
    first = error.errors(include_url=False)[0]
    name = this.name
    for place in first["loc"]:
        name += f"[{place}]" if isinstance(place, int) else f".{place}"
        hint = get_args(_without_none(hint))[-1]
    wanted = _type_name(hint)
    if first["type"] in BOUND_ERRORS:
        bounds = this.metadata.get("bounds", {}).items()
        wanted = " and ".join(f"{BOUND_NAMES[rule]} {bound}" for rule, bound in bounds) or "finite"
    return f"{name} must be {wanted}, got {first['input']!r}"


def _from_file(path):
    """Returns [(name, node, where)]."""
    if path is None:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"config {path} cannot be read: {reason}") from error
    try:
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"config {path}{line} is not valid YAML: {error}") from error
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"config {path} must contain `name: value` lines, got a {node.id}")
    found = []
    for key, value in node.value:
        where, name = f"{path}, line {key.start_mark.line + 1}", str(key.value)
        if name in [earlier for earlier, _, _ in found]:
            raise ValueError(f"{where}: {name} is given twice")
        found.append((name, value, where))
    return found


def _from_arguments(arguments, hints):
    """Returns [(name, node, where)] from `--name value` and `--name=value`."""
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
        node = yaml.ScalarNode("tag:yaml.org,2002:str", value)
        if get_origin(_without_none(hints[name.partition(".")[0]])) in (list, dict) and value:
            try:
                node = yaml.compose(value, _Loader)
            except yaml.YAMLError as error:
                raise ValueError(f"--{name}: {value!r} is not valid YAML, like [a, b]") from error
        found.append((name, node, f"--{name}"))
    return found


def _check_name(name, hints, where):
    if name not in hints:
        raise ValueError(f"{where}: there is no option {name}{nearest(name, hints)}")


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of version 1.2: PyYAML takes 1e-6 for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _plain(node: yaml.Node, hint: Any) -> Any:
    """Returns the value of a node: by YAML's rules for a field of Any, else made of strings."""
    kind = _without_none(hint)
    loader = _Loader if Any in get_args(kind) else yaml.BaseLoader
    value = loader("").construct_object(node, deep=True)
    if not isinstance(value, str):
        return value
    if kind is not hint and value.lower() in NULLS:
        return None
    if get_origin(kind) is list:
        return [value] if value else []
    if kind is int and "e" in value.lower():  # 1e3 is an integer
        with contextlib.suppress(ValueError):
            number = float(value)
            return int(number) if number.is_integer() else value
    return value


def _without_none(hint: Any) -> Any:
    """Returns X for the type X | None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _type_name(hint: Any) -> str:
    kind = _without_none(hint)
    outer, inner = get_origin(kind), get_args(kind)
    if outer is list:
        name = f"a list of {TYPE_NAMES[inner[0]].split()[-1]}s"
    elif outer is dict:
        name = "a mapping from names to "
        name += "values" if inner[1] is Any else f"{TYPE_NAMES[inner[1]].split()[-1]}s"
    else:
        name = TYPE_NAMES[kind]
    return name if kind is hint else f"{name} or none"
