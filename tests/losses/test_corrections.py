"""Rollout weights, off-policy and entropy masks against plain Python loops in float64."""

import math

import pytest
import torch

from grpo_fused.corrections import entropy_quantile_mask, off_policy_mask, rollout_weights

NAN = math.nan
LENGTHS = [9, 0, 5, 12, 1, 7]  # with an empty sequence


def batch(B=6, T=12, spread=0.3, seed=0):
    """Old and sampling log-probabilities, and a mask with prefixes and holes.

    Masked values are NaN or inf, the second sequence is fully masked, and sampling_logps is NaN at
    some active tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(B, T, generator=generator) - 3
    sampling = old - spread * torch.randn(B, T, generator=generator)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    mask &= torch.rand(B, T, generator=generator) < 0.85
    sampling[mask & (torch.rand(B, T, generator=generator) < 0.1)] = NAN
    return old.masked_fill(~mask, NAN), sampling.masked_fill(~mask, math.inf), mask


def pack(tensor):
    """(B, T) to (N,), without the padding of each sequence."""
    return torch.cat([row[:length] for row, length in zip(tensor, LENGTHS, strict=True)])


def cu_seqlens(dtype=torch.int32):
    return torch.tensor([0, *LENGTHS]).cumsum(0).to(dtype)


def differences(minuend, subtrahend, mask, sampling):
    """[B][n_b]: differences at active tokens, 0 where sampling is NaN."""
    return [
        [
            0.0 if math.isnan(s) else float(a) - float(b)
            for a, b, s, active in zip(*rows, strict=True)
            if active
        ]
        for rows in zip(
            minuend.tolist(), subtrahend.tolist(), sampling.tolist(), mask.tolist(), strict=True
        )
    ]


def bounded(difference, mode, cap, floor):
    weight = math.exp(min(max(difference, -80.0), 80.0))
    low, high = -math.inf if floor is None else floor, math.inf if cap is None else cap
    if mode == "truncate":
        return min(max(weight, low), high)
    return weight if low <= weight <= high else 0.0


BOUNDS = [(3.0, None), (1.2, 0.8), (0.9, 0.2), (None, 0.9), (None, None)]


@pytest.mark.parametrize(("cap", "floor"), BOUNDS)
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_rollout_weights(level, mode, cap, floor):
    old, sampling, mask = batch()
    rows = differences(old, sampling, mask, sampling)
    options = {"level": level, "mode": mode, "cap": cap, "floor": floor}
    got = rollout_weights(old, sampling, mask, **options)
    if level == "token":
        want = torch.ones(6, 12, dtype=torch.float64)
        tokens = [bounded(d, mode, cap, floor) for row in rows for d in row]
        want[mask] = torch.tensor(tokens, dtype=torch.float64)
    else:
        lengths = [max(len(row), 1) if level == "sequence_mean" else 1 for row in rows]
        sums = [sum(row) / n for row, n in zip(rows, lengths, strict=True)]
        want = torch.tensor([[bounded(d, mode, cap, floor)] for d in sums])
    assert got.dtype == torch.float32 and got.shape == want.shape
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-6, atol=0)
    if cap == 1.2 and level == "token":  # both bounds are active
        assert 0.1 < ((got < 0.81) | (got > 1.19) | (got == 0))[mask].float().mean() < 0.9

    for dtype in (torch.int32, torch.int64):
        packed = (pack(tensor) for tensor in (old, sampling, mask))
        packed = rollout_weights(*packed, cu_seqlens=cu_seqlens(dtype), **options)
        want = pack(got) if level == "token" else got.flatten()
        torch.testing.assert_close(packed, want, rtol=1e-6, atol=0)


def test_rollout_weights_have_no_gradient_and_are_finite():
    old = torch.tensor([[-1e4, -1.0, -1e4]], requires_grad=True)
    sampling = torch.tensor([[-1.0, -math.inf, -1e4]])
    got = rollout_weights(old, sampling, cap=None)
    assert not got.requires_grad
    torch.testing.assert_close(got, torch.tensor([[-80.0, 80.0, 0.0]]).exp())
    summed = rollout_weights(old[:, ::2], sampling[:, ::2], level="sequence", cap=None)
    torch.testing.assert_close(summed, torch.tensor([[math.exp(-80)]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("per_token", [False, True])
def test_off_policy_mask(per_token):
    logps, sampling, mask = batch()
    sampling = sampling + 0.3
    advantages = torch.randn(6, 12, generator=torch.Generator().manual_seed(3))
    advantages[:, 0] = torch.tensor([-1.0, -1.0, -1e-3, -0.5, 0.0, 2.0])
    advantages = advantages.masked_fill(~mask, NAN) if per_token else advantages[:, 0]
    rows = differences(sampling, logps, mask, sampling)
    means = [sum(row) / max(len(row), 1) for row in rows]
    threshold = sum(sorted(means)[2:4]) / 2
    assert threshold > 0
    want = (torch.tensor(means)[:, None] <= threshold) | ~(advantages.view(6, -1) < 0)
    got = off_policy_mask(advantages, logps, sampling, mask, threshold=threshold)
    assert got.dtype == torch.bool and torch.equal(got, want)
    assert got.shape == ((6, 12) if per_token else (6, 1))
    assert 0 < (~got).sum() < got.numel() / 2

    advantages = pack(advantages) if per_token else advantages
    packed = (pack(tensor) for tensor in (logps, sampling, mask))
    packed = off_policy_mask(advantages, *packed, threshold=threshold, cu_seqlens=cu_seqlens())
    assert torch.equal(packed, pack(got) if per_token else got[:, 0])


def test_off_policy_mask_at_the_threshold_and_with_unknown_logps():
    logps = torch.full((3, 4), -1.0, requires_grad=True)
    advantages = torch.tensor([-1.0, 0.0, 1.0])
    nothing = off_policy_mask(advantages, logps, torch.full((3, 4), NAN), threshold=0.0)
    assert nothing.tolist() == [[True]] * 3
    for threshold, keep in ((0.5, [[True]] * 3), (0.49, [[False], [True], [True]])):
        got = off_policy_mask(advantages, logps, logps + 0.5, threshold=threshold)
        assert got.tolist() == keep
        per_token = advantages[:, None].expand(3, 4)
        by_token = off_policy_mask(per_token, logps, logps + 0.5, threshold=threshold)
        assert torch.equal(by_token, got.expand(3, 4))


def quantile_mask(entropies, mask, share):
    active = entropies[mask != 0].float()
    if active.numel() == 0:
        return torch.zeros_like(entropies, dtype=torch.bool)
    return (mask != 0) & (entropies >= torch.quantile(active, 1 - share))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.37, 0.5, 0.999, 1.0, 1])
def test_entropy_quantile_equals_torch(share, dtype):
    """Realistic entropies: mostly near 0, some equal, some -0 or slightly negative."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        entropies = torch.randn(4, 41, generator=generator).mul(4).exp().clamp(max=5).to(dtype)
        entropies[0, :8] = torch.tensor([0.0, -0.0, -1e-7, 0.0, -2e-7, 1e-9, 0.0, 1e-9])
        mask = (torch.rand(4, 41, generator=generator) < 0.7).long()
        want = quantile_mask(entropies, mask, share)
        garbage = entropies.masked_fill(mask == 0, [NAN, math.inf, -1e9, 1e9, -math.inf][seed])
        got = entropy_quantile_mask(garbage, mask, share=share)
        assert torch.equal(got, want)
        assert torch.equal(
            entropy_quantile_mask(garbage.flatten(), mask.flatten(), share=share), got.flatten()
        )
        assert share < 1 or torch.equal(got, mask != 0)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 11])
