"""The house: who imports whom, what is in the wheel, and whether the README tells the truth."""

import ast
import inspect
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import grpo_fused
from grpo_fused import LOSSES, reference
from grpo_fused.kernels import launchers
from grpo_fused.kernels.library import SIGNATURES

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("grpo_fused/**/*.py"), *ROOT.glob("kernels/*.py")])

# What may import what: a file imports only from lines above its own.
ORDER = [
    ["kernels"],
    ["checks", "metrics", "objectives", "rows", "sequences"],
    ["advantages", "corrections", "divergences", "sequence_objectives", "weights"],
    ["losses", "ordering", "reference", "validation"],
    ["autograd"],
    ["coupled", "inputs", "linear_autograd"],
    ["linear_coupled"],
    ["sources"],
    ["family", "logprob"],
    ["from_logps", "linear", "loss"],
    ["testing", "causal_lm"],
    ["__init__"],
    ["integrations"],
    ["trainer"],
    ["demo"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def name_of(path):
    if path.parent.name == "kernels":
        return "kernels"
    return path.relative_to(ROOT / "grpo_fused").with_suffix("").parts[0]


def imported_modules(path):
    """Modules of ours that a file imports, as names of ORDER."""
    for node in ast.walk(ast.parse(path.read_text())):
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


def test_files_are_rooms_not_halls():
    long = {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 300}
    assert not long


def test_wheel(tmp_path):
    """`kernels` is inside the package, and only there."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for path in SOURCES:
        inside = path.relative_to(ROOT).as_posix()
        inside = f"grpo_fused/{inside}" if inside.startswith("kernels/") else inside
        assert inside in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"grpo_fused", f"grpo_fused-{grpo_fused.__version__}.dist-info"}


def test_both_implementations_have_the_same_launchers():
    """With the parameters of their ops, so that autograd need not know which it calls."""
    assert set(launchers.__all__) == set(SIGNATURES)
    for name, signature in SIGNATURES.items():
        wanted = [parameter.split()[-1] for parameter in signature.split(",")]
        for module in (launchers, reference):
            assert list(inspect.signature(getattr(module, name)).parameters) == wanted


def losses_table():
    """The README's table of losses, as it must stand there."""
    lines = ["| `loss_type` | objective | level | average | paper |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, row in LOSSES.items():
        lines.append(
            f"| `{name}` | `{row.objective!r}` | {row.level} | {row.normalizer} "
            f"| [{row.paper}]({row.url}), {row.equation} |"
        )
    return "\n".join(lines)


def test_readme_table_is_the_table():
    assert losses_table() in (ROOT / "README.md").read_text()


def test_readme_code_runs():
    """Every Python block that is marked to run does, one after the other."""
    blocks = re.findall(
        r"<!-- runs -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    assert blocks
    namespace = {}
    for block in blocks:
        exec(block, namespace)
