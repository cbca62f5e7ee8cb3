"""The loss and the log-probabilities over given logits: `cases`, against `providers` and `peers`.

    pytest benchmarks --lines runs/cpu.jsonl

Before it is timed, every provider is compared with float64 on other data of the same shape; errors
are reported with the figures.
"""

import functools
from typing import NamedTuple

import pytest
import torch

from benchmarks import cases, measure, peers, providers
from benchmarks import record as recording

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A gradient of 16 bits is rounded once, 2e-3 in bfloat16.
GRADIENT_ERROR = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
LOGPS_ERROR = 1e-5  # results are float32 whatever the logits
ENTROPY_COEF = 0.01


class Batch(NamedTuple):
    logits: torch.Tensor  # (B, T, V)
    ids: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T) int64
    advantages: torch.Tensor  # (B,)
    old_logps: torch.Tensor | None  # (B, T)


def make_batch(lengths, V, dtype, device, seed, on_policy=False):
    """A Batch; the policy has moved by a tenth of a nat."""
    generator = torch.Generator(device).manual_seed(seed)
    B, T = len(lengths), max(lengths)
    options = {"generator": generator, "device": device}
    logits = torch.randn(B, T, V, dtype=DTYPES[dtype], **options).mul_(2)
    ids = torch.randint(V, (B, T), **options)
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long().to(device)
    advantages, old_logps = torch.randn(B, **options), None
    if not on_policy:
        moved = 0.1 * torch.randn(B, T, **options)
        old_logps = providers.exact_logps(logits, ids)[0].float() + moved
    return Batch(logits, ids, mask, advantages, old_logps)


def functions_of(case):
    """{name: provider}, each with the signature of its kind."""
    suffix = "" if case.loss else "_logps"
    found = {}
    for name in case.providers:
        module = providers if hasattr(providers, name + suffix) else peers
        found[name] = getattr(module, name + suffix)
    if not case.loss:
        return found
    formula = {"level": case.level, "entropy_coef": ENTROPY_COEF * case.entropy}
    return {name: functools.partial(f, **formula) for name, f in found.items()}


def leaf_for(name, logits):
    """A leaf with the logits as a provider takes them: some take one position more than tokens."""
    logits = logits.detach()
    if name in peers.ONE_MORE_POSITION:
        return torch.cat([logits, logits[:, :1]], dim=1).requires_grad_()
    return logits.clone().requires_grad_()


def gradient_errors(case, batch):
    """Relative norm errors of the providers' gradients."""
    functions = functions_of(case)
    ours = functions[case.providers[0]]
    formula = functools.partial(providers.surrogate, **ours.keywords)
    exact = providers.exact_logps(batch.logits, batch.ids)

    def error(item):
        name, function = item
        leaf, T = leaf_for(name, batch.logits), batch.ids.shape[1]
        function(leaf, *batch[1:]).backward()
        want = providers.exact_gradients(batch.logits, batch.ids, batch[2:], formula, exact)
        return measure.relative_error(leaf.grad[:, :T], want)

    return recording.errors_of({name: (name, f) for name, f in functions.items()}, error)


def logps_errors(case, batch):
    """Relative norm errors of log-probabilities or entropies where active: the larger."""
    want, active = providers.exact_logps(batch.logits, batch.ids), batch.mask != 0

    def error(function):
        got = function(*batch[:3], case.entropy)
        pairs = [(g, w) for g, w in zip(got, want, strict=True) if g is not None]
        return max(measure.relative_error([g[active]], [w[active]]) for g, w in pairs)

    with torch.no_grad():
        return recording.errors_of(functions_of(case), error)


def build(case, device):
    """(batch, {name: step}, prepare) of `record`."""
    arguments = (case.lengths, case.V, case.dtype, device)
    batch = make_batch(*arguments, seed=0, on_policy=case.on_policy)
    functions = functions_of(case)
    if not case.loss:
        run = torch.no_grad()(lambda function: function(*batch[:3], case.entropy))
        return batch, {n: functools.partial(run, f) for n, f in functions.items()}, lambda: None
    logits = batch.logits.requires_grad_()
    longer = functools.cache(lambda: leaf_for("liger", batch.logits))  # only if a provider takes it
    source = logits.detach().clone() if device != "cpu" else None

    def step(name, function):
        leaf = longer() if name in peers.ONE_MORE_POSITION else logits
        function(leaf, *batch[1:]).backward()

    def prepare():
        logits.grad = None
        leaves = [logits, longer()] if longer.cache_info().currsize else [logits]
        for leaf in leaves:
            leaf.grad = None
            if source is not None:  # a step in place has written over them
                leaf.detach()[:, : source.shape[1]].copy_(source)

    return batch, {n: functools.partial(step, n, f) for n, f in functions.items()}, prepare


def bench(benchmark, case, device):
    """Measure a case, the bytes that it must move at least, and the time that moving them takes."""
    fresh = make_batch(case.lengths, case.V, case.dtype, device, seed=1, on_policy=case.on_policy)
    errors = gradient_errors(case, fresh) if case.loss else logps_errors(case, fresh)
    ours = case.providers[0]
    assert errors[ours] < (GRADIENT_ERROR[case.dtype] if case.loss else LOGPS_ERROR), errors
    del fresh
    batch, seconds = recording.record(
        *(benchmark, case.title, device, functools.partial(build, case, device)),
        lambda batch: measure.floors(batch.logits),
        errors,
    )
    logits, mask = batch.logits, batch.mask
    active = mask.count_nonzero().item()
    traffic = logits.nbytes * (active / mask.numel() + case.loss)
    info = {"shape": list(logits.shape), "dtype": case.dtype, "active_rows": active}
    info |= {"bytes": round(traffic), "GB/s": traffic / seconds[ours] / 1e9, "ours": ours}
    if case.axis:
        info |= {"axis": case.axis, "size": case.size, "subject": "logits"}
    read, copy = logits.nbytes / seconds["read"], 2 * logits.nbytes / seconds["copy"]
    floor = traffic / (copy if case.loss else read)
    info |= {"read GB/s": read / 1e9, "copy GB/s": copy / 1e9, "floor_ms": 1e3 * floor}
    info |= {"time_over_floor": seconds[ours] / floor}
    benchmark.extra_info.update(info)


@pytest.mark.parametrize("case", cases.CPU, ids=lambda case: case.id)
def bench_logits_cpu(benchmark, case):
    bench(benchmark, case, "cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("case", cases.CUDA, ids=lambda case: case.id)
def bench_logits_cuda(benchmark, case):
    need_memory(case)
    bench(benchmark, case, "cuda")


def need_memory(case):
    """Skip where our loss, its floors and the float64 reference do not fit."""
    torch.cuda.empty_cache()
    rows = len(case.lengths) * max(case.lengths)
    reference = 4 * 8 * max(case.lengths) * case.V
    needed = 6 * DTYPES[case.dtype].itemsize * rows * case.V + reference
    if torch.cuda.get_device_properties().total_memory < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of device memory")
