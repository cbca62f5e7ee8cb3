"""The sums of a batch in one stage and in two, against float64."""

import pytest
import torch

from grpo_fused.bundles import Outputs
from grpo_fused.kernels import reduce
from grpo_fused.losses.metrics import MEANS, METRICS, SUMS
from grpo_fused.ops import BACKENDS

LIMIT = reduce.ONE_STAGE * reduce.BLOCK  # tokens that one stage takes
MANY = reduce.PARTS * reduce.BLOCK + 700  # so that some programs of the first stage take two blocks


def make_outputs(num_tokens, entropy=True):
    """(`Outputs` of a batch, 0 where masked; mask)."""
    generator = torch.Generator().manual_seed(num_tokens)

    def randn():
        return torch.randn(1, num_tokens, generator=generator)

    active = torch.rand(1, num_tokens, generator=generator) < 0.7
    clipped = torch.randint(-1, 2, (1, num_tokens), generator=generator).float()
    ratio = 0.3 * (randn() / 5).exp()  # all below 1, as their maximum then is
    values = [randn(), randn() ** 2, clipped, ratio, randn(), randn() ** 2]
    values = [value.masked_fill(~active, 0.0) for value in values]
    return Outputs(*values[:5], values[5] if entropy else None), active


def run(outputs, active, backend="triton"):
    """(loss, sums, metrics) as a backend writes them."""
    results = [torch.full(shape, float("nan")) for shape in ((), (len(SUMS),), (len(METRICS),))]
    BACKENDS[backend].reduce(outputs, active, *results)
    return results


def expected(outputs, active):
    """{name: sum} and {name: mean} in float64, {name: sum of absolute values}."""
    loss, kl, clipped, ratio, _, entropy, _ = (
        torch.zeros(int(active.sum()), dtype=torch.float64) if x is None else x[active].double()
        for x in outputs
    )
    ones = torch.ones_like(loss)
    low, high = (clipped < 0).double(), (clipped > 0).double()
    terms = dict(zip(SUMS, (loss, ones, kl, entropy, ones, low, high, ratio), strict=True))
    sums = {name: term.sum() for name, term in terms.items()}
    means = {
        name: sum(sums[n] for n in numerator) / max(sums[denominator], 1)
        for name, (numerator, denominator) in MEANS.items()
    }
    means["ratio/max"] = ratio.max() if len(ratio) else torch.zeros(())
    return sums, means, {name: term.abs().sum() for name, term in terms.items()}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("entropy", [False, True], ids=["without entropy", "entropy"])
@pytest.mark.parametrize("num_tokens", [0, 1, LIMIT, LIMIT + 1, MANY])
def test_sums_and_means(num_tokens, entropy, backend):
    outputs, active = make_outputs(num_tokens, entropy)
    loss, sums, metrics = run(outputs, active, backend)
    want, means, sizes = expected(outputs, active)
    for got, name in zip(sums, SUMS, strict=True):
        assert (got - want[name]).abs() <= 1e-6 * sizes[name], name
    for got, name in zip(metrics, METRICS, strict=True):
        torch.testing.assert_close(got.double(), means[name].double(), rtol=2e-6, atol=1e-12)
    assert loss == sums[0]


@pytest.mark.parametrize("num_tokens", [LIMIT, LIMIT + 1])
def test_stages(num_tokens, monkeypatch):
    """One program for few tokens, two launches for more."""
    launched = []
    monkeypatch.setattr(
        reduce, "launch_small", lambda function, programs, *args, **kw: launched.append(programs)
    )
    run(*make_outputs(num_tokens))
    blocks = num_tokens // reduce.BLOCK + 1
    assert launched == ([1] if num_tokens == LIMIT else [blocks, 1])


@pytest.mark.parametrize("token", [0, LIMIT, MANY - 1])
def test_a_ratio_of_nan_reaches_the_maximum(token):
    """A maximum that drops NaN would hide the one token that broke a batch."""
    outputs, active = make_outputs(MANY)
    active[0, token] = True
    outputs.ratio[0, token] = float("nan")
    metrics = run(outputs, active)[2]
    found = dict(zip(METRICS, metrics, strict=True))
    assert found["ratio/max"].isnan() and found["ratio/mean"].isnan()


def test_without_a_mask_all_tokens_count():
    outputs, active = make_outputs(LIMIT + 1)
    _, sums, _ = run(outputs, None)
    assert sums[list(SUMS).index("tokens")] == LIMIT + 1
    assert torch.equal(sums, run(outputs, torch.ones_like(active))[1])
