"""torch.compile(fullgraph=True) equals eager, and every op passes opcheck."""

import itertools

import pytest
import torch
from batches import make_batch, relative_error
from compiling import compile_whole

from grpo_fused import Clip, grpo_loss, selective_log_softmax
from grpo_fused.bundles import (
    Derivatives,
    Formula,
    Outputs,
    Scales,
    Statistics,
    Tokens,
    TokenValues,
    TokenWeights,
    Weight,
)
from grpo_fused.ops import BACKENDS


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(hidden, weight, batch_tensors, options):
    """Both public functions over the outputs of a linear layer."""
    ids, mask, advantages, old_logps, ref_logps = batch_tensors
    out = grpo_loss(
        (hidden @ weight) * 1.5,
        ids,
        mask,
        advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        compute_entropy=True,
        **options,
    )
    logps, entropies = selective_log_softmax(
        hidden @ weight,
        ids,
        mask,
        compute_entropy=True,
        inplace=options["inplace"],
        implementation=options["implementation"],
    )
    loss = 2.0 * out.loss + (0.1 * logps - 0.2 * entropies).sum()
    return loss, out.sums, out.metrics["kl"], out.logps


def run(function, T, device, options):
    """(loss, sums, kl, logps, gradients) of `function`, a policy step after the old policy."""
    batch = make_batch(T=T, extra=0, device=device, seed=T)
    generator = torch.Generator().manual_seed(T)
    hidden = torch.randn(4, T, 8, generator=generator).to(device).requires_grad_(True)
    weight = torch.randn(8, 97, generator=generator).to(device).requires_grad_(True)
    logps = ((hidden @ weight).detach() * 1.5 / options["temperature"]).log_softmax(-1)
    chosen = logps.gather(-1, batch.ids.clamp(min=0)[..., None])[..., 0]
    noise = 0.3 * torch.randn(2, 4, T, generator=generator).to(device)
    tensors = (batch.ids, batch.mask, batch.advantages, *(chosen + noise))
    loss, *others = function(hidden, weight, tensors, options)
    loss.backward()
    return loss.detach(), *others, hidden.grad, weight.grad


@pytest.mark.parametrize(
    "inplace", [pytest.param(False, marks=pytest.mark.slow), True], ids=["fresh", "inplace"]
)
def test_compiled_equals_eager(inplace, implementation, device):
    """Over several lengths, so that dynamic shapes are traced too (Liger#1366: fp64 floats)."""
    compiled = compile_whole(step)
    for T, beta, grad_scale in ((6, 0.1, 2.0), (7, 0.1, 2.0), (9, 0.1, 2.0)):
        options = {
            "beta": beta,
            "grad_scale": grad_scale,
            "temperature": 0.8,
            "inplace": inplace,
            "implementation": implementation,
        }
        want = run(step, T, device, options)
        got = run(compiled, T, device, options)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < 2e-6


def test_schedules_as_tensors_do_not_recompile(implementation, device):
    compiled = compile_whole(step)
    counter = torch._dynamo.utils.counters["stats"]
    graphs = []
    for k in range(4):
        options = {
            "beta": torch.tensor(0.01 * k, device=device),
            "temperature": torch.tensor(0.5 + 0.1 * k, device=device),
            "grad_scale": torch.tensor(1.0 + k, device=device),
            "inplace": False,
            "implementation": implementation,
        }
        got = run(compiled, 6, device, options)
        graphs.append(counter["unique_graphs"])
    assert graphs[0] == graphs[-1]
    want = run(step, 6, device, options)
    assert relative_error(got[-1], want[-1]) < 2e-6


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16],
    ids=["fp32", "fp16"],
)
def test_compiled_training_step_of_a_half_precision_head(dtype, implementation, device):
    """float16 makes its gradient in backward: the other branch of the Function."""
    batch = make_batch(extra=0, dtype=dtype, device=device)

    def loss_of(logits):
        return grpo_loss(
            logits * 1,
            batch.ids,
            batch.mask,
            batch.advantages,
            old_logps=batch.old_logps,
            inplace=True,
            implementation=implementation,
        ).loss

    grads = []
    for function in (loss_of, compile_whole(loss_of)):
        logits = batch.leaf()
        (function(logits) * 4.0).backward()
        grads.append(logits.grad)
    assert relative_error(grads[1], grads[0]) < 1e-6


