"""Every option with every other, drawn at random, over ranks against one process: for `ranks`.

Every rank draws the same cases. `GRPO_FUSED_CASES=500` draws so many.
"""

import os
import traceback

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from random_cases import COMMON, ROWS, T, call, cases, size_of_terms

CASES = int(os.environ.get("GRPO_FUSED_CASES", 30))
# Shrinking a case would take all ranks.
SETTINGS = {"derandomize": True, "database": None, "phases": [Phase.generate], **COMMON}


def check_random_cases(rank):
    @given(case=cases(), rows=ROWS, cut=st.integers(0, 2**16), over=st.booleans())
    @settings(max_examples=CASES, **SETTINGS)
    def check(case, rows, cut, over):
        generator = torch.Generator().manual_seed(cut)
        upstream = torch.randn(case[0].mask.shape, generator=generator)
        whole = call(*case, "torch", "cpu", upstream, rows)
        compare = over_vocabulary if over or case[1] is not None else over_sequences
        try:
            compare(rank, case, rows, upstream, generator, *whole)
        except Exception:  # run again, as hypothesis would, it would wait for the other ranks
            print(f"{compare.__name__} of {rows=}, {case}\n{traceback.format_exc()}", flush=True)
            os._exit(1)

    check()


def compare_gradients(got, want, weights, case):
    error = (got - want).double().norm()
    assert error <= 6e-6 * (want.double().norm() + 0.5 * weights.norm()), (error, case)


def compare_losses(got, want, weights, case):
    got, want = got.detach().double(), want.detach().double()
    size = want.abs() + 5 * (weights.abs() if want.dim() else weights.abs().sum())
    assert ((got - want).abs() <= 4e-6 * size).all(), case


def over_vocabulary(rank, case, rows, upstream, generator, out, gradient):
    """Columns cut anywhere, into shards of at least one column."""
    batch, lengths, options = case
    V, weights = batch.logits.shape[-1], size_of_terms(batch, options, upstream)
    cuts = torch.randperm(V - 1, generator=generator)[: rank.size - 1].sort().values + 1
    bounds = [0, *cuts.tolist(), V]
    columns = slice(*bounds[rank.rank : rank.rank + 2])
    options = options | {"vocab_parallel_group": rank.group}
    if V % 2:
        options["vocab_start"] = columns.start
    found, part = call(batch, lengths, options, "torch", "cpu", upstream, rows, columns)
    # Of a head, the gradient of hidden states is summed over all columns.
    own = columns if rows is None else slice(None)
    compare_gradients(part[..., own], gradient[..., own], weights, case)
    compare_losses(found.loss, out.loss, weights, case)
    torch.testing.assert_close(found.logps, out.logps, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(found.entropies, out.entropies, rtol=3e-6, atol=3e-6)
    for name, value in out.metrics.items():
        torch.testing.assert_close(found.metrics[name], value, rtol=1e-5, atol=1e-6)
    rank.assert_same_bits(found.loss, found.sums)


def over_sequences(rank, case, rows, upstream, generator, out, gradient):
    """Tokens dealt out to the ranks in any order; some ranks may have none."""
    batch, _, options = case
    if not options["objective"].over_ranks:
        return
    owner = torch.randint(rank.size, (T,), generator=generator)
    owner[0] = rank.size - 1
    places = (owner == rank.rank).nonzero()[:, 0]
    weights = size_of_terms(batch, options, upstream)
    mine = type(batch)(**{n: _of_places(v, places) for n, v in vars(batch).items()})
    here = {n: _of_places(v, places) for n, v in options.items()}
    here["sequence_group"] = rank.group
    found, part = call(mine, None, here, "torch", "cpu", upstream[:, places], rows)
    compare_gradients(part[:, : len(places)], gradient[:, places], weights, case)
    loss = rank.sum(found.loss) if out.loss.dim() == 0 else found.loss
    want = out.loss if out.loss.dim() == 0 else out.loss[:, places]
    compare_losses(loss, want, weights if out.loss.dim() == 0 else weights[:, places], case)
    torch.testing.assert_close(rank.sum(found.sums), out.sums, rtol=1e-5, atol=1e-4)


def _of_places(values, places):
    per_token = isinstance(values, torch.Tensor) and values.dim() > 1 and values.shape[1] >= T
    return values[:, places] if per_token else values
