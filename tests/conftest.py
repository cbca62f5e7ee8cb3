"""One suite for both kinds of machine: kernels run on the GPU, or in Triton's interpreter."""

import gc
import importlib.util
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# transformers imports a top-level `kernels` if it finds one; the folder of that name is not it.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
# So the suite of benchmarks, which no wheel has, is found by its own path.
spec = importlib.util.spec_from_file_location("benchmarks", ROOT / "benchmarks" / "__init__.py")
sys.modules.setdefault("benchmarks", importlib.util.module_from_spec(spec))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

import grpo_fused.arguments  # noqa: E402
import grpo_fused.autograd.common  # noqa: E402
import grpo_fused.autograd.head  # noqa: E402
import grpo_fused.autograd.logits  # noqa: E402
import grpo_fused.head.chunks  # noqa: E402
import grpo_fused.kernels.reduce  # noqa: E402
import grpo_fused.kernels.token_weights  # noqa: E402
import grpo_fused.torch_backend.rows  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.speed_up()
    # The interpreter calls a reduction's function once an element.
    grpo_fused.kernels.reduce.BLOCK = 32
    grpo_fused.kernels.token_weights.BLOCK = 32

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores: threads of threads only wait for each other

# Modules that allocate outputs and intermediate results.
POISONED = (
    *(grpo_fused.arguments, grpo_fused.autograd.common, grpo_fused.autograd.head),
    *(grpo_fused.autograd.logits, grpo_fused.head.chunks, grpo_fused.torch_backend.rows),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Rows of LOSSES that launch the same kernels as another one, or with another objective, which
# test_objectives compares. That one represents them in Triton's slow interpreter wherever a test
# has both: kernels know weights, not normalisers.
REPRESENTS = {
    "grpo": ("bnpo", "ppo", "dr_grpo", "dapo"),
    "gspo": ("gspo_token", "luspo", "vespo", "gmpo", "topr", "fipo", "clip_cov", "kl_cov", "m2po"),
    "gpg": ("cross_entropy", "importance_sampling", "reinforce", "dro"),
    "ipo": ("rollout_is",),
    "dppo_tv": ("dppo_kl",),
}
REPRESENTED_BY = {name: by for by, names in REPRESENTS.items() for name in names}


# Files with tests of more than 10 s.
LONG = ("test_ranks", "test_trainer_ranks", "test_launch_path", "test_demo", "test_aot")
LONG += ("test_trl_trainer", "test_examples", "test_machine_code", "test_compile", "test_structure")


def is_represented(item, nodeids):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    loss_type = params.get("loss_type")
    if params.get("implementation") != "triton" or loss_type not in REPRESENTED_BY:
        return False
    test, _, ids = item.nodeid.partition("[")
    names = [REPRESENTED_BY[loss_type] if x == loss_type else x for x in ids[:-1].split("-")]
    return f"{test}[{'-'.join(names)}]" in nodeids


# A machine for the kernels alone may lack these: a module of tests that imports one is skipped.
OPTIONAL = {"accelerate", "datasets", "hypothesis", "liger_kernel", "matplotlib", "peft", "trl"}
OPTIONAL |= {"transformers", "verl", "yaml"}


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    outcome = yield
    report = outcome.get_result()
    found = re.findall(r"ModuleNotFoundError: No module named '(\w+)'", str(report.longrepr))
    if report.failed and found and found[-1] in OPTIONAL:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {found[-1]} is not installed")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if DEVICE == "cuda":
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))
    nodeids = {item.nodeid for item in items}
    represented = [item for item in items if is_represented(item, nodeids)]
    config.hook.pytest_deselected(items=represented)
    items[:] = [item for item in items if not is_represented(item, nodeids)]
    items.sort(key=lambda item: item.path.stem not in LONG)  # or one worker waits for another's


@pytest.fixture(scope="session", autouse=True)
def frozen_imports():
    """Exempt imported modules from garbage collection, which trainers trigger after each run."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=["triton", "torch"])
def implementation(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    """torch seeds itself at random: a draw in 30 cancelled to a loss of nearly 0 and failed."""
    torch.manual_seed(0)


def poisoned(memory):
    return memory if torch.compiler.is_compiling() else memory.fill_(torch.nan)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty is NaN in the package: an output that nobody writes cannot pass for one."""

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def empty(*args, **kwargs):
            return poisoned(torch.empty(*args, **kwargs))

        @staticmethod
        def empty_like(*args, **kwargs):
            return poisoned(torch.empty_like(*args, **kwargs))

        @staticmethod
        def empty_strided(*args, **kwargs):
            return poisoned(torch.empty_strided(*args, **kwargs))

    for module in POISONED:
        monkeypatch.setattr(module, "torch", Torch())
