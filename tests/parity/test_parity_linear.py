"""linear_selective_log_softmax against ChunkedLogProbFunction of TRL 1.16, and its known bugs."""

import copy
from importlib.util import find_spec
from itertools import cycle

import pytest
import torch
from batches import make_batch, relative_error
from linear_peers import ROW_BYTES, Case, errors, exact_logps, trl_logps, with_head

from grpo_fused import linear_selective_log_softmax

pytestmark = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")

TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"logit_softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "all": {"temperature": 1.5, "logit_softcap": 4.0, "logit_scale": 1.7},
}


def make_tokens(V, *, H=16, bias=True, dtype=torch.float32, device="cpu", seed=0):
    """Make (Case of 4 x 6 tokens, upstream gradients of log-probabilities and entropies)."""
    case = with_head(make_batch(4, 6, V, seed=seed), H, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    hidden = 2 * torch.randn(case.hidden.shape, generator=generator)
    case = Case(case.batch, hidden, *case[2:])
    upstream = torch.randn(2, 4, 6, generator=generator)
    batch = type(case.batch)(*(tensor.to(device) for tensor in vars(case.batch).values()))
    head = (None if t is None else t.to(device, dtype) for t in case[1:])
    return Case(batch, *head), upstream.to(device)


def differentiate(function, case, upstream, *, fill=torch.nan, entropy=True, **options):
    """Run function(hidden, weight, ids, mask): (logps, entropies, {name: gradient})."""
    batch, (hidden, weight, bias) = case.batch, case.leaves(fill)
    logps, entropies = function(hidden, weight, batch.ids, batch.mask, bias=bias, **options)
    total = (upstream[0] * logps)[batch.mask != 0].sum()
    if entropy:
        total = total + (upstream[1] * entropies)[batch.mask != 0].sum()
    total.backward()
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    return logps, entropies, {name: t.grad for name, t in leaves.items() if t is not None}


def ours(case, upstream, entropy=True, **options):
    options |= {"entropy": entropy, "compute_entropy": entropy}
    return differentiate(linear_selective_log_softmax, case, upstream, **options)


def theirs(case, upstream, entropy=True, **options):
    options |= {"entropy": entropy, "compute_entropy": entropy, "fill": 0.0}
    return differentiate(trl_logps, case, upstream, **options)


def exact(case, upstream, **options):
    return differentiate(exact_logps, case, upstream, fill=0.0, **options)


def assert_logps_agree(got, want, ids, value=2e-6, gradient=5e-6):
    for name, g, w in zip(("logps", "entropies"), got, want, strict=False):
        if g is not None:
            assert relative_error(g, w) < value, name
    for name, error in errors(got[2], want[2], ids).items():
        assert error < gradient, f"gradient of {name}: relative error {error:.2e}"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("V", [17, 37, 257, 2049])
def test_log_probabilities_agree_with_trl(V, bias, device):
    """All transforms, once without entropy; our chunks are rows, TRL's are columns."""
    case, upstream = make_tokens(V, bias=bias, device=device)
    chunks = zip(cycle((V // 7, V // 2 + 1, V, 2 * V)), cycle((None, 1, 20 * (V + 8))), strict=True)
    for (name, options), (columns, chunk_bytes) in zip(TRANSFORMS.items(), chunks, strict=False):
        options = options | {"entropy": name != "scale"}
        got = ours(case, upstream, chunk_bytes=chunk_bytes, **options)
        peer = theirs(case, upstream, chunk_size=columns, **options)
        for want in (peer, exact(case, upstream, **options)):
            assert_logps_agree(got, want, case.batch.ids)


def test_the_kernels_agree_with_trl(device):
    case, upstream = make_tokens(37, device=device)
    options = TRANSFORMS["all"]
    got = ours(case, upstream, chunk_bytes=5 * ROW_BYTES, implementation="triton", **options)
    assert_logps_agree(got, theirs(case, upstream, chunk_size=8, **options), case.batch.ids)


def test_bfloat16_agrees_with_trl(device):
    """Both round the logits and their gradient once and accumulate in float32, in any chunks."""
    case, upstream = make_tokens(257, bias=False, dtype=torch.bfloat16, device=device)
    # Exact products and sums: logits are rounded once, whatever the order of a matmul.
    hidden, weight = ((16 * t).round() / 16 for t in case[1:3])
    case = case._replace(hidden=hidden, weight=weight)
    truth = exact(case, upstream, logits_dtype=torch.bfloat16)
    for columns, chunk_bytes in ((257, None), (16, 1)):
        rounded = {"logits_dtype": torch.bfloat16}
        got = ours(case, upstream, chunk_bytes=chunk_bytes, **rounded)
        peer = theirs(case, upstream, chunk_size=columns)
        for results in (got, peer):
            assert_logps_agree(results, truth, case.batch.ids, gradient=5e-3)


def test_bfloat16_bias_is_rounded_twice(device):
    """TRL rounds h W^T and then its sum with the bias, so logits and gradients lose accuracy.

    Ours rounds once, after a matmul that includes the bias.
    """
    case, upstream = make_tokens(257, dtype=torch.bfloat16, device=device)
    truth = exact(case, upstream, logits_dtype=torch.bfloat16)
    got = ours(case, upstream, logits_dtype=torch.bfloat16)
    assert_logps_agree(got, truth, case.batch.ids, gradient=8e-3)
    peer = theirs(case, upstream)
    assert relative_error(peer[0], truth[0]) > 1e-3
    assert errors(peer[2], truth[2], case.batch.ids)["weight, others"] > 1e-2


@pytest.mark.parametrize("columns", [8, 37], ids=["leading tile", "one tile"])
def test_forbidden_columns(columns, device):
    """With a bias of -inf, ours gives the results of the head without those rows.

    TRL: 0 * -inf = NaN in the entropy, and exp(-inf - -inf) = NaN everywhere if a leading tile is
    all -inf.
    """
    case, upstream = make_tokens(37, device=device)
    case.batch.ids[case.batch.mask != 0] = case.batch.ids[case.batch.mask != 0].clamp(min=8)
    case.bias[:8] = -torch.inf
    peer = theirs(case, upstream, chunk_size=columns)
    assert peer[1].isnan().any() and peer[2]["weight"].isnan().any()
    assert peer[0].isnan().any() == (columns == 8)
    _, _, gradients = got = ours(case, upstream)
    assert (gradients["weight"][:8] == 0).all() and (gradients["bias"][:8] == 0).all()
    tail = Case(copy.copy(case.batch), case.hidden, case.weight[8:], case.bias[8:])
    tail.batch.ids = case.batch.ids - 8
    cut = {name: g if name == "hidden" else g[8:] for name, g in gradients.items()}
    want = ours(tail, upstream)
    assert_logps_agree((*got[:2], cut), want, tail.batch.ids)


def test_large_logits(device):
    """With 1000 added to every logit, TRL's log sum(e) - sum(e x) / sum(e) loses three digits.

    Ours subtracts the maximum first.
    """
    case, upstream = make_tokens(257, device=device)
    case.bias.add_(1000.0)
    truth = exact(case, upstream, logits_dtype=torch.float32)
    got, peer = ours(case, upstream), theirs(case, upstream, chunk_size=64)
    for g, p, want in zip(got[:2], peer[:2], truth[:2], strict=True):
        assert (g - want).abs().max() < 5e-6 < 2e-5 < (p - want).abs().max()


def test_ids_outside(device):
    """TRL finds no column for id V and uses 0 as its logit; ours raises."""
    case, upstream = make_tokens(37, device=device)
    case.batch.ids[0, 0] = 37
    assert theirs(case, upstream)[0][0, 0].isfinite()
    if device == "cpu":  # a check would synchronise with the device
        with pytest.raises(ValueError, match="ids must lie in"):
            ours(case, upstream)
