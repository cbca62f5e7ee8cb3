"""The loss and the log-probabilities with the LM head inside, against eager, TRL's and Liger's.

    pytest benchmarks/bench_linear.py --benchmark-json benchmarks/results/cpu-linear.json

Every case is held to float64 on fresh data before it is timed. So are the others: their errors
stand beside their figures.
"""

import functools

import pytest
import torch

from benchmarks import linear_providers, measure
from benchmarks.bench_logits import CPU_LENGTHS, CPU_V, DTYPES, GRADIENT_ERROR, LOGPS_ERROR
from benchmarks.record import attempt, record

CPU_SHAPE = (CPU_LENGTHS, 256, CPU_V)
LOSSES = ("fused", "eager", "trl", "trl_active", "liger")
LOGPS = ("fused", "eager", "trl", "trl_active")
CUDA_T = 1024
CUDA_SHAPES = ((8192, 4096, 128_256), (8192, 4096, 151_936))
CUDA_SHAPES += ((8192, 2048, 151_936), (4096, 1536, 151_936))


def make_batch(lengths, H, V, dtype, device, seed):
    """(hidden, weight, ids, mask, advantages, old_logps), of logits as in `bench_logits`."""
    generator = torch.Generator(device).manual_seed(seed)
    B, T = len(lengths), max(lengths)
    options = {"generator": generator, "device": device}
    hidden = torch.randn(B, T, H, dtype=DTYPES[dtype], **options)
    weight = torch.randn(V, H, dtype=DTYPES[dtype], **options).mul_(2 / H**0.5)
    ids = torch.randint(V, (B, T), **options)
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long().to(device)
    advantages = torch.randn(B, **options)
    logps = linear_providers.exact_logps(hidden, weight, ids)[0].float()
    return hidden, weight, ids, mask, advantages, logps + 0.1 * torch.randn(B, T, **options)


def errors_of(functions, error):
    """{name: error of a function, or why there is none}; the first, ours, is not excused."""
    ours = next(iter(functions))
    found = {ours: error(functions[ours])}
    for name, function in list(functions.items())[1:]:
        value, reason = attempt(lambda f=function: error(f))
        found[name] = value if reason is None else reason
    return found


def gradient_errors(losses, batch, exact):
    """Relative norm errors of each loss's gradients, of hidden or of weight: the larger."""
    hidden, weight, *tokens = batch
    want = exact(*batch)

    def error(loss):
        leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
        loss(*leaves, *tokens).backward()
        pairs = zip(leaves, want, strict=True)
        return max(measure.relative_error([leaf.grad], [w]) for leaf, w in pairs)

    return errors_of(losses, error)


def logps_errors(functions, batch):
    """Relative norm errors of log-probabilities or entropies where active: the larger."""
    hidden, weight, ids, mask = batch[:4]
    active = mask != 0
    want = linear_providers.exact_logps(hidden, weight, ids)

    def error(function):
        pairs = zip(function(hidden, weight, ids, mask, True), want, strict=True)
        return max(measure.relative_error([g[active]], [w[active]]) for g, w in pairs)

    return errors_of(functions, error)


def loss_steps(make, losses):
    """(batch, steps, prepare) of losses and gradients of hidden states and weight."""
    batch = make(seed=0)
    leaves = [tensor.requires_grad_() for tensor in batch[:2]]

    def prepare():
        for leaf in leaves:
            leaf.grad = None

    return batch, {n: lambda f=f: f(*batch).backward() for n, f in losses.items()}, prepare


def logps_steps(make, functions):
    """(batch, steps, prepare) of log-probabilities and entropies without a gradient."""
    batch = make(seed=0)
    run = torch.no_grad()(lambda function: function(*batch[:4], True))
    return batch, {n: functools.partial(run, f) for n, f in functions.items()}, lambda: None


