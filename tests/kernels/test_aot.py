"""What compiled kernels take, without a GPU, and how many variants of them there are.

Every test runs in a process of its own, where Triton compiles instead of interpreting.
"""

import functools
import itertools
import math
import re
from importlib.metadata import version

import offline
import pytest
import torch

from benchmarks import aot, aot_cases
from grpo_fused import LOSSES, Clip
from grpo_fused.bundles import (
    Chunking,
    Derivatives,
    Formula,
    Gradients,
    Head,
    Outputs,
    Scales,
    Statistics,
    Tokens,
    TokenValues,
    TokenWeights,
    Weight,
)
from grpo_fused.head.chunks import logits_bytes
from grpo_fused.losses.kl import KL_ESTIMATORS

OLDER = tuple(map(int, version("triton").split(".")[:2])) < (3, 9)
SPILLS = 2 if OLDER else 0  # registers


OF_TOKENS = ("reduce", "reduce, many tokens", "token_weights", "locate")  # these read no logits
# Of each kernel over logits the cases with the most registers, for other targets and dtypes.
HEAVY = ("statistics, entropy", "gradient, entropy", "loss + gradient, entropy bonus")
HEAVY += ("loss + gradient, softcap", "rescale")
# Instructions per element on sm_90 in bfloat16: about 5 % more than Triton 3.9 needs.
STATISTICS, STATISTICS_ENTROPY, STATISTICS_SOFTCAP = 5.95, 8.6, 30.2
GRADIENT, GRADIENT_ENTROPY, GRADIENT_SOFTCAP = 5.25, 7.35, 33.7
HOPPER = {
    "statistics": (STATISTICS, None),
    "statistics, entropy": (STATISTICS_ENTROPY, None),
    "statistics, padded rows": (STATISTICS, None),
    "statistics of a shard, entropy": (STATISTICS_ENTROPY, None),
    "gradient": (None, GRADIENT),
    "gradient, entropy": (None, GRADIENT_ENTROPY),
    "gradient, padded rows": (None, GRADIENT),
    "loss + gradient": (STATISTICS, GRADIENT),
    "loss + gradient, entropy": (STATISTICS_ENTROPY, GRADIENT),
    "loss + gradient, entropy bonus": (STATISTICS_ENTROPY, GRADIENT_ENTROPY),
    "loss + gradient, softcap": (STATISTICS_SOFTCAP, GRADIENT_SOFTCAP),
    "loss + gradient, float32 logits": (STATISTICS, GRADIENT),
    "loss": (STATISTICS, None),
    "statistics, support": (STATISTICS_ENTROPY, None),
    "gradient, support": (None, GRADIENT_ENTROPY),
    "loss + gradient, support": (STATISTICS, GRADIENT),
    "loss + gradient, support alone": (None, GRADIENT),
    "rescale": (None, None),
}


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("sm_90", "bf16"),
        pytest.param("sm_90", "fp16", marks=pytest.mark.slow),
        pytest.param("sm_90", "fp32", marks=pytest.mark.slow),
        pytest.param("sm_80", "bf16", marks=pytest.mark.slow),
        pytest.param("sm_100", "bf16", marks=pytest.mark.slow),
        pytest.param("gfx942", "bf16", marks=pytest.mark.slow),
    ],
)
@offline.offline
def test_kernels_compile_well(target, dtype):
    """No spills, 128-bit loads and stores, no exchanges between threads; few instructions."""
    names = HEAVY + (OF_TOKENS if dtype == "bf16" else ())
    if (target, dtype) == ("sm_90", "bf16"):
        names = aot_cases.CASES
    for row in aot.measure(target, dtype, cases={name: aot_cases.CASES[name] for name in names}):
        assert row.spills <= SPILLS, row
        if row.case in OF_TOKENS:
            continue
        assert row.load_bits == 128 and row.exchanges == 0, row
        if "gradient" in row.case or row.case == "rescale":
            # Four columns of float32 logits are one load: their gradient in bfloat16 is 64 bits.
            assert row.store_bits == (64 if "float32 logits" in row.case else 128), row
        if target == "sm_90":
            slack = 1.0 if dtype == "bf16" else 1.2
            for found, bound in zip((row.statistics, row.gradient), HOPPER[row.case], strict=True):
                assert (found is None) == (bound is None), row
                assert found is None or found <= slack * bound, row


