"""Mutants of a source: one sign, bound, mask or index of the mathematics changed at a time."""

import ast
import copy
import itertools
from collections import Counter
from typing import NamedTuple

from digests import digest
from tables import NOT_FUNCTIONS, NOT_KEYWORDS, NOT_NAMES, ROOT

# The negation of < is killed by whatever kills <= (the bound itself) or > (the direction).
SWAPS = [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.FloorDiv, ast.Mod), (ast.And, ast.Or)]
SWAPS += [(ast.BitAnd, ast.BitOr), (ast.LShift, ast.RShift), (ast.Eq, ast.NotEq)]
SWAPS += [(ast.Is, ast.IsNot), (ast.In, ast.NotIn), ("min", "max"), ("minimum", "maximum")]
SWAPS += [("lesser", "greater"), ("amin", "amax"), ("cummin", "cummax"), ("floor", "ceil")]
OTHER = {old: (new,) for pair in SWAPS for old, new in (pair, pair[::-1])}
OTHER |= {ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE)}
OTHER |= {ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE)}


class Mutant(NamedTuple):
    """One change to a source.

    Attributes:
        path: of the source, below the root.
        function: that holds the change: `name` or `Class.name`.
        number: of the line.
        line: its text.
        column: in it, where the change begins.
        change: in words, with a number if the function has it again in a line that begins alike.
        key: of the exemption, see `digests`.
        source: the whole text with the change.
    """

    path: str
    function: str
    number: int
    line: str
    column: int
    change: str
    key: str
    source: str

    @property
    def name(self):
        """Identifies it among all mutants of one state of the code."""
        return f"{self.path}:{self.number} {self.function} `{self.change}` {self.key}"


def changes(node, role):
    """Yield (change, new node); role is that of a node in its parent: "index", "test" or None."""

    def changed(**fields):
        new = copy.copy(node)
        vars(new).update(fields)
        return new

    ops = [node.op] if hasattr(node, "op") else getattr(node, "ops", [])
    for new in OTHER.get(type(ops[0]), ()) if len(ops) == 1 else ():
        field = {"op": new()} if hasattr(node, "op") else {"ops": [new()]}
        yield f"{type(ops[0]).__name__} -> {new.__name__}", changed(**field)
    value = getattr(node, "value", None)
    if isinstance(node, ast.UnaryOp):
        yield f"{type(node.op).__name__} dropped", node.operand
    elif isinstance(node, ast.Name) and role == "test":
        yield f"not {node.id}", ast.UnaryOp(ast.Not(), node)
    elif isinstance(value, bool):
        yield f"{value} -> {not value}", changed(value=not value)
    elif isinstance(value, float):
        new = 1.0 - value if value in (0.0, 1.0) else 2.0 * value
        yield f"{value} -> {new}", changed(value=new)
    elif isinstance(value, int) and role == "index":
        yield f"{value} -> {value + 1}", changed(value=value + 1)
    field = "attr" if isinstance(getattr(node, "func", None), ast.Attribute) else "id"
    name = getattr(getattr(node, "func", None), field, None)
    for new in OTHER.get(name, ()):
        func = copy.copy(node.func)
        setattr(func, field, new)
        yield f"{name} -> {new}", changed(func=func)
    if name == "where" and isinstance(node.args[0], ast.Name):
        yield "branches swapped", changed(args=[node.args[0], *node.args[:0:-1]])
    if name in ("clamp", "clamp_") and not any(isinstance(x, ast.Starred) for x in node.args):
        bounds = dict(zip(("min", "max"), node.args, strict=False))
        bounds |= {keyword.arg: keyword.value for keyword in node.keywords}
        for bound, other in (("min", "max"), ("max", "min")):
            if bound in bounds:
                kept = ast.keyword(other, bounds.get(other, bounds[bound]))
                change = f"no {bound}" if other in bounds else f"{bound} -> {other}"
                yield change, changed(args=[], keywords=[kept])


def expressions(node, role=None, names=()):
    """Yield (node, role, names of the classes and functions around it) of all worth a change."""
    body = getattr(node, "body", None)
    children = [(child, None) for child in body] if isinstance(body, list) else []
    if isinstance(node, ast.FunctionDef):
        children = [] if node.name.startswith(NOT_FUNCTIONS) else children
        names = (*names, node.name)
    elif isinstance(node, ast.ClassDef):
        children = [pair for pair in children if isinstance(pair[0], ast.FunctionDef)]
        names = (*names, node.name)
    elif isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.AnnAssign)):
        children = []  # AnnAssign: a constexpr, a block size
    elif isinstance(node, ast.If) and any(isinstance(child, ast.Raise) for child in body):
        children = [(child, None) for child in node.orelse]
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "multiple_of":
        children = [(node.args[0], None)]
    elif isinstance(node, ast.Assign) and any(name in ast.unparse(node) for name in NOT_NAMES):
        children = []
    elif not (isinstance(node, ast.keyword) and node.arg in NOT_KEYWORDS):
        yield node, role, names
        counts = isinstance(node, (ast.Subscript, ast.BinOp, ast.Compare, ast.AugAssign))
        passes = role == "index" and isinstance(node, (ast.Slice, ast.UnaryOp, ast.Tuple))
        role, test = "index" if counts or passes else None, getattr(node, "test", None)
        children = [(x, "test" if x is test else role) for x in ast.iter_child_nodes(node)]
    for child, child_role in children:
        yield from expressions(child, child_role, names)


def mutants_of(text, path):
    """Every mutant of a text that stands at a path."""
    lines = text.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]
    tree = ast.parse(text)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    code = [x for x in tree.body if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
    seen = Counter()
    for node, role, names in itertools.chain.from_iterable(map(expressions, code)):
        for change, new in changes(node, role):
            key = digest(node, "not" if change.startswith("not ") else change, parents)
            whole = lines[node.lineno - 1]
            line, indent = whole.strip(), len(whole) - len(whole.lstrip())
            again = seen[names, line[:40], change] = seen[names, line[:40], change] + 1
            change += f" #{again}" * (again > 1)
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            word = ast.unparse(new) if isinstance(node, ast.stmt) else f"({ast.unparse(new)})"
            source = text[:begin] + word + text[end:]
            place = (node.lineno, line, node.col_offset - indent)
            yield Mutant(path, ".".join(names), *place, change, key, source)


def mutants(path):
    """Every mutant of a source of the project."""
    return list(mutants_of((ROOT / path).read_text(), path))
