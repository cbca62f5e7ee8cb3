"""What a stranger's change may do, what a release is, and which versions are tested."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # of pytest's dependencies
    import tomli as tomllib

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
if not (ROOT / ".github").exists():
    pytest.skip("a source archive has no workflows", allow_module_level=True)
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
spec = importlib.util.spec_from_file_location("release", ROOT / ".github" / "release.py")
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)


def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_to_commits(path):
    """A tag can be moved to other code by whoever takes an action over."""
    used = re.findall(r"uses: *(.+)", path.read_text())
    assert used
    for line in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_read_and_no_more(path):
    content = yaml.safe_load(path.read_text())
    assert content["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in content[True]  # YAML reads the key `on` as true
    for name, job in content["jobs"].items():
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False, name
            # What others choose, such as the name of a branch, would be run as code.
            assert "${{" not in step.get("run", ""), (name, step)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_pull_request_runs_on_a_machine_of_ours(path):
    for name, job in yaml.safe_load(path.read_text())["jobs"].items():
        runner = str(job["runs-on"])
        systems = job.get("strategy", {}).get("matrix", {}).get("system", [])
        if runner == "${{ matrix.system }}":
            hosted = all(system.endswith("-latest") for system in systems)
        else:
            hosted = runner.endswith("-latest")
        assert hosted or "github.event_name != 'pull_request'" in job["if"], name


def test_checkout_leaves_the_environment_of_the_gpu_machine():
    steps = workflow("ci")["jobs"]["cuda"]["steps"]
    assert steps[0]["with"]["clean"] is False
    assert steps[1]["run"] == "git clean -fdx --exclude=.venv"


def test_only_the_publishing_job_may_ask_for_a_token():
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            given = job.get("permissions", {})
            if path.stem == "release":
                want = {"publish": {"id-token": "write"}, "announce": {"contents": "write"}}
                assert given == want.get(name, {}), name
            elif path.stem != "docs":  # which writes the pages
                assert not given, name


def test_matrix_is_what_the_metadata_says():
    rows = workflow("ci")["jobs"]["test"]["strategy"]["matrix"]["include"]
    prefix = "Programming Language :: Python :: 3."
    stated = [x.rpartition(" ")[2] for x in PROJECT["classifiers"] if x.startswith(prefix)]
    assert [row["python"] for row in rows] == stated
    assert PROJECT["requires-python"] == f">={stated[0]}"
    oldest = {
        name: re.search(rf"^{name}>=([\d.]+)", line).group(1)
        for name in ("torch", "triton")
        for line in PROJECT["dependencies"]
        if line.startswith(name)
    }
    assert {name: f"{oldest[name]}.0" for name in oldest} == {
        name: rows[0][name] for name in oldest
    }


def test_local_checks_exist():
    script = (ROOT / ".github" / "checks.sh").read_text()
    known = set(re.findall(r"^(\w+)\(\)", script, re.M))
    default = re.search(r"^CHECKS \?= (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1)
    assert set(default.split()) == known
    for path in WORKFLOWS:
        for checks in re.findall(r'CHECKS="(.*?)"', path.read_text()):
            assert set(checks.split()) <= known


def test_hooks_change_no_committed_file():
    """The fixer of ends of files ends every file that it is given with one line break."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    left_out = re.compile(hooks["end-of-file-fixer"]["exclude"])
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("git does not know this folder: it is no checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if content and b"\0" not in content and not left_out.search(name):
            assert content.endswith(b"\n") and not content.endswith(b"\n\n"), name
    ruff = next(repo["rev"] for repo in config["repos"] if "ruff" in repo["repo"])
    pins = PROJECT["optional-dependencies"]["lint"]
    assert f"ruff=={ruff.removeprefix('v')}" in pins


README = """# x
[![a badge](https://img.shields.io/x)](docs/a.md) [![ours](docs/b.png)](docs/c.md#part)
[CONTRIBUTING](CONTRIBUTING.md), [paper](https://arxiv.org/abs/1), [below](#use)
![plot](docs/plot.png)
"""
ABSOLUTE = """# x
[![a badge](https://img.shields.io/x)](https://github.com/o/n/blob/v1/docs/a.md) \
[![ours](https://raw.githubusercontent.com/o/n/v1/docs/b.png)]\
(https://github.com/o/n/blob/v1/docs/c.md#part)
[CONTRIBUTING](https://github.com/o/n/blob/v1/CONTRIBUTING.md), [paper](https://arxiv.org/abs/1), \
[below](#use)
![plot](https://raw.githubusercontent.com/o/n/v1/docs/plot.png)
"""


def test_links_of_a_release():
    assert release.absolute_links(README, "o/n", "v1") == ABSOLUTE
    ours = release.absolute_links((ROOT / "README.md").read_text(), "o/n", "v1")
    assert not re.findall(r"\]\((?!https?:|#)", ours)


def checkout(folder, changelog="## [0.2.0] - 2026-01-02\n### Added\n- x\n\n## [0.1.0]\nold\n"):
    (folder / "grpo_fused").mkdir(parents=True)
    (folder / "grpo_fused" / "__init__.py").write_text('import torch\n__version__ = "0.2.0"\n')
    (folder / "CHANGELOG.md").write_text(changelog)
    (folder / "README.md").write_text("[x](docs/x.md)\n")
    (folder / "pyproject.toml").write_text('[project]\nname = "x"\n\n[tool.x]\ny = 1\n')
    return folder


def test_release_is_prepared(tmp_path):
    root = checkout(tmp_path / "checkout")
    assert release.prepare(root, "Owner/name", "v0.2.0") == "### Added\n- x"
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["project"]["name"] == "x" and project["tool"] == {"x": {"y": 1}}
    assert project["project"]["urls"]["Source"] == "https://github.com/Owner/name"
    assert "/Owner/name/blob/v0.2.0/docs/x.md" in (root / "README.md").read_text()
    with pytest.raises(ValueError, match=r"\[project.urls\]"):
        release.prepare(root, "Owner/name", "v0.2.0")


@pytest.mark.parametrize(
    ("tag", "changelog", "message"),
    [
        ("v0.3.0", "## [0.2.0] - 2026-01-02\nx\n", r"tag must be v0\.2\.0"),
        ("0.2.0", "## [0.2.0] - 2026-01-02\nx\n", r"tag must be v0\.2\.0"),
        ("v0.2.0", "## [0.2.0] - unreleased\nx\n", "must have a date"),
        ("v0.2.0", "## [0.2.0] - 2026-01-02\n\n## [0.1.0]\nx\n", "must say what"),
        ("v0.2.0", "## [Unreleased]\nx\n", r"must have a section \[0\.2\.0\]"),
    ],
)
def test_releases_that_are_refused(tmp_path, tag, changelog, message):
    root = checkout(tmp_path / "checkout", changelog)
    before = {path: path.read_text() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        release.prepare(root, "o/n", tag)
    assert before == {path: path.read_text() for path in root.rglob("*") if path.is_file()}


def test_this_checkout_can_be_released():
    """But for the date."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    version = release.read_version(ROOT)
    dated = changelog.replace(f"[{version}] - unreleased", f"[{version}] - 2026-01-02")
    assert release.section(dated, version)
    assert "github.com" in release.with_urls((ROOT / "pyproject.toml").read_text(), "o/n")
