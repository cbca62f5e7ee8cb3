"""Mutation testing: one sign, bound, mask or index of the mathematics changed at a time.

A mutant that every test passes is a survivor: a hole in the suite, or a change without a meaning,
which EQUIVALENT explains. Mutants live in a copy of the tree and the kernels in Triton's
interpreter. torch is imported once, every run of tests is a fork.
"""

import argparse
import ast
import copy
import functools
import gc
import importlib
import itertools
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from mutants_equivalent import EQUIVALENT

ROOT = Path(__file__).resolve().parents[2]
FORK = get_context("fork")

OBJECTIVES = "tests/losses/test_objectives.py"
DERIVATIVES, DIVERGENCES = f"{OBJECTIVES} -k derivative", f"{OBJECTIVES} -k 'divergences or k3'"
FAMILY = "tests/losses/test_family.py -k in_torch"
ROWS = "tests/losses/test_selective_log_softmax.py -k torch"
COLUMNS = (
    "tests/losses/test_selective_log_softmax.py -k 'triton and (half or blocks or strided or 2049)'"
)
WEIGHTS = "tests/losses/test_weights_and_metrics.py -k 'weights and not triton'"
BOUNDS = "tests/losses/test_edges.py tests/kernels/test_rows.py tests/losses/test_selected_away.py -k 'not triton'"
KERNEL_BOUNDS = (
    "tests/losses/test_edges.py tests/kernels/test_rows.py tests/losses/test_weights_and_metrics.py"
)
KERNEL_BOUNDS = f"{KERNEL_BOUNDS} -k 'not torch and not any_cut'"
BOTH = "tests/losses/test_equalities.py -k '(two_imp or triton and tensors) and (dapo or gspo)'"
FILES = "equalities edges family autograd selected_away masks loss selective_log_softmax extremes"
FILES = f"{FILES} weights_and_metrics invariants far memory objectives launches corrections rows"
FILES = " ".join(
    str(next(Path(__file__).parents[1].glob(f"*/test_{name}.py")).relative_to(ROOT))
    for name in f"{FILES} unaligned shared_rows".split()
)
UNALIGNED = "tests/kernels/test_unaligned.py -k '(1031 or 4101 or behind) and fp32'"
SHARED = "merged or bytes or without or owns or leave or (losses and odd and fp32)"
SHARED = f"tests/kernels/test_shared_rows.py -k '{SHARED}'"
HEAD = "tests/head/test_linear.py -k 'torch and (every_loss or packed or upstream or another_way)'"
HEAD_COST = "tests/head/test_linear_cost.py tests/head/test_linear_products.py -k 'not triton'"
HEAD_FILES = (
    "tests/head/test_linear.py tests/head/test_linear_cost.py tests/head/test_linear_use.py"
)
HEAD_FILES += " tests/head/test_linear_compile.py tests/head/test_linear_products.py"
TORCH, TRITON = f"{FILES} -k 'not triton'", f"{FILES} -k 'not torch'"

# Where the mathematics is, and what kills its mutants fastest; then comes all that could.
KILLERS = {
    "grpo_fused/objectives.py": (DERIVATIVES, "tests/losses/test_edges.py", FAMILY, OBJECTIVES),
    "grpo_fused/sequence_objectives.py": (FAMILY, BOUNDS),
    "grpo_fused/divergences.py": (DIVERGENCES, FAMILY, BOUNDS),
    "grpo_fused/weights.py": (WEIGHTS, FAMILY, BOUNDS),
    "grpo_fused/sequences.py": (FAMILY, BOUNDS),
    "grpo_fused/coupled.py": (FAMILY, BOUNDS),
    "grpo_fused/corrections.py": ("tests/losses/test_corrections.py -k 'not ranks'", BOUNDS),
    "grpo_fused/advantages.py": ("tests/losses/test_advantages.py",),
    "grpo_fused/metrics.py": (FAMILY, BOUNDS),
    "grpo_fused/rows.py": (ROWS, FAMILY, BOUNDS),
    "grpo_fused/reference.py": (FAMILY, ROWS, BOUNDS),
    "kernels/objective.py": (DIVERGENCES, KERNEL_BOUNDS, DERIVATIVES),
    "kernels/columns.py": (COLUMNS, UNALIGNED, BOTH),
    "kernels/online_softmax.py": (BOTH, COLUMNS, KERNEL_BOUNDS, SHARED, UNALIGNED),
    "kernels/row_gradient.py": (BOTH, COLUMNS, KERNEL_BOUNDS, SHARED, UNALIGNED),
    "kernels/fused_loss.py": (BOTH, KERNEL_BOUNDS, SHARED),
    "kernels/row_statistics.py": (SHARED, COLUMNS, UNALIGNED, KERNEL_BOUNDS),
    "kernels/partials.py": (SHARED,),
    "kernels/token_loss.py": (BOTH, KERNEL_BOUNDS),
    "kernels/logprob.py": (BOTH, COLUMNS, KERNEL_BOUNDS, SHARED),
    "kernels/reduce.py": (BOTH, KERNEL_BOUNDS),
    "kernels/rescale.py": ("tests/losses/test_edges.py -k 'triton and upstream'", UNALIGNED),
    "kernels/pages.py": ("tests/kernels/test_memory.py",),
    "kernels/linear.py": (HEAD, HEAD_COST),
    "kernels/linear_launchers.py": (HEAD, HEAD_COST),
    "grpo_fused/linear_coupled.py": (HEAD, HEAD_COST),
    "grpo_fused/ordering.py": (HEAD, HEAD_COST),
}
WHOLE, DRAWN = (
    "tests/kernels/test_shared_rows.py tests/kernels/test_unaligned.py",
    "tests/losses/test_family.py -k in_triton",
)
EVERYTHING = dict.fromkeys(KILLERS, (TORCH,))
EVERYTHING |= {path: (WHOLE, DRAWN, TRITON) for path in KILLERS if path.startswith("kernels/")}
EVERYTHING["kernels/token_loss.py"] = (DRAWN, TRITON)
EVERYTHING["grpo_fused/advantages.py"] = (
    "tests/losses/test_advantages.py tests/losses/test_edges.py",
)
EVERYTHING["grpo_fused/objectives.py"] = (FILES,)  # written in torch and in Triton
EVERYTHING |= {
    path: (f"{HEAD_FILES} -k 'not triton'",) for path in KILLERS if HEAD in KILLERS[path]
}

