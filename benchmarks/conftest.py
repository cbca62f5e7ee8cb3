"""Skips benchmarks that need a GPU, and reduces pytest-benchmark's JSON to what is committed."""

import pytest
import torch


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")


def pytest_benchmark_update_json(output_json):
    """Drop the raw rounds, and all fields with names of the host, its user or a path."""
    machine, commit = output_json["machine_info"], output_json["commit_info"]
    output_json["machine_info"] = {
        **{key: machine[key] for key in ("system", "machine", "python_version")},
        "cpu": {key: machine["cpu"].get(key) for key in ("brand_raw", "count")},
    }
    output_json["commit_info"] = {key: commit.get(key) for key in ("id", "dirty", "time")}
    for benchmark in output_json["benchmarks"]:
        del benchmark["stats"]["data"], benchmark["options"]
