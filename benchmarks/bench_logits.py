"""The loss and the log-probabilities over given logits, against eager PyTorch and torch.compile.

    pytest benchmarks --benchmark-json benchmarks/results/cpu.json

Every case is held to float64 on fresh data before it is timed.
"""

import functools

import pytest
import torch

from benchmarks import measure, providers
from benchmarks import record as recording

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GRADIENT_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}  # a bfloat16 gradient is rounded once: 2e-3
LOGPS_ERROR = 1e-5  # results are float32 whatever the logits
CPU_LENGTHS = (256, 128, 64, 32)
CPU_V = 32_000
CUDA_LENGTHS = (1024,) * 8
CUDA_V = (32_000, 128_256, 151_936, 262_144)


def make_batch(lengths, V, dtype, device, seed):
    """(logits, ids, mask, advantages, old_logps); the policy has moved by a tenth of a nat."""
    generator = torch.Generator(device).manual_seed(seed)
    B, T = len(lengths), max(lengths)
    options = {"generator": generator, "device": device}
    logits = torch.randn(B, T, V, dtype=DTYPES[dtype], **options).mul_(2)
    ids = torch.randint(V, (B, T), **options)
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long().to(device)
    advantages = torch.randn(B, **options)
    old_logps = providers.exact_logps(logits, ids)[0].float() + 0.1 * torch.randn(B, T, **options)
    return logits, ids, mask, advantages, old_logps


def gradient_error(provider, batch):
    """Relative norm error of the provider's gradient; the logits may be spent afterwards."""
    source = batch[0].clone()
    logits = batch[0].requires_grad_()
    provider(logits, *batch[1:]).backward()
    return measure.relative_error(logits.grad, providers.exact_gradients(source, *batch[1:]))


def logps_error(provider, batch, entropy):
    """The larger of the errors of the log-probabilities and of the entropies, where active."""
    logits, ids, mask = batch[:3]
    got, want = provider(logits, ids, mask, entropy), providers.exact_logps(logits, ids)
    active = mask != 0
    pairs = [(g, w) for g, w in zip(got, want, strict=True) if g is not None]
    return max(measure.relative_error([g[active]], [w[active]]) for g, w in pairs)


def loss_steps(make, losses, device):
    """(batch, steps, prepare) of losses and gradients over a leaf."""
    batch = make(seed=0)
    logits = batch[0].requires_grad_()
    source = logits.detach().clone() if device != "cpu" else None

    def prepare():
        logits.grad = None
        if source is not None:  # a step in place has written over them
            logits.detach().copy_(source)

    return batch, {n: lambda f=f: f(*batch).backward() for n, f in losses.items()}, prepare


def logps_steps(make, functions, entropy):
    """(batch, steps, prepare) of log-probabilities without a gradient."""
    batch = make(seed=0)
    run = torch.no_grad()(lambda function: function(*batch[:3], entropy))
    return batch, {n: functools.partial(run, f) for n, f in functions.items()}, lambda: None


def record(benchmark, case, device, build, *, writes):
    """Measure the steps, with the bytes that a perfect one would move and the time that takes."""

    def floors(batch):
        return {} if device == "cpu" else measure.floors(batch[0])

    batch, seconds = recording.record(benchmark, case, device, build, floors)
    logits, mask = batch[0], batch[2]
    active, ours = mask.count_nonzero().item(), seconds[next(iter(seconds))]
    traffic = logits.nbytes * (active / mask.numel() + writes)
    info = {"shape": list(logits.shape), "active_rows": active}
    info |= {"bytes": round(traffic), "GB/s": traffic / ours / 1e9}
    if device != "cpu":
        info |= {
            "device_ms": 1e3 * ours,
            "read GB/s": logits.nbytes / seconds["read"] / 1e9,
            "copy GB/s": 2 * logits.nbytes / seconds["copy"] / 1e9,
            "time_over_floor": ours / seconds["copy" if writes else "read"],
        }
    benchmark.extra_info.update(info)


def time_losses(benchmark, case, lengths, V, dtype, device, losses):
    """Loss and gradient: one read of the active rows, one write of all."""
    make = functools.partial(make_batch, lengths, V, dtype, device)
    assert gradient_error(next(iter(losses.values())), make(seed=1)) < GRADIENT_ERROR[dtype]
    build = functools.partial(loss_steps, make, losses, device)
    record(benchmark, case, device, build, writes=1)


def time_logps(benchmark, case, lengths, V, dtype, device, entropy):
    """Log-probabilities: one read of the active rows."""
    make = functools.partial(make_batch, lengths, V, dtype, device)
    assert logps_error(providers.fused_logps, make(seed=1), entropy) < LOGPS_ERROR
    functions = {"fused": providers.fused_logps, "eager": providers.eager_logps}
    build = functools.partial(logps_steps, make, functions, entropy)
    record(benchmark, case, device, build, writes=0)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_loss_cpu(benchmark, dtype):
    losses = {"fused": providers.fused, "eager": providers.eager}
    case = f"loss and gradient, {dtype}"
    time_losses(benchmark, case, CPU_LENGTHS, CPU_V, dtype, "cpu", losses)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_logps_cpu(benchmark, dtype):
    case = f"log-probabilities and entropies, {dtype}"
    time_logps(benchmark, case, CPU_LENGTHS, CPU_V, dtype, "cpu", entropy=True)


@pytest.mark.cuda
@pytest.mark.parametrize("V", CUDA_V)
@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "fresh"])
def bench_loss_cuda(benchmark, inplace, V):
    need_memory(V)
    name = "fused_inplace" if inplace else "fused"
    case = f"loss and gradient{' in place' if inplace else ''}, bfloat16"
    losses = {n: getattr(providers, n) for n in (name, "eager", "compiled")}
    time_losses(benchmark, case, CUDA_LENGTHS, V, "bfloat16", "cuda", losses)


@pytest.mark.cuda
@pytest.mark.parametrize("V", CUDA_V)
@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "entropy"])
def bench_logps_cuda(benchmark, entropy, V):
    need_memory(V)
    case = f"log-probabilities{' and entropies' if entropy else ''}, bfloat16"
    time_logps(benchmark, case, CUDA_LENGTHS, V, "bfloat16", "cuda", entropy)


def need_memory(V):
    """Skip where ours alone, its floors and the float64 truth do not fit."""
    torch.cuda.empty_cache()
    needed = 8 * 2 * sum(CUDA_LENGTHS) * V
    if torch.cuda.get_device_properties().total_memory < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of device memory")
