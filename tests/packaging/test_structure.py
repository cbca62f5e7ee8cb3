"""The house: who imports whom, and whether tables of losses are true."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grpo_fused
from grpo_fused import LOSSES, functional
from grpo_fused.losses.kl import KL_ESTIMATORS
from grpo_fused.losses.objectives import LEVELS
from grpo_fused.losses.weights import RULES
from grpo_fused.ops import BACKENDS, LAUNCHERS

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("grpo_fused/**/*.py"), *ROOT.glob("kernels/*.py")])

# A file imports only from lines above its own, or from its own folder.
ORDER = [
    ["kernels"],
    ["bundles", "checks", "collectives"],
    ["sequences", "groups"],
    ["selections"],
    ["losses", "advantages", "corrections", "support"],
    ["ppo"],
    ["torch_backend"],
    ["head", "parallel"],
    ["ops"],
    ["agreement", "validation", "autograd"],
    ["arguments", "inputs", "options"],
    ["loss"],
    ["functional", "log_softmax"],
    ["testing"],
    ["__init__"],
    ["integrations"],
    ["trainer"],
    ["demo", "environment"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def name_of(path):
    if path.parent.name == "kernels":
        return "kernels"
    return path.relative_to(ROOT / "grpo_fused").with_suffix("").parts[0]


def imported_modules(path):
    """Modules of ours that a file imports, as names of ORDER."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if "TYPE_CHECKING" not in ast.dump(node)[:80]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "grpo_fused":
                known = len(parts) > 1 and parts[1] in LEVEL
                yield parts[1] if known else "__init__"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    if path.parent.name == "kernels":
        assert not list(imported_modules(path)), "kernels import nothing of the package"
        return
    for imported in imported_modules(path):
        assert LEVEL[imported] < LEVEL[name_of(path)] or imported == name_of(path)


def test_kernels_package_holds_one_docstring():
    """transformers imports any top-level `kernels`: this one must not get in its way."""
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0].value, ast.Constant)


def test_transformers_imports_from_the_checkout():
    code = "import transformers; from transformers import LlamaForCausalLM; import grpo_fused"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


# torch._dynamo takes two CPU seconds, in every process of a run; the others need an extra.
HEAVY = {"torch._dynamo", "torch.distributed.checkpoint", "accelerate", "datasets", "matplotlib"}
HEAVY |= {"pandas", "peft", "pyarrow", "pydantic", "scipy", "sympy", "tensorboard", "tqdm"}
HEAVY |= {"transformers", "trl", "verl", "yaml"}
IMPORTED = "import sys, torch; before = set(sys.modules); import {}; "
IMPORTED += "print(*set(sys.modules) - before)"


