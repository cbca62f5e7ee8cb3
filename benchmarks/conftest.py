"""Skips benchmarks that need a GPU, compiles anew for each, and writes results as they come."""

import platform
from pathlib import Path

import pytest
import torch

from benchmarks import lines, providers


def pytest_addoption(parser):
    parser.addoption("--lines", type=Path, help="append every result to this file")


def pytest_sessionstart(session):
    file = session.config.getoption("--lines")
    if file is not None and not file.exists():
        import cpuinfo  # of pytest-benchmark

        cpu = {"brand_raw": cpuinfo.get_cpu_info()["brand_raw"], "count": torch.get_num_threads()}
        machine = {"system": platform.system(), "machine": platform.machine(), "cpu": cpu}
        lines.append(
            file, {"machine_info": machine | {"python_version": platform.python_version()}}
        )


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Graphs of other cases count towards the limit after which a function is not compiled."""
    with providers.fresh_compiler():
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    outcome = yield
    file, benchmark = item.config.getoption("--lines"), item.funcargs.get("benchmark")
    if file is not None and benchmark is not None and outcome.excinfo is None:
        lines.append(file, {"fullname": item.nodeid, "extra_info": benchmark.extra_info})
