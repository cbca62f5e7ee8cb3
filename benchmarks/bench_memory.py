"""How time and peak memory grow with the number of tokens, and with the vocabulary.

    pytest benchmarks/bench_memory.py --lines runs/cpu.jsonl

Four sizes an axis; `benchmarks.report` fits the slopes. A sequence is as long as the batch is wide,
every token is active.
"""

import pytest

from benchmarks.bench_linear import time_losses

PROVIDERS = ("fused", "eager", "compiled", "trl", "liger_linear")
SEQUENCES = 4
CPU = {"H": 128, "V": 32_000, "rows": 256}
CPU_SIZES = {"rows": (128, 256, 512, 1024), "V": (8_000, 16_000, 32_000, 64_000)}
CUDA = {"H": 2048, "V": 151_936, "rows": 8192}
CUDA_SIZES = {
    "rows": (2048, 4096, 8192, 16_384, 32_768),
    "V": (32_000, 65_536, 128_256, 151_936, 262_144),
}


def sizes_of(by_axis):
    return [(axis, size) for axis, sizes in by_axis.items() for size in sizes]


def grow(benchmark, device, dtype, sizes, axis, size):
    """Loss and gradients of hidden states and head, with one of the sizes changed."""
    sizes = sizes | {axis: size}
    lengths = (sizes["rows"] // SEQUENCES,) * SEQUENCES
    case, shape = f"growth with {axis}, {dtype}", (lengths, sizes["H"], sizes["V"])
    time_losses(benchmark, case, shape, dtype, device, PROVIDERS)
    benchmark.extra_info |= {"axis": axis, "size": size}


@pytest.mark.parametrize(("axis", "size"), sizes_of(CPU_SIZES))
def bench_growth_cpu(benchmark, axis, size):
    grow(benchmark, "cpu", "float32", CPU, axis, size)


@pytest.mark.cuda
@pytest.mark.parametrize(("axis", "size"), sizes_of(CUDA_SIZES))
def bench_growth_cuda(benchmark, axis, size):
    grow(benchmark, "cuda", "bfloat16", CUDA, axis, size)