# Validation is tested by its messages; what is only fast is measured.
NOT_FUNCTIONS = ("_check", "check_", "__post_init__", "_is_number", "chunk_rows", "_processors")
NOT_KEYWORDS = {
    "eviction_policy",
    "num_warps",
    "writes",
    "reads",
    "persistent",
    "crowd",
    "axis",
    "dim",
    "unsafe",
    "disable_licm",
}
NOT_NAMES = {"GAP_ELEMENTS", "BLOCK_BYTES", "COPY_BYTES", "TURNED_BYTES"}

# The negation of < is killed by whatever kills <= (the bound itself) or > (the direction).
SWAPS = [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.FloorDiv, ast.Mod), (ast.And, ast.Or)]
SWAPS += [(ast.BitAnd, ast.BitOr), (ast.LShift, ast.RShift), (ast.Eq, ast.NotEq)]
SWAPS += [(ast.Is, ast.IsNot), (ast.In, ast.NotIn), ("min", "max"), ("minimum", "maximum")]
SWAPS += [("lesser", "greater"), ("amin", "amax"), ("cummin", "cummax"), ("floor", "ceil")]
OTHER = {old: (new,) for pair in SWAPS for old, new in (pair, pair[::-1])}
OTHER |= {ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE)}
OTHER |= {ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE)}

Mutant = namedtuple("Mutant", "path number line change source")


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
    if name in ("clamp", "clamp_"):
        bounds = dict(zip(("min", "max"), node.args, strict=False))
        bounds |= {keyword.arg: keyword.value for keyword in node.keywords}
        for bound, other in (("min", "max"), ("max", "min")):
            if bound in bounds:
                kept = ast.keyword(other, bounds.get(other, bounds[bound]))
                change = f"no {bound}" if other in bounds else f"{bound} -> {other}"
                yield change, changed(args=[], keywords=[kept])


def expressions(node, role=None):
    """Yield (node, role) of all that is worth a change."""
    body = getattr(node, "body", None)
    children = [(child, None) for child in body] if isinstance(body, list) else []
    if isinstance(node, ast.FunctionDef):
        children = [] if node.name.startswith(NOT_FUNCTIONS) else children
    elif isinstance(node, ast.ClassDef):
        children = [pair for pair in children if isinstance(pair[0], ast.FunctionDef)]
    elif isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.AnnAssign)):
        children = []  # AnnAssign: a constexpr, a block size
    elif isinstance(node, ast.If) and any(isinstance(child, ast.Raise) for child in body):
        children = [(child, None) for child in node.orelse]
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "multiple_of":
        children = [(node.args[0], None)]
    elif isinstance(node, ast.Assign) and any(name in ast.unparse(node) for name in NOT_NAMES):
        children = []
    elif not (isinstance(node, ast.keyword) and node.arg in NOT_KEYWORDS):
        yield node, role
        counts = isinstance(node, (ast.Subscript, ast.BinOp, ast.Compare, ast.AugAssign))
        passes = role == "index" and isinstance(node, (ast.Slice, ast.UnaryOp, ast.Tuple))
        role, test = "index" if counts or passes else None, getattr(node, "test", None)
        children = [(x, "test" if x is test else role) for x in ast.iter_child_nodes(node)]
    for child in children:
        yield from expressions(*child)


