"""Statistics of shards merged in one process: the exchange is a concatenation."""

import pytest
import torch
from batches import make_batch, relative_error

from grpo_fused import parallel, support_from_mask
from grpo_fused.bundles import Derivatives, Scales, Statistics, Support, Tokens
from grpo_fused.collectives import Pending
from grpo_fused.ops import BACKENDS

V = 97
CUTS = {"two": (0, 40, V), "uneven": (0, 1, V - 1, V), "one": (0, V)}


def statistics(entropy=True, support=None):
    over_all = (torch.empty(4, 6), torch.empty(4, 6) if entropy else None, *torch.empty(2, 4, 6))
    over_kept = (None,) * 4 if support is None else torch.empty(4, 4, 6)
    return Statistics(*over_all, *over_kept)


def merged(batch, logits, cuts, scales, implementation, monkeypatch, entropy=True, support=None):
    """[(columns, their tokens)] of the shards, and the `Statistics` of whole rows."""
    temperature = 0.5 + torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    whole = Tokens(batch.ids, batch.mask != 0, temperature, support=support)
    shards, parts = [], []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        local = statistics(entropy, support)
        tokens = parallel.in_shard(parallel.Shards(None, start, V), whole)
        x = logits[..., start:stop].contiguous()
        BACKENDS[implementation].logprob_fwd(x, tokens, scales, local, True)
        shards.append((x, tokens))
        parts.append(torch.stack([part for part in local if part is not None]))
    gathered = Pending(torch.cat(parts), None)
    monkeypatch.setattr(parallel, "start_gather", lambda tensor, group: gathered)
    exchange = parallel.exchange_statistics(parallel.Shards(None, cuts[0], V), local)
    return shards, parallel.merge(exchange, local, whole, scales, implementation), temperature


def exact(batch, logits, scales, temperature, upstream, kept=None):
    """(log-probabilities, entropies, gradient) in float64, over all columns or the kept ones."""
    active = batch.mask != 0
    x = logits[:, :-1].double().nan_to_num(neginf=-torch.inf).requires_grad_()
    u = x * scales.logit_scale
    if scales.logit_softcap is not None:
        u = scales.logit_softcap * torch.tanh(u / scales.logit_softcap)
    z = u / temperature[..., None]
    # Not -inf, whose entropy has a gradient of NaN.
    log_p = (z if kept is None else z.masked_fill(~kept, -1e9)).log_softmax(-1)
    logps = log_p.gather(-1, batch.ids.clamp(min=0)[..., None])[..., 0]
    entropies = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(-1)
    pair = [torch.where(active, values, 0.0) for values in (logps, entropies)]
    (gradient,) = torch.autograd.grad(
        sum((v * u).sum() for v, u in zip(pair, upstream, strict=True)), x
    )
    return *pair, gradient


@pytest.mark.parametrize(
    ("scales", "shift"),
    [(Scales(), 0.0), (Scales(), 3000.0), (Scales(0.8, 5.0), 0.0)],
    ids=["plain", "far", "softcap"],
)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_against_float64(cuts, shift, scales, implementation, monkeypatch):
    """Log-probabilities, entropies and each shard's gradient."""
    batch = make_batch(V=V)
    logits, upstream = batch.logits + shift, torch.randn(2, 4, 6)
    found = merged(batch, logits, cuts, scales, implementation, monkeypatch)
    shards, got, temperature = found
    logps, entropies, gradient = exact(batch, logits, scales, temperature, upstream)
    assert relative_error(got.logps, logps) < 1e-6
    assert relative_error(got.entropies, entropies) < 2e-6
    parts = []
    for x, tokens in shards:
        derivatives = Derivatives(*upstream, torch.empty_like(x))
        BACKENDS[implementation].logprob_bwd(x, tokens, scales, got, derivatives)
        parts.append(derivatives.dlogits)
    parts = torch.cat(parts, -1)
    assert not parts[:, -1].any() and not parts[:, :-1][batch.mask == 0].any()
    assert relative_error(parts[:, :-1], gradient.nan_to_num()) < 4e-6


def test_no_probability_is_above_1(implementation, monkeypatch):
    """Where the target takes all of it, rounding would: by 5.6e-8 in the kernels."""
    for seed in (1, 2, 4, 5):
        batch = make_batch(V=V, seed=seed)
        logits = batch.logits + (3000.0 if seed % 2 else 0.0)
        target = torch.arange(V) == batch.ids.clamp(min=0)[..., None]
        logits[:, :-1] += 40.0 * target
        arguments = (batch, logits, CUTS["uneven"], Scales(), implementation, monkeypatch)
        _, got, _ = merged(*arguments)
        logps = got.logps[batch.mask != 0]
        assert (logps <= 0.0).all() and (logps > -1e-6).all()