def op_arguments(name, batch, device):
    def memory(*shape):
        return torch.zeros(shape, device=device)

    values, one = torch.rand(4, 6, device=device), torch.ones((), device=device)
    active, clip = batch.mask != 0, Clip()
    weights = (1 + values, one.clone(), 0.1 * one)
    tokens = Tokens(batch.ids, active, one, values, -values, -2 * values, *weights)
    scales = Scales(one.clone(), 9 * one)
    outputs = Outputs(*(memory(4, 6) for _ in range(6)))
    return {
        "fused_loss": (
            *(batch.logits, tokens, scales),
            Formula(clip.name(), clip.params(), "k3", True, one.clone()),
            outputs._replace(dlogits=torch.zeros_like(batch.logits)),
        ),
        "logprob_fwd": (
            *(batch.logits, tokens.of_softmax(), scales),
            *(Statistics(*(memory(4, 6) for _ in range(4))), False),
        ),
        "logprob_bwd": (
            *(batch.logits, tokens.of_softmax(), scales),
            Statistics(-values, values.clone(), values.clone(), 1 + values),
            Derivatives(values.clone(), values.clone(), torch.zeros_like(batch.logits)),
        ),
        "token_weights": (
            TokenValues(
                *(values[:, 0].contiguous(), active),
                *(Weight(values, active.sum(1), 4 * one), Weight(0.1 * one, active.sum(), one)),
                Weight(one.clone(), active.sum(), 2 * one),
            ),
            None,
            TokenWeights(*(memory(4, 6) for _ in range(4))),
        ),
        "reduce": (outputs, active, memory(), memory(8), memory(7)),
        "rescale": (torch.ones_like(batch.logits), one, 2 * one),
    }[name]


OPS = ["fused_loss", "logprob_fwd", "logprob_bwd", "token_weights", "reduce", "rescale"]


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, implementation, device):
    if not hasattr(BACKENDS[implementation], name):
        pytest.skip("plain torch, no op")
    batch = make_batch(mask=torch.ones(4, 6), device=device)
    batch.logits = batch.logits.nan_to_num()
    launcher = getattr(BACKENDS[implementation], name)
    arguments = launcher.flatten(*op_arguments(name, batch, device))
    torch.library.opcheck(launcher.op, arguments)


FAST = [("gmpo", "none")]  # a sum over sequences: `test_linear_compile.py`
FAMILY = itertools.product(("cispo", "gspo", "gspo_token", "vespo", "gmpo"), ("sum", "none"))


@pytest.mark.parametrize(
    ("loss_type", "reduction"),
    FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in FAMILY if case not in FAST],
)
def test_the_family_compiles_whole(loss_type, reduction, implementation, device):
    """Ratios of sequences, objectives that couple tokens, packed input, schedules as tensors."""
    batch = make_batch(B=3, T=4, V=33, extra=0, mask=torch.ones(3, 4), device=device)
    ends = torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=device)
    ratio = torch.rand(3, device=device) + 0.5

    def loss_of(logits, beta):
        packed = [t.flatten(0, 1) for t in (logits * 1, batch.ids, batch.mask)]
        return grpo_loss(
            *(*packed, batch.advantages),
            old_logps=batch.old_logps.flatten(),
            ref_logps=batch.ref_logps.flatten(),
            importance_sampling_ratio=ratio,
            beta=beta,
            entropy_coef=0.5 * beta,
            use_bias_correction_kl=True,
            loss_type=loss_type,
            reduction=reduction,
            cu_seqlens=ends,
            implementation=implementation,
        )

    # One row is compiled to the end; for the others it is the graph that could break.
    compiled = compile_whole(loss_of)
    if loss_type != "gspo":
        compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for beta in (0.1, 0.2):
        results = []
        for function in (loss_of, compiled):
            logits = batch.leaf()
            out = function(logits, torch.tensor(beta, device=device))
            (out.loss * torch.arange(1.0, 1.0 + out.loss.numel(), device=device)).sum().backward()
            results.append((out.loss.detach(), logits.grad, *out.metrics.values()))
        for got, want in zip(results[1], results[0], strict=True):
            assert relative_error(got, want) < (1e-6 if got.dim() else 2e-5)