def mutants(path):
    """Every mutant of a file; a change made again in the same line of code has a number."""
    text = (ROOT / path).read_text()
    lines = text.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]
    seen = Counter()
    code = [x for x in ast.parse(text).body if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
    for node, role in itertools.chain.from_iterable(map(expressions, code)):
        for change, new in changes(node, role):
            line = lines[node.lineno - 1].strip()
            again = seen[line[:40], change] = seen[line[:40], change] + 1
            change += f" #{again}" * (again > 1)
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            word = ast.unparse(new) if isinstance(node, ast.stmt) else f"({ast.unparse(new)})"
            yield Mutant(path, node.lineno, line, change, text[:begin] + word + text[end:])


def enter(directory):
    """In a worker: its copy of the tree, in lib/: conftest takes the tests' parent off sys.path."""
    global COPY
    COPY = Path(tempfile.mkdtemp(dir=directory))
    ignore = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(ROOT / "grpo_fused", COPY / "lib/grpo_fused", ignore=ignore)
    shutil.copytree(ROOT / "kernels", COPY / "lib/grpo_fused/kernels", ignore=ignore)
    shutil.copytree(ROOT / "tests", COPY / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", COPY)


def first_failure(arguments, seconds=None):
    """Of pytest in a fork, or None if it is green; what takes longer than seconds has failed."""
    log = COPY / "log"
    child = FORK.Process(target=run_pytest, args=(arguments, log))
    child.start()
    child.join(seconds)
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
        return "timeout"
    failures = [x[7:] for x in log.read_text().splitlines() if x.startswith(("FAILED", "ERROR "))]
    return (failures or [f"exit code {child.exitcode}"])[0] if child.exitcode else None


def run_pytest(arguments, log):
    import hypothesis.internal.conjecture.engine as engine
    import pytest

    engine.MAX_SHRINKS = 0  # any counterexample will do, the smallest takes minutes
    os.setsid()
    os.chdir(COPY)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    sys.path.insert(0, str(COPY / "lib"))
    assert importlib.util.find_spec("grpo_fused").origin.startswith(str(COPY))
    code = pytest.main(["-xq", "--tb=no", "-pno:cacheprovider", *shlex.split(arguments)])
    sys.stdout.flush()
    os._exit(code)


@functools.cache
def seconds_green(arguments):
    """A test that fails without a mutation would kill every mutant."""
    start = time.monotonic()
    failure = first_failure(arguments)
    assert failure is None, f"red without a mutation: {failure}"
    return time.monotonic() - start


def killer(mutant, stages):
    """The first test that fails on a mutant, or None: it survived."""
    path = COPY / "lib/grpo_fused" / mutant.path.removeprefix("grpo_fused/")
    original = path.read_text()
    for arguments in itertools.chain.from_iterable(stage[mutant.path] for stage in stages):
        limit = 20 + 2 * seconds_green(arguments)  # a loop that no longer ends
        path.write_text(mutant.source)
        failure = first_failure(arguments, limit)
        path.write_text(original)
        if failure:
            return failure


def key(mutant):
    return f"{mutant.path} `{mutant.change}` {mutant.line:.40}"


def explanation(mutant):
    """Why no test can tell a mutant, or nothing."""
    return next((reason for reason, keys in EQUIVALENT.items() if key(mutant) in keys), "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="FILE", choices=KILLERS, default=[*KILLERS])
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    parser.add_argument("--limit", type=int, help="number of mutants, evenly spread over all")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--quick", action="store_true", help="only what kills nearly all, fast")
    parser.add_argument("--again", type=Path, help="output of --quick: only what survived there")
    options = parser.parse_args()
    chosen = [mutant for path in options.only for mutant in mutants(path)]
    if options.again:
        text = options.again.read_text()
        chosen = [mutant for mutant in chosen if f"SURVIVED  {key(mutant)}  line" in text]
    limit = min(options.limit or len(chosen), len(chosen))
    chosen = [chosen[i * len(chosen) // limit] for i in range(limit)]
    if options.list:
        print(*(f"{x.path}:{x.number} `{x.change}` {x.line}" for x in chosen), sep="\n")
        print(f"{limit} mutants")
        return 0
    os.environ.update(OMP_NUM_THREADS="1", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # half of a second, 2,000 times
    sys.dont_write_bytecode = True  # a mutant may be as long as another, and of the same second
    del sys.path[0]  # the tests of the working tree
    count = Counter()
    with (
        tempfile.TemporaryDirectory(prefix="mutants") as directory,
        ProcessPoolExecutor(options.jobs, FORK, enter, (directory,)) as pool,
    ):
        for name in ("hypothesis", "pytest", "torch._dynamo", "triton"):
            importlib.import_module(name)
        gc.freeze()  # pytest collects garbage twice: what the forks share is none
        # Minutes of tests are only for what nothing kills and nothing explains.
        quick = [options.quick or bool(explanation(mutant)) for mutant in chosen]
        stages = [[KILLERS] if only else [KILLERS, EVERYTHING] for only in quick]
        for mutant, failure in zip(chosen, pool.map(killer, chosen, stages), strict=True):
            reason = failure or explanation(mutant)
            verdict = "killed" if failure else "explained" if reason else "SURVIVED"
            count[verdict] += 1
            print(f"{verdict:9} {key(mutant)}  line {mutant.number}  {reason}", flush=True)
        gc.unfreeze()  # or nanobind reports Triton's own objects as leaks
    killed, explained, survived = (count[x] for x in ("killed", "explained", "SURVIVED"))
    print(f"{limit} mutants, {killed} killed, {explained} explained, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
