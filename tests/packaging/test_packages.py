"""What the source archive and the wheel hold, and what works from a wheel without Triton."""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import grpo_fused

ROOT = Path(__file__).parents[2]
VERSION = grpo_fused.__version__
SOURCES = sorted([*ROOT.glob("grpo_fused/**/*.py"), *ROOT.glob("kernels/*.py")])
# Committed, but of no use in an archive.
LEFT_OUT = (".ci/", ".github/", ".gitignore")
# What setuptools adds.
ADDED = {"PKG-INFO", "setup.cfg"} | {
    f"grpo_fused.egg-info/{name}.txt"
    for name in ("SOURCES", "dependency_links", "entry_points", "requires", "top_level")
}
ADDED |= {"grpo_fused.egg-info/PKG-INFO"}
# What a checkout in use holds besides, none of which may get into an archive.
LITTER = [".venv/x.py", "runs/demo/metrics.jsonl", "build/lib/x.py", ".hypothesis/x", "site/x.html"]
LITTER += [f"{folder}/__pycache__/x.cpython-311.pyc" for folder in ("tests", "kernels")]


def committed():
    """Paths of a checkout's committed files; of an archive's, all of them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git does not know this folder: it is no checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def call(*command, **options):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source archive of a checkout that is in use."""
    tmp = tmp_path_factory.mktemp("packages")
    checkout, out = tmp / "checkout", tmp / "dist"
    for name in committed():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    for name in LITTER:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("litter")
    (checkout / "grpo_fused" / "kernels").symlink_to("../kernels")  # of benchmarks/on_gpu.sh
    out.mkdir()
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    call("-c", build, cwd=checkout)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(archive):
    """The wheel, built from the archive: as `python -m build` does, and whoever has no wheel."""
    folder = archive.parent / "wheel"
    call("-m", "pip", "wheel", "--no-deps", "-q", "-w", folder, archive)
    (path,) = folder.iterdir()
    return path


def test_archive_holds_what_is_committed(archive):
    with tarfile.open(archive) as opened:
        files = [member.name for member in opened.getmembers() if member.isfile()]
    top = f"grpo_fused-{VERSION}/"
    assert all(name.startswith(top) for name in files)
    want = {name for name in committed() if not name.startswith(LEFT_OUT)}
    assert {name.removeprefix(top) for name in files} == want | ADDED


def test_archive_has_the_modules_that_its_tests_import(archive):
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
        texts = {
            name.partition("/")[2]: opened.extractfile(name).read().decode()
            for name in opened.getnames()
            if "/tests/" in name and name.endswith(".py")
        }
    helpers = {path.stem for path in (ROOT / "tests" / "helpers").glob("*.py")}
    used = set()
    for text in texts.values():
        used |= set(re.findall(r"^ *(?:from|import) (\w+)", text, re.M)) & helpers
    assert len(used) > 10
    assert {f"tests/helpers/{name}.py" for name in used} <= names


def test_wheel_holds_the_package_and_nothing_else(wheel):
    """`kernels` is inside the package, and only there."""
    info = f"grpo_fused-{VERSION}.dist-info"
    want = {"grpo_fused/py.typed"}
    for path in SOURCES:
        inside = path.relative_to(ROOT).as_posix()
        want.add(f"grpo_fused/{inside}" if inside.startswith("kernels/") else inside)
    want = {name.replace("grpo_fused/grpo_fused/", "grpo_fused/") for name in want}
    for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"):
        want.add(f"{info}/{name}")
    want.add(f"{info}/licenses/LICENSE")
    assert set(zipfile.ZipFile(wheel).namelist()) == want


def test_metadata_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as opened:
        text = opened.read(f"grpo_fused-{VERSION}.dist-info/METADATA").decode()
    found = email.message_from_string(text)
    assert found["Version"] == VERSION
    assert found["Author"] == "The grpo-fused maintainers"
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in found.get_all("Classifier")
    required = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    names = {re.match(r"[\w-]+", line).group() for line in required}
    assert names == {"torch", "triton", "typing-extensions"}
    (triton,) = [line for line in required if line.startswith("triton")]
    assert 'platform_system == "Linux"' in triton


def test_version_stands_in_one_place():
    """Everything else takes it from there."""
    found = [
        name
        for name in committed()
        if name.endswith((".py", ".toml", ".cfg", ".yaml", ".yml"))
        and not name.startswith("tests/")
        and re.search(rf"""version[\W_]+{re.escape(VERSION)}""", (ROOT / name).read_text(), re.I)
    ]
    assert found == ["grpo_fused/__init__.py"]
    for cited in re.findall(r"^ *version = \{(.*?)\}", (ROOT / "README.md").read_text(), re.M):
        assert cited == VERSION, "the README's citation"


def test_changelog_has_this_version_first():
    headings = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    versions = [name for name, _ in headings if name != "Unreleased"]
    assert versions[0] == VERSION and headings[0][0] in ("Unreleased", VERSION)


WITHOUT_TRITON = """
import importlib, pkgutil, sys
sys.modules["triton"] = None  # as where it is not installed: neither found nor imported
import torch
import grpo_fused
from grpo_fused import environment

assert grpo_fused.__file__.startswith(sys.argv[1]), grpo_fused.__file__
torch.manual_seed(0)
logits = torch.randn(2, 3, 11)
ids, mask, advantages = torch.randint(11, (2, 3)), torch.ones(2, 3), torch.tensor([1.0, -1.0])
hidden, head = torch.randn(2, 3, 4), torch.randn(11, 4)
inputs = {"old_logps": torch.randn(2, 3), "ref_logps": torch.randn(2, 3)}
inputs["sampling_logps"] = torch.randn(2, 3)
for name in grpo_fused.LOSSES:
    for function, given in (("grpo_loss", (logits,)), ("linear_grpo_loss", (hidden, head))):
        given = [x.clone().requires_grad_() for x in given]
        out = getattr(grpo_fused, function)(
            *given, ids, mask, advantages, loss_type=name, beta=0.1, **inputs
        )
        out.loss.backward()
        assert all(x.grad.isfinite().all() for x in given), name
logps, entropies = grpo_fused.selective_log_softmax(logits, ids, mask, compute_entropy=True)
assert torch.allclose(logps, logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0], atol=1e-5)
for module in pkgutil.walk_packages(grpo_fused.__path__, "grpo_fused."):
    if not module.name.startswith(("grpo_fused.kernels.", "grpo_fused.integrations.")):
        importlib.import_module(module.name)
try:
    grpo_fused.grpo_loss(logits, ids, mask, advantages, implementation="triton")
except ValueError as error:
    print(error)
print(environment.report())
"""


def test_wheel_works_without_triton_and_says_what(wheel, tmp_path):
    """macOS and Windows: every loss and the trainer, in plain torch."""
    site = tmp_path / "site"
    call("-m", "pip", "install", "--no-deps", "-q", "--target", site, wheel)
    run = f"import sys; sys.path.insert(0, sys.argv[1])\n{WITHOUT_TRITON}"
    printed = call("-c", run, site, cwd=tmp_path)
    assert 'implementation="triton" requires Triton, which is not installed' in printed
    assert '"auto" and "torch" run every function in plain torch' in printed
    assert "Triton: not installed; all functions and the trainer run in plain torch" in printed
