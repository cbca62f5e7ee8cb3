"""The loss and the log-probabilities with the LM head inside, against eager, torch's chunked head,
TRL's and Liger's.

    pytest benchmarks/bench_linear.py --lines runs/linear.jsonl

Before it is timed, every provider is compared with float64 on other data of the same shape; errors
are reported with the figures.
"""

import functools

import pytest
import torch

from benchmarks import linear_providers, measure, peers, providers
from benchmarks.bench_logits import GRADIENT_ERROR, LOGPS_ERROR
from benchmarks.cases import HALF
from benchmarks.record import errors_of, record

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU_SHAPE = ((256, 128, 64, 32), 256, 32_000)
SHORT = ((8,), 256, 32_000)  # one sequence of 8 tokens: the cost of a call
LOSSES = ("fused", "fused_torch", "eager", "float32", "compiled")
LOSSES += ("torch_linear", "trl", "trl_active", "liger_linear", "cce", "quack_linear")
LOGPS = ("fused", "eager", "torch_linear", "trl", "trl_active", "cce")
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
    """Measure the steps, and the matmuls that every one of them contains."""

    def floors(batch):
        hidden, weight, mask = batch[0], batch[1], batch[3]
        return {"matmuls": linear_providers.bare_matmuls(hidden, weight, mask, backward)}

    batch, seconds = record(benchmark, case, device, build, floors, errors)
    mask, (V, H), ours = batch[3], batch[1].shape, seconds["fused"]
    info = {"shape": [*mask.shape, V], "H": H, "active_rows": mask.count_nonzero().item()}
    info |= {"floor_ms": 1e3 * seconds["matmuls"], "time_over_floor": ours / seconds["matmuls"]}
    if "trl" in seconds:
        info["ratio_time_over_trl"] = ours / seconds["trl"]
    flops = (6 if backward else 2) * info["active_rows"] * H * V
    info |= {"TFLOP/s": flops / ours / 1e12, "subject": "head"}
    benchmark.extra_info.update(info)


def time_losses(benchmark, case, shape, dtype, device, names=LOSSES, level="token"):
    """Loss and gradients of hidden states and weight."""
    losses = functions_of(names, device, level=level)
    surrogate = functools.partial(providers.surrogate, level=level)
    exact = functools.partial(linear_providers.exact_gradients, loss=surrogate)
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


def functions_of(names, device, suffix="", **formula):
    """{name: provider}; on a GPU TRL itself leaves masked rows out."""
    found = {}
    for name in names:
        module = linear_providers if hasattr(linear_providers, name + suffix) else peers
        if device == "cpu" or name != "trl_active":
            found[name] = functools.partial(getattr(module, name + suffix), **formula)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def bench_linear_loss_cpu(benchmark, dtype):
    case = f"head, loss and gradients, {dtype}"
    time_losses(benchmark, case, CPU_SHAPE, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def bench_linear_gspo_cpu(benchmark, dtype):
    names = ("fused", "eager", "compiled", "trl_active", "liger_linear")
    case = f"head, ratio of sequences, {dtype}"
    time_losses(benchmark, case, CPU_SHAPE, dtype, "cpu", names, level="sequence")


def bench_linear_short_cpu(benchmark):
    time_losses(benchmark, "head, one sequence of 8 tokens, bfloat16", SHORT, "bfloat16", "cpu")


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
    case = "head, loss and gradients, bfloat16"
    time_losses(benchmark, case, cuda_shape(N, H, V), "bfloat16", "cuda")


@pytest.mark.cuda
def bench_linear_gspo_cuda(benchmark):
    case, shape = "head, ratio of sequences, bfloat16", cuda_shape(*CUDA_SHAPES[0])
    time_losses(benchmark, case, shape, "bfloat16", "cuda", level="sequence")


@pytest.mark.cuda
def bench_linear_active_cuda(benchmark):
    """45 % of the tokens active: packed, they are 45 % of the work."""
    case, (_, H, V) = "head, 45 % active, bfloat16", CUDA_SHAPES[0]
    cuda_shape(*CUDA_SHAPES[0])
    time_losses(benchmark, case, (HALF, H, V), "bfloat16", "cuda")


@pytest.mark.cuda
def bench_linear_short_cuda(benchmark):
    case, (_, H, V) = "head, one sequence of 8 tokens, bfloat16", CUDA_SHAPES[0]
    time_losses(benchmark, case, ((8,), H, V), "bfloat16", "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("N, H, V", CUDA_SHAPES)
def bench_linear_logps_cuda(benchmark, N, H, V):
    case = "head, log-probabilities and entropies, bfloat16"
    time_logps(benchmark, case, cuda_shape(N, H, V), "bfloat16", "cuda")