def test_columns_that_are_all_masked(implementation, monkeypatch):
    """A shard of -inf, of -1e30, and rows whose target alone is finite."""
    batch = make_batch(V=V)
    logits = batch.logits.clone()
    logits[0, :, :40] = -torch.inf
    logits[2, :, 40:] = -1e30
    batch.ids[0], batch.ids[2] = 60, 3
    logits[0, 0] = -torch.inf
    logits[0, 0, 60] = 1.0
    _, got, temperature = merged(batch, logits, CUTS["two"], Scales(), implementation, monkeypatch)
    logps, entropies, _ = exact(batch, logits, Scales(), temperature, torch.ones(2, 4, 6))
    assert relative_error(got.logps, logps) < 1e-6
    assert relative_error(got.entropies, entropies) < 2e-6
    assert got.logps[0, 0] == 0.0 and got.entropies[0, 0] == 0.0


def test_targets_that_no_shard_has(implementation, monkeypatch):
    """An error on a CPU, NaN where values are not read; under the mask any id will do."""
    batch = make_batch(V=V)
    batch.ids[1, 0] = V
    arguments = (batch, batch.logits, CUTS["two"], Scales(), implementation, monkeypatch)
    with pytest.raises(ValueError, match="1 active ids"):
        merged(*arguments)
    monkeypatch.setattr("grpo_fused.checks.is_readable", lambda device: False)
    _, got, _ = merged(*arguments, entropy=False)
    assert got.entropies is None
    assert got.logps.isnan().nonzero().tolist() == [[1, 0]]


def some_kept(batch):
    """(which columns are kept (4, 6, V), their `Support`), the target among them."""
    kept = torch.rand(4, 6, V, generator=torch.Generator().manual_seed(2)) < 0.1
    kept = kept.scatter(2, batch.ids.clamp(min=0)[..., None], True)
    offsets, ids = support_from_mask(kept)
    return kept, Support(offsets[:-1].view(4, 6), offsets[1:].clone().view(4, 6), ids)


@pytest.mark.parametrize(
    ("cuts", "scales"), [("two", Scales()), ("uneven", Scales(0.8, 5.0))], ids=["two", "softcap"]
)
def test_over_a_support(cuts, scales, implementation, monkeypatch):
    """Of which most shards have a part; against float64, with the gradients over both softmaxes."""
    batch, upstream = make_batch(V=V), torch.randn(2, 2, 4, 6)
    kept, support = some_kept(batch)
    arguments = (batch, batch.logits, CUTS[cuts], scales, implementation, monkeypatch)
    shards, got, temperature = merged(*arguments, support=support)
    inputs = (batch, batch.logits, scales, temperature)
    *over_all, gradient = exact(*inputs, upstream[0])
    *over_kept, more = exact(*inputs, upstream[1], kept)
    for found, want in zip((*got[:2], *got[4:6]), (*over_all, *over_kept), strict=True):
        assert relative_error(found, want) < 2e-6
    parts = []
    for x, tokens in shards:
        derivatives = Derivatives(*upstream[0], torch.empty_like(x), *upstream[1])
        BACKENDS[implementation].logprob_bwd(x, tokens, scales, got, derivatives)
        parts.append(derivatives.dlogits[:, :-1])
    want = (gradient + more).nan_to_num()
    assert relative_error(torch.cat(parts, -1), want) < 4e-6


def test_targets_that_no_shard_has_kept(implementation, monkeypatch):
    """As without a support: an error on a CPU, else NaN."""
    batch = make_batch(V=V)
    _, support = some_kept(batch)
    support.stops[0, 2] = support.starts[0, 2]
    arguments = (batch, batch.logits, CUTS["two"], Scales(), implementation, monkeypatch)
    with pytest.raises(ValueError, match="1 active ids lie in the support of no rank"):
        merged(*arguments, support=support)
    monkeypatch.setattr("grpo_fused.checks.is_readable", lambda device: False)
    _, got, _ = merged(*arguments, support=support)
    assert got.kept_logps.isnan().nonzero().tolist() == [[0, 2]] and not got.logps.isnan().any()