@offline.offline
def test_every_objective_and_kl_estimator_compiles():
    """Without spills, also an objective without parameters."""
    rows = [row for row in LOSSES.values() if hasattr(row.objective, "per_token")]
    objectives = list({row.objective.name(): row.objective for row in rows}.values())
    assert len(objectives) >= 4 and any(not objective.params() for objective in objectives)
    pairs = zip(itertools.cycle(objectives), itertools.cycle(KL_ESTIMATORS), strict=False)
    number = max(len(objectives), len(KL_ESTIMATORS))
    for objective, kl_estimator in itertools.islice(pairs, number):
        launch = functools.partial(
            aot_cases.launch_fused_loss,
            objective=objective,
            kl_estimator=kl_estimator,
            gradient=False,
        )
        (row,) = aot.measure("sm_90", "bf16", cases={f"{objective}, {kl_estimator}": launch})
        assert row.spills == 0 and row.statistics <= STATISTICS, row


@offline.offline
def test_hints_and_sums():
    """Rows that are read once leave the caches first; no product enters a sum over threads."""

    def ptx(case):
        launch = functools.partial(aot_cases.CASES[case], torch.bfloat16, 151_936)
        ((_, compiled),) = aot.compile_launches("sm_90", launch)
        return compiled.asm["ptx"]

    once, twice = ptx("loss"), ptx("loss + gradient")
    assert "evict_last" not in once and "evict_last" in twice
    for found in (once, ptx("statistics, entropy")):
        assert re.search(r"fma\.rn\.f32[^;]*0f00000000;", found)


@offline.offline
def test_what_changes_from_batch_to_batch_compiles_once():
    """B, T, V, temperature, factors of the loss, parameters of the objective."""

    def run():
        for V in (32_000, 32_768, 50_304, 64_000):
            for B, T in ((1, 1), (2, 3), (16, 16), (1, 99)):
                aot_cases.launch_logprob(torch.bfloat16, V, B, T)
                aot_cases.launch_logprob(torch.bfloat16, V, B, T, gradient=True)
                aot_cases.launch_fused_loss(torch.bfloat16, V, B, T)
        for k in range(1, 5):
            factors = {"scale": 0.5 * k, "temperature": 0.3 * k}
            aot_cases.launch_fused_loss(torch.bfloat16, 32_000, **factors)

    variants = aot.variants("sm_90", run)
    counts = {name: len(keys) for name, keys in variants.items()}
    names = ("_logprob_fwd_kernel", "_logprob_bwd_kernel", "_fused_loss_kernel")
    assert counts == dict.fromkeys(names, 1), counts


def new_variants(before, after):
    """{kernel: how many variants} that `after()` launches and `before()` does not."""
    known = aot.variants("sm_90", before)
    new = {k: keys - known.get(k, set()) for k, keys in aot.variants("sm_90", after).items()}
    return {name: len(keys) for name, keys in new.items() if keys}


