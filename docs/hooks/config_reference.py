"""The reference of `grpo-fused train`: every field of TrainConfig, made when the site is built."""

import inspect
import re
from dataclasses import MISSING, Field, fields
from typing import get_type_hints

MARKER = "<!-- every option of TrainConfig -->"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most"}
COMMAND = "The model, the data and the rewards (the command alone)"


def on_page_markdown(markdown, page, config, files):
    if MARKER not in markdown:
        return markdown
    return markdown.replace(MARKER, reference())


def reference() -> str:
    """Returns the reference as Markdown: a heading per group of options, a definition of each."""
    from grpo_fused.trainer import GRPOTrainerConfig, TrainConfig

    hints = get_type_hints(TrainConfig)
    own = {this.name for this in fields(GRPOTrainerConfig)}
    declared = {this.name: this for this in fields(TrainConfig)}
    groups = {COMMAND: [name for name in declared if name not in own]} | groups_of(
        GRPOTrainerConfig
    )
    parts = []
    for title, names in groups.items():
        parts.append(f"## {title}")
        parts += [definition(declared[name], hints[name]) for name in names]
    return "\n\n".join(parts)


def groups_of(cls: type) -> dict[str, list[str]]:
    """Returns {comment above the first: fields} of a dataclass, in the order of its source."""
    names, title = {this.name for this in fields(cls)}, ""
    groups: dict[str, list[str]] = {}
    for line in inspect.getsource(cls).splitlines():
        if comment := re.match(r"    # (.+)", line):
            title = comment[1]
        elif (found := re.match(r"    (\w+): ", line)) and found[1] in names:
            groups.setdefault(title, []).append(found[1])
    return groups


def definition(this: Field, hint: object) -> str:
    """Returns a field as a definition with an anchor: its facts, and its help."""
    default = this.default
    if default is MISSING:
        default = this.default_factory()  # type: ignore[misc]
    required = default == "" and hint is str
    facts = [f"*{type_of(hint)}*"]
    facts.append("required" if required else f"default `{value_of(default)}`")
    bounds = this.metadata.get("bounds", {}).items()
    facts += [" and ".join(f"{BOUNDS[rule]} {bound}" for rule, bound in bounds)] if bounds else []
    if choices := this.metadata.get("choices"):
        facts.append("one of " + ", ".join(f"`{choice}`" for choice in choices))
    facts.append(resume_rule(this))
    text = this.metadata["help"]
    text = text[0].upper() + text[1:]
    # Underscores and brackets of help texts are no Markdown.
    text = re.sub(r"([_*\[\]])", r"\\\1", text)
    return f"`{this.name}`{{ #{this.name} }}\n:   {text}.\n\n    {'; '.join(facts)}."


def resume_rule(this: Field) -> str:
    """Returns whether a resumed run may change a field, in words."""
    mutable = this.metadata.get("mutable_on_resume", False)
    if mutable is True:
        return "may change on resume"
    return f"may change on resume: {mutable}" if mutable else "fixed on resume"


def type_of(hint: object) -> str:
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    if "[" in str(hint):
        text = str(hint)
    return text.replace("typing.", "").replace(" | None", " or none").replace("[", r"\[")


def value_of(default: object) -> str:
    if isinstance(default, str) and not default.isprintable():
        return repr(default)
    return "none" if default is None else str(default)
