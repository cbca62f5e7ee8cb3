"""Signatures with the keywords of `**options: Unpack[...]`, as `help()` shows them.

`grpo_fused.options` declares each as `name: Annotated[type, default]` of a TypedDict.
"""

import ast

import griffe

NAMES = ("Unpack", "typing_extensions.Unpack", "typing.Unpack")


def declared(source: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Returns {class: {keyword: (type, default)}} of the TypedDicts of a module.

    From its source, because griffe takes strings in an annotation for names.
    """
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for cls in ast.parse(source).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        keywords: dict[str, tuple[str, str]] = {}
        for base in cls.bases:
            keywords |= found.get(ast.unparse(base), {})
        for line in cls.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.annotation, ast.Subscript):
                kind, default = line.annotation.slice.elts
                text = kind.value if isinstance(kind, ast.Constant) else ast.unparse(kind)
                keywords[line.target.id] = text, ast.unparse(default)
        found[cls.name] = keywords
    return found


class OptionsExtension(griffe.Extension):
    """Expands the keywords of public functions once the package is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        if pkg.name != "grpo_fused":
            return
        options = declared(pkg["options"].filepath.read_text())
        for module in pkg.modules.values():
            if module.is_alias:
                continue
            for function in module.functions.values():
                if not function.is_alias:
                    expand(function, options)


def expand(function: griffe.Function, options: dict[str, dict[str, tuple[str, str]]]) -> None:
    """Replaces `**options: Unpack[X]` by the keywords of X."""
    last = function.parameters[len(function.parameters) - 1] if len(function.parameters) else None
    if last is None or last.kind is not griffe.ParameterKind.var_keyword:
        return
    outer, _, inner = str(last.annotation).rstrip("]").partition("[")
    if outer not in NAMES or inner not in options:
        return
    del function.parameters[last.name]
    for name, (kind, default) in options[inner].items():
        function.parameters.add(
            griffe.Parameter(
                name,
                annotation=kind,
                kind=griffe.ParameterKind.keyword_only,
                default=griffe.ExprConstant(default),
            )
        )
