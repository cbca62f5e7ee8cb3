"""Keys of mutants that renaming leaves alone: of a file, function, variable, argument or field.

A key, `3f2a91c4-e0d1`, has two digests. The first is that of the statement around the change (of
a compound statement, only its header), of the changed node in it, and of the change itself. The
second is that of the surroundings: the headers of the blocks around the statement and the
statements just before and after it. Names stand in both as numbers in the order in which they
first occur; operators, literals and the words of torch, Triton and Python stay as they are.
"""

import ast
import hashlib

# Names that stay: modules, with their attributes; builtins; attributes and keywords of tensors.
MODULES = {"F", "functools", "itertools", "math", "tl", "torch", "triton"}
BUILTINS = set(
    "abs all any bool enumerate float int isinstance len list max min range reversed set sorted "
    "str sum tuple type zip".split()
)
WORDS = set(
    """
    abs all amax amin any append arange argsort atomic_add bool bool_ ceil clamp clamp_
    constexpr contiguous copy_ cummax cummin cumsum device dim dtype element_size element_ty
    empty empty_like enumerate exp expand expm1 extend fill_ flatten float float32 floor full
    full_like gather greater index_add_ index_select int int32 int64 is_floating_point isnan
    item keepdim len lesser list log log_softmax logsumexp masked_fill masked_fill_ max maximum
    mean min minimum mul mul_ multiple_of narrow new_empty new_full new_zeros nonzero numel ones
    pad permute program_id range repeat repeat_interleave reshape reversed scatter scatter_
    scatter_add scatter_add_ scatter_reduce_ select shape sort sorted split squeeze stable stack
    static_range storage_offset str strict stride sub sum t take to transpose tuple type unbind
    unflatten unfold unsqueeze values var view view_as where zero_ zeros zeros_like zip
    """.split()
)
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases", "decorator_list")
IGNORED = {"ctx", "kind", "type_comment", "type_params", "annotation", "returns"}


class Spelling:
    """Spells trees as text, names as numbers in the order in which they first occur."""

    def __init__(self):
        self.numbers = {}

    def name(self, name, words):
        if name in words:
            return name
        return f"n{self.numbers.setdefault(name, len(self.numbers))}"

    def spelled(self, node, mark=None):
        """A tree without the blocks of a compound statement; `mark` is the node that changes."""
        if isinstance(node, list):
            return "[" + ",".join(self.spelled(child, mark) for child in node) + "]"
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            return type(node).__name__  # neither its name nor its arguments
        fields = []
        for field, value in ast.iter_fields(node):
            block = field in BLOCKS and isinstance(value, list)
            if block or field in IGNORED or value is None or value == []:
                continue
            fields.append(self.field(node, field, value, mark))
        star = "*" if node is mark else ""
        return f"{star}{type(node).__name__}({','.join(fields)})"

    def field(self, node, field, value, mark):
        if isinstance(node, ast.Attribute) and field == "attr":
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in MODULES:
                return value
        if isinstance(value, str) and not isinstance(node, ast.Constant):
            words = WORDS if isinstance(node, ast.Attribute | ast.keyword) else BUILTINS | MODULES
            return self.name(value, words)
        return self.spelled(value, mark)


def block_of(statement, parent):
    """The list of statements that holds a statement."""
    for field in BLOCKS:
        block = getattr(parent, field, None)
        if isinstance(block, list) and any(x is statement for x in block):
            return block
    return [statement]


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def uses(statement, function):
    """The next statement that has a name to which a statement assigns a number, as in `x = 0.0`.

    Such statements stand in rows, all alike: what becomes of their names tells them apart.
    """
    names = {x.id for x in ast.walk(statement) if isinstance(x, ast.Name)}
    if not isinstance(statement, ast.Assign) or len(names) != 1:
        return None
    for node in ast.walk(function):
        if isinstance(node, ast.stmt) and node.lineno > statement.end_lineno:
            header = [value for field, value in ast.iter_fields(node) if field not in BLOCKS]
            found = {x.id for part in header for x in nodes(part) if isinstance(x, ast.Name)}
            if names & found:
                return node
    return None


def nodes(part):
    """All nodes of a node or of a list of nodes."""
    for node in part if isinstance(part, list) else [part]:
        if isinstance(node, ast.AST):
            yield from ast.walk(node)


def digest(node, change, parents):
    """The key of a change to a node of a tree, given the parent of every node."""
    statement = node
    while not isinstance(statement, ast.stmt):
        statement = parents[statement]
    spelling = Spelling()
    core = f"{change}|{spelling.spelled(statement, node)}"
    block = [x for x in block_of(statement, parents[statement]) if not is_docstring(x)]
    place = next(i for i, x in enumerate(block) if x is statement)
    before, after = block[max(place - 1, 0) : place], block[place + 1 : place + 2]
    around = [before, after, getattr(statement, "body", [])[:1]]
    outer = parents[statement]
    while not isinstance(outer, ast.FunctionDef):
        around.append(outer)
        outer = parents[outer]
    around += [outer.decorator_list, uses(statement, outer)]
    context = "|".join("" if x is None else spelling.spelled(x) for x in around)
    first, second = (hashlib.sha256(text.encode()).hexdigest() for text in (core, context))
    return f"{first[:8]}-{second[:4]}"