def aligned(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def sliced(*shape, dtype=torch.float32):
    """A tensor that starts an element after the aligned start of its memory."""
    return torch.zeros(math.prod(shape) + 1, dtype=dtype)[1:].view(shape)


def launch_everything(make, B=2, T=17, V=64):
    """Every launcher over logits or tokens, with inputs from `make`: 0-d, (B,) and (B, T)."""
    logits = torch.zeros(B, T, V, dtype=torch.bfloat16)
    outputs = [torch.zeros(B, T) for _ in range(6)]
    ids, mask = make(B, T, dtype=torch.int64), make(B, T, dtype=torch.bool)
    objective = Clip()
    formula = Formula(objective.name(), objective.params(), "k3", True, make())
    for factors in ((make(), make(), make()), (make(B, T), make(B, T), make(B, T))):
        temperature, w_policy, w_kl = factors
        values = [make(B, T) for _ in range(3)]
        tokens = Tokens(ids, mask, temperature, *values, w_policy, w_kl, w_entropy=make())
        scales = Scales(make(), make())
        aot_cases.launchers.fused_loss(logits, tokens, scales, formula, Outputs(*outputs, logits))
        softmax = tokens.of_softmax()
        aot_cases.launchers.logprob_fwd(logits, softmax, scales, Statistics(*outputs[:4]), False)
        statistics = Statistics(*(make(B, T) for _ in range(4)))
        derivatives = Derivatives(make(B, T), make(B, T), logits)
        aot_cases.launchers.logprob_bwd(logits, softmax, scales, statistics, derivatives)
    weights = Weight(make(B, T), make(B), make()), Weight(make(), make(), 1.0)
    token_values = TokenValues(make(B), make(B, T, dtype=torch.bool), *weights, weights[1])
    index = make(B * T, dtype=torch.int64)
    aot_cases.launchers.token_weights(token_values, index, TokenWeights(*outputs[:4]))
    ends = make(B + 1, dtype=torch.int32)
    aot_cases.launchers.locate(ends, mask, torch.zeros(B * T, dtype=torch.int64), torch.zeros(B))
    sums = torch.zeros(()), torch.zeros(8), torch.zeros(7)
    aot_cases.launchers.reduce(Outputs(*outputs), mask, *sums)
    aot_cases.launchers.rescale(logits, make(), make())


@offline.offline
def test_misaligned_inputs_make_no_variants():
    """Slices `advantages[1:]`, masks and ids, and 0-d views into a larger tensor."""
    kernels = functools.partial(launch_everything, aligned)
    assert len(aot.variants("sm_90", kernels)) == 7
    found = new_variants(kernels, functools.partial(launch_everything, sliced))
    assert not found, found


def launch_head(make, tokens_with_gradient, rows_per_chunk, N=50, H=8, V=64):
    """The launchers over a head in chunks; the tokens after those with a gradient have none.

    If all have one, tokens are not packed: chunks are slices of the inputs themselves.
    """
    ids = make(1, N, dtype=torch.int64)
    values = [make(1, N) for _ in range(5)]
    tokens = Tokens(ids, None, make(1, N), *values, w_entropy=make(1, N))
    order = torch.arange(N), torch.tensor([tokens_with_gradient, N])
    order = (None, None) if tokens_with_gradient == N else order
    chunk_bytes = logits_bytes(rows_per_chunk, V, torch.float32, torch.float32)
    chunking = Chunking(torch.float32, torch.float32, *order, chunk_bytes)
    head = Head(torch.zeros(1, N, H), torch.zeros(V, H), None)
    gradients = Gradients(torch.zeros(1, N, H), torch.zeros(V, H), None)
    objective = Clip()
    formula = Formula(objective.name(), objective.params(), "k3", True, 1.0)
    outputs = [torch.zeros(1, N) for _ in range(6)]
    aot_cases.launchers.linear_loss(
        head, chunking, tokens, Scales(), formula, Outputs(*outputs), gradients
    )
    softmax, statistics = tokens.of_softmax(), Statistics(*outputs[:4])
    aot_cases.launchers.linear_logprob_fwd(
        head, chunking, softmax, Scales(), statistics, None, False
    )
    statistics = Statistics(*(make(1, N) for _ in range(4)))
    derivatives = Derivatives(make(1, N), make(1, N))
    aot_cases.launchers.linear_logprob_bwd(
        *(head, chunking, softmax, Scales(), statistics, derivatives, None, False, gradients)
    )


@offline.offline
def test_chunks_of_a_head_make_no_variants():
    """Also where the tokens without a gradient start in the middle of a chunk."""

    def whole():
        launch_head(aligned, 50, rows_per_chunk=64)
        launch_head(aligned, 0, rows_per_chunk=64)

    def chunks():
        for tokens_with_gradient in (50, 48, 23, 5, 0):
            launch_head(sliced, tokens_with_gradient, rows_per_chunk=16)
            launch_head(sliced, tokens_with_gradient, rows_per_chunk=21)

    found = new_variants(whole, chunks)
    assert not found, found


@offline.offline
def test_gradients_in_place_make_no_variants():
    """Rows of an odd vocabulary start anywhere, and so does a gradient that overwrites them."""

    def launch(*starts):
        memory, values = torch.zeros(2, 24, 1001, dtype=torch.bfloat16), torch.zeros(2, 16)
        formula = Formula(Clip().name(), Clip().params(), "k3", True, 1.0)
        for start in starts:
            logits = memory[:, start : start + 16]
            tokens = Tokens(values.long(), None, 1.0, *(values for _ in range(3)), values, 0.1)
            outputs = Outputs(*(values for _ in range(6)), logits)
            aot_cases.launchers.fused_loss(logits, tokens, Scales(), formula, outputs)
            derivatives = Derivatives(values, values, logits)
            softmax, statistics = tokens.of_softmax(), Statistics(*(values for _ in range(4)))
            aot_cases.launchers.logprob_bwd(logits, softmax, Scales(), statistics, derivatives)

    assert {(1001 * start * 2) % 16 == 0 for start in range(4)} == {True, False}
    found = new_variants(functools.partial(launch, 0), functools.partial(launch, 1, 2, 3))
    assert not found, found


if __name__ == "__main__":
    offline.main(globals())