def record_steps(benchmark, case, device, build, errors, *, backward):
    """Measure the steps, and the matmuls that none of them can do without."""

    def floors(batch):
        hidden, weight, mask = batch[0], batch[1], batch[3]
        return {"matmuls": linear_providers.bare_matmuls(hidden, weight, mask, backward)}

    batch, seconds = record(benchmark, case, device, build, floors)
    mask, (V, H), ours = batch[3], batch[1].shape, seconds["fused"]
    info = {"shape": [*mask.shape, V], "H": H, "active_rows": mask.count_nonzero().item()}
    info |= {"floor_ms": 1e3 * seconds["matmuls"], "time_over_floor": ours / seconds["matmuls"]}
    if "trl" in seconds:
        info["ratio_time_over_trl"] = ours / seconds["trl"]
    benchmark.extra_info.update(info)
    for name in errors.keys() & seconds.keys():
        benchmark.extra_info["providers"][name]["error"] = errors[name]


def time_losses(benchmark, case, shape, dtype, device, losses, exact):
    """Loss and gradients of hidden states and weight."""
    make = functools.partial(make_batch, *shape, dtype, device)
    errors = gradient_errors(losses, make(seed=1), exact)
    assert errors["fused"] < GRADIENT_ERROR[dtype], errors
    build = functools.partial(loss_steps, make, losses)
    record_steps(benchmark, case, device, build, errors, backward=True)


def time_logps(benchmark, case, shape, dtype, device):
    """Log-probabilities and entropies without a gradient."""
    make = functools.partial(make_batch, *shape, dtype, device)
    functions = functions_of(LOGPS, device, "_logps")
    with torch.no_grad():
        errors = logps_errors(functions, make(seed=1))
    assert errors["fused"] < LOGPS_ERROR, errors
    build = functools.partial(logps_steps, make, functions)
    record_steps(benchmark, case, device, build, errors, backward=False)


def functions_of(names, device, suffix=""):
    """{name: provider}; on a GPU TRL leaves the masked rows out by itself."""
    if device != "cpu":
        names = [name for name in names if name != "trl_active"]
    return {name: getattr(linear_providers, name + suffix) for name in names}


@pytest.mark.parametrize("dtype", DTYPES)
def bench_linear_loss_cpu(benchmark, dtype):
    case = f"head, loss and gradients, {dtype}"
    exact = linear_providers.exact_gradients
    time_losses(benchmark, case, CPU_SHAPE, dtype, "cpu", functions_of(LOSSES, "cpu"), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_linear_gspo_cpu(benchmark, dtype):
    losses = {"fused": linear_providers.fused_gspo, "eager": linear_providers.eager_gspo}
    surrogate = linear_providers.sequence_surrogate
    exact = functools.partial(linear_providers.exact_gradients, loss=surrogate)
    time_losses(benchmark, f"head, gspo, {dtype}", CPU_SHAPE, dtype, "cpu", losses, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_linear_logps_cpu(benchmark, dtype):
    case = f"head, log-probabilities and entropies, {dtype}"
    time_logps(benchmark, case, CPU_SHAPE, dtype, "cpu")


def cuda_shape(N, H, V):
    """Lengths, H, V; skips where the float64 truth and one set of logits do not fit."""
    torch.cuda.empty_cache()
    needed = 8 * (4 * CUDA_T * V + 4 * V * H) + 2 * N * V
    if torch.cuda.get_device_properties().total_memory < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of device memory")
    return (CUDA_T,) * (N // CUDA_T), H, V


@pytest.mark.cuda
@pytest.mark.parametrize("N, H, V", CUDA_SHAPES)
def bench_linear_loss_cuda(benchmark, N, H, V):
    exact = linear_providers.exact_gradients
    shape = cuda_shape(N, H, V)
    case = "head, loss and gradients, bfloat16"
    time_losses(benchmark, case, shape, "bfloat16", "cuda", functions_of(LOSSES, "cuda"), exact)


@pytest.mark.cuda
@pytest.mark.parametrize("N, H, V", CUDA_SHAPES)
def bench_linear_logps_cuda(benchmark, N, H, V):
    case = "head, log-probabilities and entropies, bfloat16"
    time_logps(benchmark, case, cuda_shape(N, H, V), "bfloat16", "cuda")