def test_entropy_quantile_of_few_tokens(count):
    """Quantiles between two tokens, and exactly at one: 0.8 * 10 = 8."""
    entropies = torch.rand(1, count, generator=torch.Generator().manual_seed(count))
    for share in (0.2, 0.3, 0.4, 0.7, 0.9):
        got = entropy_quantile_mask(entropies, share=share)
        assert torch.equal(got, quantile_mask(entropies, torch.ones(1, count), share))
    equal = torch.full((1, count), 0.1)
    assert entropy_quantile_mask(equal, share=0.2).all()


def test_entropy_quantile_of_more_tokens_than_torch_supports():
    """torch.quantile is limited to 2^24 elements. Quantile 0.75 is 12582913.5 here."""
    entropies = torch.arange(2**24 + 3, dtype=torch.int32).flip(0)[None]
    got = entropy_quantile_mask(entropies, share=0.25)
    assert torch.equal(got, entropies >= 12582914)


def test_entropy_quantile_without_active_tokens_and_with_nan():
    for entropies in (
        torch.full((2, 3), NAN),
        torch.zeros(2, 3),
        torch.zeros(2, 0),
        torch.zeros(0),
    ):
        got = entropy_quantile_mask(entropies, torch.zeros_like(entropies), share=0.5)
        assert got.dtype == torch.bool and got.shape == entropies.shape and not got.any()
    broken = torch.tensor([1.0, -NAN, 2.0, 3.0])  # NaN ranks highest
    assert entropy_quantile_mask(broken, share=0.7).tolist() == [False, False, True, True]


