"""Completions of one length after another, as in training, and how often providers compile again.

    pytest benchmarks/bench_lengths.py --lines runs/lengths.jsonl

Every provider gets every length once, after a first one for which it may compile. Reported are its
time and how many Triton kernels and graphs of `torch.compile` it compiled afterwards; for ours that
must be 0.
"""

import functools
import time

import pytest
import torch

from benchmarks import measure
from benchmarks.bench_logits import (
    GRADIENT_ERROR,
    functions_of,
    gradient_errors,
    leaf_for,
    make_batch,
)
from benchmarks.cases import Case
from benchmarks.record import attempt

CPU_LENGTHS, CPU_V = (16, 17, 24, 31, 40), 8_000
CUDA_LENGTHS, CUDA_V = (512, 513, 700, 777, 1000, 1024), 151_936
SEQUENCES = 4


def meet(function, name, batches, device):
    """(seconds, number of compilations) for all but the first of the batches."""

    def step(batch):
        function(leaf_for(name, batch.logits), *batch[1:]).backward()
        if device != "cpu":
            torch.cuda.synchronize()

    step(batches[0])
    with measure.Compilations() as compilations:
        start = time.perf_counter()
        for batch in batches[1:]:
            step(batch)
        return time.perf_counter() - start, compilations.count


def bench(benchmark, device, V, lengths, dtype):
    case = Case("varying lengths", (lengths[0],) * SEQUENCES, V, dtype)
    make = functools.partial(make_batch, V=V, dtype=dtype, device=device)
    errors = gradient_errors(case, make(case.lengths, seed=1))
    assert errors["fused"] < GRADIENT_ERROR[dtype], errors
    batches = [make((T,) * SEQUENCES, seed=T) for T in lengths]
    figures = {}
    for name, function in functions_of(case).items():
        found, reason = (None, errors[name]) if isinstance(errors[name], str) else (None, None)
        if reason is None:
            found, reason = attempt(lambda n=name, f=function: meet(f, n, batches, device))
        if reason is None:
            figures[name] = {"ms": 1e3 * found[0], "compiled": found[1], "error": errors[name]}
        else:
            figures[name] = reason
    assert figures["fused"]["compiled"] == 0, figures["fused"]
    ours = functions_of(case)["fused"]
    benchmark.pedantic(lambda: meet(ours, "fused", batches, device), rounds=3)
    benchmark.extra_info |= measure.environment(device) | {
        **{"case": case.title, "lengths": lengths, "providers": figures},
        "shape": [SEQUENCES, max(lengths), V],
    }


def bench_lengths_cpu(benchmark):
    bench(benchmark, "cpu", CPU_V, CPU_LENGTHS, "float32")


@pytest.mark.cuda
def bench_lengths_cuda(benchmark):
    bench(benchmark, "cuda", CUDA_V, CUDA_LENGTHS, "bfloat16")
