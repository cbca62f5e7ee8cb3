"""The KL penalty with bounds, against the oracle in float64 and the losses' own term."""

import math

import pytest
import torch
from batches import relative_error

import oracle
from grpo_fused import grpo_loss_from_logps, kl_penalty
from grpo_fused.losses.kl import KL_ESTIMATORS

BOUNDS = [(None, None), (20.0, 10.0), (1.0, None), (None, 0.5), (2.0, 0.3)]
VALUES = -30.0, -8.0, -2.5, -1.2, -0.4, 0.0, 0.2, 0.9, 1.1, 2.4, 2.7, 15.0, 30.0


def tokens(seed=0):
    """logps, ref_logps, old_logps, a mask, NaN under it, and upstream gradients."""
    generator = torch.Generator().manual_seed(seed)
    differences = torch.tensor(VALUES * 2).view(2, -1)
    logps = -torch.rand(differences.shape, generator=generator) - 0.1
    old = logps - 0.7 * torch.randn(differences.shape, generator=generator)
    mask = torch.rand(differences.shape, generator=generator) < 0.8
    upstream = torch.randn(differences.shape, generator=generator)
    named = (logps, logps + differences, old)
    return *(x.masked_fill(~mask, math.nan) for x in named), mask, upstream


@pytest.mark.parametrize("policy", ["on", "off", None])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_every_token_is_that_of_the_oracle(estimator, policy):
    for seed, (max_difference, max_kl) in enumerate(BOUNDS):
        logps, ref, old, mask, upstream = tokens(seed)
        leaf = logps.clone().requires_grad_()
        kl = kl_penalty(
            leaf,
            ref,
            mask,
            kl_estimator=estimator,
            old_logps=None if policy == "on" else old,  # without a correction it is not read
            use_bias_correction_kl=policy is not None,
            max_difference=max_difference,
            max_kl=max_kl,
        )
        kl.backward(upstream)
        assert kl.dtype == torch.float32
        want, slopes = torch.zeros(2, *mask.shape, dtype=torch.float64)
        for b, t in mask.nonzero().tolist():
            logp = logps[b, t].double().requires_grad_()
            then = old[b, t].double() if policy == "off" else None
            options = (estimator, then, policy is not None, max_difference, max_kl)
            value = oracle.kl_penalty(logp, ref[b, t].double(), *options)
            want[b, t] = value.detach()
            if value.requires_grad:
                slopes[b, t] = torch.autograd.grad(value, logp)[0] * upstream[b, t]
        torch.testing.assert_close(kl.detach().double(), want, rtol=3e-5, atol=2e-6)
        torch.testing.assert_close(leaf.grad.double(), slopes, rtol=3e-5, atol=2e-6)


def test_both_bounds_are_reached():
    """On both sides, by tokens of the test above, and no bound leaves all tokens inside."""
    logps, ref, _, mask, _ = tokens()
    free = kl_penalty(logps, ref, mask)
    for bound in ({"max_difference": 1.0}, {"max_kl": 0.5}):
        held = kl_penalty(logps, ref, mask, **bound)
        changed = (held != free) & mask
        assert changed[ref > logps].any() and changed[ref < logps].any()
        assert (held == free)[mask].sum() > 3


@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_without_bounds_it_is_the_term_of_the_loss(estimator, corrects):
    logps, ref, old, mask, upstream = tokens(1)
    ref = torch.where((ref - logps).abs() < 3, ref, logps)
    options = {"kl_estimator": estimator, "use_bias_correction_kl": corrects}
    mine, theirs = (logps.clone().requires_grad_() for _ in range(2))
    kl = kl_penalty(mine, ref, mask, old_logps=old, **options)
    out = grpo_loss_from_logps(
        theirs,
        mask,
        torch.zeros(2),
        old_logps=old,
        ref_logps=ref,
        beta=1.0,
        reduction="none",
        **options,
    )
    kl.backward(upstream)
    out.loss.backward(upstream)
    assert relative_error(kl, out.loss) < 1e-6 and relative_error(mine.grad, theirs.grad) < 1e-6
    assert (kl[~mask] == 0).all() and (mine.grad[~mask] == 0).all()


def test_the_gradient_of_nemo_rl_off_policy():
    """The example of the issue: beta 0.3, both tokens weighted by their own probability."""
    logps = torch.tensor([-1.2, -0.7], requires_grad=True)
    ref = torch.tensor([-0.9, -1.1])
    bounds = {"max_difference": 20.0, "max_kl": 10.0}
    kl = kl_penalty(logps, ref, use_bias_correction_kl=True, **bounds)
    (0.3 * kl.mean()).backward()
    torch.testing.assert_close(logps.grad, torch.tensor([-0.045, 0.06]))
    logps.grad = None
    (0.3 * kl_penalty(logps, ref, **bounds).mean()).backward()
    torch.testing.assert_close(logps.grad, torch.tensor([-0.0525, 0.0495]), rtol=1e-2, atol=0)


def test_nan_and_infinity():
    """An active NaN is seen in the value; a reference of probability 0 is bounded."""
    logps = torch.tensor([-1.0, math.nan, -1.0, -1.0], requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, math.nan, -math.inf])
    kl = kl_penalty(logps, ref, max_difference=20.0, max_kl=10.0)
    kl.sum().backward()
    assert kl.isnan().tolist() == [False, True, True, False]
    assert kl[3] == 10.0 and logps.grad[3] == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_packed_tokens(dtype):
    logps, ref, _, mask, upstream = (x.flatten() for x in tokens())
    leaf = logps.to(dtype).requires_grad_()
    kl = kl_penalty(leaf, ref, mask, max_kl=10.0)
    kl.backward(upstream)
    want = kl_penalty(leaf.detach().float(), ref, mask, max_kl=10.0)
    assert torch.equal(kl, want) and leaf.grad.dtype == dtype


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("kl_estimator must be one of", {"kl_estimator": "low_var_kl"}),
        ("max_difference must be a number > 0 or None, got 0.0", {"max_difference": 0.0}),
        ("max_kl must be a number > 0 or None, got nan", {"max_kl": math.nan}),
        ("max_kl must be a number > 0 or None, got '10'", {"max_kl": "10"}),
        (r"mask must have shape \(2, 13\)", {"mask": torch.ones(2, 3)}),
        (r"ref_logps must have shape \(2, 13\)", {"ref_logps": torch.zeros(2, 3)}),
        (
            r"old_logps must have shape \(2, 13\)",
            {"old_logps": torch.zeros(3), "use_bias_correction_kl": True},
        ),
        ("logps must be a tensor of real numbers", {"logps": [0.0]}),
    ],
)
def test_invalid_arguments_raise(match, options):
    logps, ref, *_ = tokens()
    with pytest.raises(ValueError, match=match):
        kl_penalty(**{"logps": logps, "ref_logps": ref} | options)
