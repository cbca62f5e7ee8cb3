"""examples/ run as a user starts them; pages lead to what exists."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from adapters import BLOCKS
from pages import PAGES, ROOT

TEXT = "".join(path.read_text() for path in PAGES)


def example(name, *arguments):
    """What a script prints."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT / "examples",
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_example_of_a_hand_written_loop():
    first, last = re.findall(r"\d\.\d\d", example("hand_written_loop"))
    assert float(first) < 0.3 and float(last) > 0.7


@pytest.mark.slow
def test_example_for_trl():
    pytest.importorskip("trl", reason="trl is not installed: make test installs it")
    first, last = re.findall(r"\d\.\d\d", example("trl_grpo").splitlines()[-1])
    assert float(first) < 0.65 and float(last) > 0.85


@pytest.mark.slow
def test_example_for_verl():
    pytest.importorskip("verl", reason="verl 0.9.1 is installed by `make` for Python below 3.13")
    theirs, ours = (line.split(": ")[1] for line in example("verl_policy_loss").splitlines()[-2:])
    numbers = [[float(x) for x in re.findall(r"-?\d+\.\d+", line)] for line in (theirs, ours)]
    assert len(numbers[0]) == 5
    assert numbers[1] == pytest.approx(numbers[0], abs=2e-6)


@pytest.mark.slow
def test_example_of_a_reward_model_that_goes_stale(tmp_path):
    picture = tmp_path / "picture.png"
    lines = example("stale_reward_model", tmp_path / "runs", picture, "--steps", "90").splitlines()
    numbers = [re.findall(r"-?\d+\.\d\d", line) for line in lines if " -> " in line]
    (score, accuracy), (_, retrained) = (
        [(float(a), float(b)) for a, b in part] for part in (numbers[:2], numbers[2:])
    )
    assert score[1] > score[0] + 0.2 and accuracy[1] < accuracy[0] - 0.1
    assert retrained[1] > accuracy[1] + 0.15
    assert picture.stat().st_size > 10_000


def test_every_adapter_has_its_test():
    labels = {"verl", "slime", "nemo_rl", "prime_rl", "openrlhf", "loop"}
    assert {label for label, _ in BLOCKS} == labels


def test_pages_lead_to_what_exists():
    """Every example is mentioned, every module of verl's is there."""
    makefile = (ROOT / "Makefile").read_text()
    for script in (ROOT / "examples").glob("*.py"):
        assert f"examples/{script.name}" in TEXT + makefile, script.name
    if importlib.util.find_spec("verl"):
        for module in re.findall(r"grpo_fused\.integrations\.verl\w*", TEXT):
            assert importlib.util.find_spec(module), module