@pytest.mark.parametrize("where", ["meta", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_no_synchronisation(where, request):
    """Meta tensors have no values: reading one raises an error."""
    x, advantages = torch.zeros(2, 3, device=where), torch.zeros(2, device=where)
    packed = {"cu_seqlens": torch.zeros(3, dtype=torch.int32, device=where)}
    if where == "cuda":
        request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
        torch.cuda.set_sync_debug_mode("error")
    for level, shape in (("token", (6,)), ("sequence", (2,))):
        rollout_weights(x, x, x, level=level, mode="mask")
        assert rollout_weights(*[x.view(-1)] * 3, level=level, **packed).shape == shape
    assert off_policy_mask(advantages, x, x, x, threshold=0.1).shape == (2, 1)
    assert off_policy_mask(*[x.view(-1)] * 4, threshold=0.1, **packed).shape == (6,)
    assert entropy_quantile_mask(x, x, share=0.2).shape == (2, 3)


@pytest.mark.parametrize("B", [0, 2])
def test_empty_batches(B):
    x, cu = torch.zeros(B, 0), torch.zeros(B + 1, dtype=torch.int32)
    assert rollout_weights(x, x, level="sequence").tolist() == [[1.0]] * B
    assert rollout_weights(x.view(-1), x.view(-1), level="sequence", cu_seqlens=cu).shape == (B,)
    assert off_policy_mask(torch.zeros(B), x, x, threshold=0.1).shape == (B, 1)


def weights(*shape, cu=None, **options):
    cu = None if cu is None else torch.tensor(cu)
    return lambda: rollout_weights(torch.zeros(shape), torch.zeros(2, 3), cu_seqlens=cu, **options)


def packed_weights(cu):
    return lambda: rollout_weights(torch.zeros(4), torch.zeros(4), cu_seqlens=torch.tensor(cu))


def off_policy(*shape, threshold=0.1):
    x = torch.zeros(2, 3)
    return lambda: off_policy_mask(torch.zeros(shape), x, x, threshold=threshold)


def quantile(share=0.2, mask=None, **options):
    return lambda: entropy_quantile_mask(torch.zeros(2, 3), mask, share=share, **options)


BAD = {
    "level": (
        weights(2, 3, level="seq"),
        "level must be one of token, sequence, sequence_mean, got",
    ),
    "mode": (weights(2, 3, mode="clip"), "mode must be one of truncate, mask, got 'clip'"),
    "cap": (weights(2, 3, cap=0), "cap must be a positive number or None, got 0"),
    "2-D": (packed_weights([[0, 4]]), r"cu_seqlens must have shape \(B \+ 1,\)"),
    "floor": (weights(2, 3, floor=3.0), r"floor must be None or in \[0, cap\), got 3.0 with cap 3"),
    "sampling": (weights(2, 4), r"sampling_logps must have shape \(2, 4\) .*got \(2, 3\)"),
    "flat": (weights(6), r"old_logps must have shape \(B, T\), got \(6,\); .* need cu_seqlens"),
    "short": (packed_weights([0, 3]), r"must be nondecreasing from 0 to N = 4, got \[0, 3\]"),
    "decreasing": (packed_weights([0, 3, 2, 4]), r"must be nondecreasing .*got \[0, 3, 2, 4\]"),
    "floats": (packed_weights([0.0, 4.0]), "cu_seqlens must be int32 or int64 on cpu, got torch.f"),
    "advantages": (off_policy(3), r"advantages must have shape \(2,\) or \(2, 3\) on cpu, got \(3"),
    "threshold": (off_policy(2, threshold=-0.1), "threshold must be a number >= 0, got -0.1"),
    "share": (quantile(1.1), r"share must be a number in \[0, 1\], got 1.1"),
    "mask": (quantile(mask=torch.ones(2)), r"mask must have shape \(2, 3\) on cpu, got \(2,\)"),
    "group": (quantile(process_group="gloo"), "process_group must be a ProcessGroup .*got 'gloo'"),
}


@pytest.mark.parametrize("call", BAD)
def test_invalid_arguments(call):
    with pytest.raises(ValueError, match=BAD[call][1]):
        BAD[call][0]()