def test_an_import_from_a_checkout_says_what_to_do(tmp_path):
    """There `grpo_fused` lies apart from its kernels, and a plain install does not help."""
    (tmp_path / "grpo_fused").mkdir()
    shutil.copy(ROOT / "grpo_fused" / "__init__.py", tmp_path / "grpo_fused")
    hidden = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f)]"
    command = [sys.executable, "-c", f"{hidden}; import grpo_fused"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "ImportError: this grpo_fused lies in a checkout" in done.stderr
    assert "pip install -e ." in done.stderr


def test_importing_the_package_imports_nothing_heavy():
    """Whatever torch imports by itself is not ours to spare."""
    module = "grpo_fused, grpo_fused.cli, grpo_fused.testing"
    code = IMPORTED.format(module)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "grpo_fused" in done.stdout.split()
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.slow
def test_importing_the_package_takes_little_longer_than_torch():
    """Under 1.5 times as long: CPU seconds, the least of five, in turns."""
    code = "import time; import {}; print(time.process_time())"
    seconds = {"torch": [], "grpo_fused": []}
    for _ in range(5):
        for module, found in seconds.items():
            command = [sys.executable, "-c", code.format(module)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(float(done.stdout))
    assert min(seconds["grpo_fused"]) < 1.5 * min(seconds["torch"]), seconds


def test_files_are_of_one_subject():
    """Of 400 lines at most, read top to bottom."""
    long = {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            a = node.args
            yield node.name, [*a.posonlyargs, *a.args, *a.kwonlyargs]


PUBLIC = {name for name in grpo_fused.__all__ if inspect.isroutine(getattr(grpo_fused, name))}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_bundles_travel_whole(path):
    """No function but the public ones takes more than 12 parameters."""
    many = {name: len(args) for name, args in functions(path) if len(args) > 12}
    assert set(many) <= PUBLIC, many


@pytest.mark.parametrize("name", LAUNCHERS)
def test_both_backends_have_the_same_launchers(name):
    """With the parameters of their ops, so that autograd need not know which one it calls."""
    parameters, _ = LAUNCHERS[name]
    backends = [b for b in BACKENDS.values() if hasattr(b, name)]
    assert len(backends) == (1 if name == "token_weights" else 2)
    for backend in backends:
        found = list(inspect.signature(getattr(backend, name)).parameters)
        assert found[name.startswith("linear") :] == list(parameters)  # first, the backend's own


@pytest.mark.parametrize("name", ["grpo_loss", "linear_grpo_loss", "grpo_loss_from_logps"])
def test_signatures_show_every_keyword_with_its_default(name):
    function = getattr(functional, name)
    parameters = inspect.signature(function).parameters
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert parameters["beta"].default == 0.0 and parameters["loss_type"].default == "dapo"
    positional = [None for p in parameters.values() if p.default is p.empty][1:]
    for keyword in parameters:
        documented = keyword in function.__doc__ or keyword in functional.grpo_loss.__doc__
        assert documented, keyword
    with pytest.raises(
        TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'epsilon'"
    ):
        function(torch.zeros(1, 1), *positional, epsilon=0.1)


def losses_table():
    """The rows of LOSSES with all of their defaults, as docs/losses.md has them by objective."""
    lines = ["| `loss_type` | objective | level | average | paper |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, row in LOSSES.items():
        lines.append(
            f"| `{name}` | `{row.objective!r}` | {row.level} | {row.normalizer} "
            f"| [{row.paper}]({row.url}), {row.equation} |"
        )
    return "\n".join(lines)


def short_losses_table():
    """The README's table of losses, as it must stand there."""
    lines = ["| `loss_type` | objective | level | average | paper |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, row in LOSSES.items():
        objective, paper = type(row.objective).__name__, f"[{row.paper}]({row.url})"
        lines.append(f"| `{name}` | `{objective}` | {row.level} | {row.normalizer} | {paper} |")
    return "\n".join(lines)


def test_readme_table_is_the_table():
    assert f"\n\n{short_losses_table()}\n\n" in (ROOT / "README.md").read_text()


def sections(text):
    """{heading: body} of a Markdown file, up to the next heading of any level."""
    parts = re.split(r"^#+ (.*)\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


CORRECTIONS = {"grpo_fused.corrections", "grpo_fused.selections"}


def defined_in(name):
    return getattr(grpo_fused, name).__module__


def test_page_of_losses_is_true():
    """docs/losses.md has a section per objective, with the rows, defaults and links of LOSSES."""
    text = (ROOT / "docs" / "losses.md").read_text()
    found = sections(text)
    head, lines = losses_table().splitlines()[:2], losses_table().splitlines()[2:]
    tables = {}
    for (_, row), line in zip(LOSSES.items(), lines, strict=True):
        tables.setdefault(f"`{type(row.objective).__name__}`", []).append(line)
    assert {heading for heading in found if heading.startswith("`")} == set(tables)
    for heading, table in tables.items():
        assert "\n".join([*head, *table]) + "\n\n" in found[heading], heading
        assert "* Use: " in found[heading], heading
    for heading, names in {
        "Averages": RULES,
        "Levels": LEVELS,
        "KL penalty": {name.rstrip("+") for name in KL_ESTIMATORS},
        "The sampler's support": ["policy_over", "kl_over", "entropy_over"],
        "Masks and corrections": [name for name in PUBLIC if defined_in(name) in CORRECTIONS],
    }.items():
        _, body = found[heading].split("\n| --- ", 1)
        rows = re.findall(r"^\| `([\w-]+)` \|", body, re.M)
        assert sorted(rows) == sorted(names), heading


def test_no_text_has_the_marks_of_a_merge():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")):
        lines = path.read_text().splitlines()
        assert not [x for x in lines if x.startswith(("<<<<<<<", ">>>>>>>"))], path
