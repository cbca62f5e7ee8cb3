"""Every option with every other, drawn at random, against the float64 oracle.

In CI a fixed set of cases; `HYPOTHESIS_PROFILE=long pytest tests/losses/test_family.py` draws new
ones: 10,000 in torch and 3,000 in Triton's interpreter.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from random_cases import COMMON, ROWS, call, cases, rule_of, size_of_terms

import oracle

settings.register_profile("ci", derandomize=True, database=None, **COMMON)
settings.register_profile("long", **COMMON)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(PROFILE)
CASES = {"ci": {"torch": 300, "triton": 40}, "long": {"torch": 10_000, "triton": 3_000}}[PROFILE]


@given(case=cases(), rows=ROWS)
@settings(max_examples=CASES["torch"])
def test_everything_with_everything_in_torch(case, rows, device):
    check(case, rows, "torch", device)


@given(case=cases(), rows=ROWS)
@settings(max_examples=CASES["triton"])
def test_everything_with_everything_in_triton(case, rows, device):
    check(case, rows, "triton", device)


def check(case, rows, implementation, device):
    """Value, gradient, log-probabilities, entropies and metrics against the oracle."""
    batch, lengths, options = case
    upstream = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(1))
    objective = options["objective"]
    oracle_options = options | {
        "objective": type(objective).__name__,
        "knobs": vars(objective),
        "importance_sampling_level": options["importance_sampling_level"],
        "normalizer": rule_of(options),
    }
    inputs = (batch.logits, batch.ids, batch.mask, batch.advantages)
    truth = oracle.grpo_loss(*inputs, upstream=upstream, **oracle_options)
    out, grad = call(batch, lengths, options, implementation, device, upstream, rows)

    active = (batch.mask != 0).double()
    weights = size_of_terms(batch, options, upstream)
    error = (grad.double() - truth.dlogits).norm()
    assert error <= 4e-6 * (truth.dlogits.norm() + 0.5 * weights.norm()), error
    loss, want = out.loss.detach().double().cpu(), torch.as_tensor(truth.loss)
    size = (want.abs() + 5 * active) if loss.dim() else want.abs() + 5 * weights.abs().sum()
    assert ((loss - want).abs() <= 3e-6 * size).all()
    torch.testing.assert_close(out.logps.double().cpu(), truth.logps, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(out.entropies.double().cpu(), truth.entropies, rtol=3e-6, atol=3e-6)
    assert out.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        assert out.metrics[name].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name
