"""The softmax over the tokens that the sampler kept: `support`."""

from itertools import product

import pytest
import torch
from batches import make_batch, relative_error
from heads import chunk_bytes, make_head_batch
from packing import cu_seqlens, pack
from supports import EVERYWHERE, kept_mask, loss_of

import oracle
from grpo_fused import (
    grpo_loss,
    grpo_loss_from_logps,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
    support_from_mask,
)

# The interpreter truncates to bfloat16 where a GPU rounds.
GRADIENT_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def shuffled(support):
    """The same support with the ids of every row in another order, in other dtypes."""
    offsets, ids = (t.tolist() for t in support)
    generator = torch.Generator().manual_seed(0)
    found = []
    for start, stop in zip(offsets, offsets[1:], strict=False):
        row = torch.tensor(ids[start:stop], dtype=torch.int64)
        found.append(row[torch.randperm(len(row), generator=generator)])
    return support[0].int(), torch.cat(found).to(support[1].device)


@pytest.mark.parametrize(
    ("V", "dtype"), [(97, torch.bfloat16), (300, torch.float32), (300, torch.float16)]
)
@pytest.mark.parametrize("inplace", [False, True])
def test_every_choice_of_softmaxes(V, dtype, inplace, implementation, device):
    """Against float64, the gradient within what rounding it costs."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]])
    batch = make_batch(B=2, T=4, V=V, dtype=dtype, mask=mask, per_token=True, device=device)
    kept = kept_mask(batch)
    support = support_from_mask(kept.to(device))
    common = dict(loss_type="grpo", beta=0.1, entropy_coef=0.01, logit_softcap=9.0)
    upstream = 2.0**10 if dtype == torch.float16 else 1.0
    cpu = [t.cpu() for t in (batch.logits, batch.ids, batch.mask, batch.advantages)]
    given = dict(old_logps=batch.old_logps.cpu(), ref_logps=batch.ref_logps.cpu())
    choices = list(product(["support", "vocabulary"], repeat=3))
    for softmaxes in choices if implementation == "torch" else choices[:1] + choices[2:5]:
        over = dict(zip(EVERYWHERE, softmaxes, strict=True))
        out, gradient = loss_of(
            batch,
            implementation,
            upstream,
            support=support,
            inplace=inplace,
            **common | over,
        )
        truth = oracle.grpo_loss(*cpu, kept=kept, **common, **given, **over)
        assert out.loss.item() == pytest.approx(truth.loss, rel=2e-5, abs=1e-6)
        assert relative_error(out.logps, truth.logps) < 1e-6
        assert relative_error(out.entropies, truth.entropies) < 3e-6
        for name, value in truth.metrics.items():
            assert out.metrics[name].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name
        want = truth.dlogits * upstream
        assert relative_error(gradient, want) < GRADIENT_TOLERANCE[dtype]


def test_outside_of_the_support_nothing_is_read_and_the_gradient_is_0(implementation, device):
    """Where no term is over the vocabulary: NaN there changes nothing."""
    batch = make_batch(V=1001, device=device)
    kept = kept_mask(batch).to(device)
    support = support_from_mask(kept)
    out, gradient = loss_of(batch, implementation, support=support, **EVERYWHERE)
    rows = torch.zeros_like(batch.logits, dtype=torch.bool)
    rows[:, :-1] = kept & (batch.mask != 0)[..., None]
    assert (gradient[~rows] == 0).all() and (gradient[rows] != 0).any()
    batch.logits = batch.logits.masked_fill(~rows, torch.nan)
    again, same = loss_of(batch, implementation, support=support, **EVERYWHERE)
    assert torch.equal(again.loss, out.loss) and torch.equal(same, gradient)
    batch.logits[0, 0, batch.ids[0, 0]] = torch.nan
    broken, wrong = loss_of(batch, implementation, support=support, **EVERYWHERE)
    assert broken.loss.isnan() and wrong[0, 0].isnan().all()
    assert torch.equal(wrong[1:], gradient[1:]) and torch.equal(wrong[0, 1:], gradient[0, 1:])


@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
def test_only_a_term_over_the_vocabulary_reads_the_row(loss_type, implementation, monkeypatch):
    """A NaN that is read and dropped would leave the numbers as they are; reading is what costs."""
    if implementation == "triton" and torch.cuda.is_available():
        pytest.skip("compiled kernels call no Python")
    batch = make_batch(V=300)
    support = support_from_mask(kept_mask(batch))
    modules = {"torch": ["torch_backend.launchers"], "triton": ["kernels.fused_loss"]}
    modules["triton"].append("kernels.logprob")
    name = {"torch": "softmax_statistics", "triton": "row_statistics"}[implementation]

    def refuse(*arguments):
        raise AssertionError("the row is read")

    for module in modules[implementation]:
        monkeypatch.setattr(f"grpo_fused.{module}.{name}", refuse)
    options = {"loss_type": loss_type, "support": support}
    none = {"beta": 0.0, "ref_logps": None}
    for quiet in (EVERYWHERE, none, none | {"entropy_coef": 0.0, "compute_entropy": False}):
        loss_of(batch, implementation, **options | quiet)
    plain = {"entropy_coef": 0.0, "compute_entropy": False, **none, "entropy_over": "vocabulary"}
    assert loss_of(batch, implementation, **options | plain)[0].entropies is None
    quiet = plain | {"entropy_over": "support"}
    assert loss_of(batch, implementation, **options | quiet)[0].entropies is None
    for reads in ({}, EVERYWHERE | {"entropy_over": "vocabulary"}, {"policy_over": "vocabulary"}):
        with pytest.raises(Exception, match="the row is read"):
            loss_of(batch, implementation, **options | reads)


def test_a_kl_over_the_vocabulary_keeps_its_gradient(implementation, device):
    """The sum of the gradients of the two: of the policy in the support, of the KL all over."""
    batch = make_batch(device=device)
    kept = kept_mask(batch).to(device)
    support = support_from_mask(kept)
    both = loss_of(batch, implementation, support=support)[1]
    policy = loss_of(batch, implementation, support=support, beta=0.0)[1]
    nothing = torch.zeros_like(batch.advantages)
    alone = {"entropy_coef": 0.0, "support": support, "policy_over": "vocabulary"}
    batch.advantages = nothing
    kl = loss_of(batch, implementation, **alone)[1]
    active = (batch.mask != 0)[..., None] & ~kept
    assert (kl[:, :-1][active] != 0).all()
    assert torch.equal(both[:, :-1][active], kl[:, :-1][active])
    assert relative_error(both, policy + kl) < 1e-6


def test_kept_columns_without_a_probability_change_nothing(implementation, device):
    """Logits of -inf in the support: the same loss as without them, and their gradient is 0."""
    batch = make_batch(device=device)
    kept = kept_mask(batch).to(device)
    impossible = kept.clone().scatter_(2, batch.ids.clamp(min=0)[..., None], False)
    impossible[..., ::2] = False
    batch.logits[:, :-1] = batch.logits[:, :-1].masked_fill(impossible, -torch.inf)
    for over in ({}, EVERYWHERE):
        supports = [support_from_mask(k) for k in (kept & ~impossible, kept)]
        (out, gradient), (found, same) = (
            loss_of(batch, implementation, support=support, **over) for support in supports
        )
        assert relative_error(found.loss, out.loss) < 1e-6 and out.loss.isfinite()
        assert relative_error(same, gradient) < 1e-6 and (same[:, :-1][impossible] == 0).all()


def test_the_only_token_that_was_kept_is_certain(implementation, device):
    """Even with a logit below all that count: rounding lifts no log-probability above 0."""
    logits = torch.tensor([[[1.0, -1e30, 0.5]]], device=device)
    ids = torch.ones(1, 1, dtype=torch.int64, device=device)
    support = (torch.tensor([0, 1], device=device), ids.flatten())
    logps, _ = selective_log_softmax(logits, ids, support=support, implementation=implementation)
    assert logps.item() == 0.0


def test_a_whole_support_is_no_support(implementation, device):
    batch = make_batch(device=device)
    kept = torch.ones(*batch.ids.shape, 97, dtype=torch.bool, device=device)
    for options in ({}, EVERYWHERE, {"loss_type": "gspo"}, {"use_bias_correction_kl": True}):
        plain = {name: value for name, value in options.items() if name not in EVERYWHERE}
        out, gradient = loss_of(batch, implementation, **plain)
        found, same = loss_of(batch, implementation, support=support_from_mask(kept), **options)
        assert relative_error(found.loss, out.loss) < 1e-6
        assert relative_error(same, gradient) < 1e-6
        assert relative_error(found.logps, out.logps) < 1e-6


def test_ids_come_in_any_order_and_integer_type(implementation, device):
    batch = make_batch(V=300, device=device)
    support = support_from_mask(kept_mask(batch).to(device))
    out, gradient = loss_of(batch, implementation, support=support)
    found, same = loss_of(batch, implementation, support=shuffled(support))
    assert relative_error(found.loss, out.loss) < 1e-6 and relative_error(same, gradient) < 1e-6


def test_rows_of_masked_tokens_mean_nothing(implementation, device):
    """They may be empty, or hold ids that do not exist."""
    batch = make_batch(device=device)
    kept, hidden = kept_mask(batch).to(device), (batch.mask == 0)[..., None]
    out, gradient = loss_of(batch, implementation, support=support_from_mask(kept))
    offsets, ids = support_from_mask(kept | hidden)
    rows = torch.repeat_interleave(offsets.diff())
    ids[hidden.flatten()[rows]] = -100
    for support in (support_from_mask(kept & ~hidden), (offsets, ids)):
        found, same = loss_of(batch, implementation, support=support)
        assert torch.equal(found.loss, out.loss) and torch.equal(same, gradient)


@pytest.mark.parametrize(
    ("entropy_over", "inplace"),
    [
        ("support", True),
        ("vocabulary", False),
        pytest.param("support", False, marks=pytest.mark.slow),
        pytest.param("vocabulary", True, marks=pytest.mark.slow),
    ],
)
def test_log_probabilities_with_any_upstream_gradient(
    entropy_over, inplace, implementation, device
):
    """Over the support, over the vocabulary, and entropies; also of each alone."""
    batch = make_batch(V=300, device=device)
    kept = kept_mask(batch)
    support, generator = support_from_mask(kept.to(device)), torch.Generator().manual_seed(1)
    upstream = torch.randn(3, *batch.ids.shape, generator=generator).masked_fill(
        batch.mask.cpu() == 0, torch.nan
    )
    inputs = [t.cpu() for t in (batch.logits, batch.ids, batch.mask)]
    for used in ([1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]):
        leaf = batch.leaf()
        results = selective_log_softmax(
            *(leaf * 1.0, batch.ids, batch.mask),
            support=support,
            entropy_over=entropy_over,
            compute_entropy=True,
            return_vocabulary_logps=True,
            inplace=inplace,
            implementation=implementation,
        )
        wanted = [
            (r, u.to(device)) for r, u, use in zip(results, upstream, used, strict=True) if use
        ]
        torch.autograd.backward(*zip(*wanted, strict=True))
        given = [u if use else None for u, use in zip(upstream, used, strict=True)]
        if entropy_over == "support":
            truth = oracle.selective_log_softmax(
                *inputs, kept=kept, dlogps=given[0], dentropies=given[1], dvocabulary_logps=given[2]
            )
            gradient, entropies = truth[2], truth[1]
        else:
            over_all = oracle.selective_log_softmax(*inputs, dlogps=given[2], dentropies=given[1])
            truth = oracle.selective_log_softmax(*inputs, kept=kept, dlogps=given[0])
            gradient, entropies = truth[2] + over_all[2], over_all[1]
        assert relative_error(results[0], truth[0]) < 1e-6
        assert relative_error(results[1], entropies) < 3e-6
        assert relative_error(results[2], oracle.selective_log_softmax(*inputs)[0]) < 1e-6
        assert relative_error(leaf.grad, gradient) < 2e-6


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "gmpo"])
def test_over_a_head(loss_type, rows, implementation, device):
    """In chunks, in any order of the tokens, the gradients of hidden states, weight and bias."""
    head = make_head_batch(device=device)
    b, support = head.batch, support_from_mask(kept_mask(head.batch).to(device))
    options = dict(loss_type=loss_type, old_logps=b.old_logps, ref_logps=b.ref_logps, beta=0.1)
    options |= dict(support=support, entropy_coef=0.01, implementation=implementation)
    inputs = (b.ids, b.mask, b.advantages)

    def run(function):
        leaves = head.leaves()
        out = function(*leaves)
        out.loss.backward()
        return [out.loss, out.logps, *(leaf.grad for leaf in leaves)]

    found = run(
        lambda h, w, bias: linear_grpo_loss(
            *(h, w, *inputs), bias=bias, chunk_bytes=chunk_bytes(rows), **options
        )
    )

    def over_logits(h, w, bias):
        masked = torch.cat([b.mask == 0, torch.ones_like(b.mask[:, :1]) != 0], 1)[..., None]
        logits = torch.nn.functional.linear(h.masked_fill(masked, 0.0), w, bias)
        return grpo_loss(logits, *inputs, **options)

    want = run(over_logits)
    want[2] = want[2].nan_to_num()  # masked hidden states are NaN, and have no gradient
    for a, b in zip(found, want, strict=True):
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("save_logits", [False, True])
def test_log_probabilities_over_a_head(save_logits, implementation, device):
    head = make_head_batch(device=device)
    b, support = head.batch, support_from_mask(kept_mask(head.batch).to(device))
    options = dict(support=support, compute_entropy=True, return_vocabulary_logps=True)
    options |= dict(implementation=implementation)
    leaves = head.leaves()
    logps, entropies, over_all = linear_selective_log_softmax(
        *(*leaves[:2], b.ids, b.mask),
        bias=leaves[2],
        chunk_bytes=chunk_bytes(5),
        save_logits=save_logits,
        **options,
    )
    (2 * logps - 0.1 * entropies + 3 * over_all).sum().backward()
    logits = b.logits.float().to(device).requires_grad_()
    want = selective_log_softmax(logits, b.ids, b.mask, **options)
    (2 * want[0] - 0.1 * want[1] + 3 * want[2]).sum().backward()
    for got, expected in zip((logps, entropies, over_all), want, strict=True):
        assert relative_error(got, expected) < 2e-6
    dlogits = logits.grad.double().cpu()
    assert relative_error(leaves[1].grad.cpu(), dlogits.flatten(0, 1).T @ states(head)) < 2e-6


def states(head):
    return head.hidden.double().cpu().nan_to_num().flatten(0, 1)


def test_behind_our_own_log_probabilities_it_is_grpo_loss(implementation, device):
    """`grpo_loss_from_logps` with kl_logps, the policy's over the vocabulary."""
    batch = make_batch(device=device)
    support = support_from_mask(kept_mask(batch).to(device))
    for more in ({}, {"use_bias_correction_kl": True}, {"loss_type": "gspo"}):
        out, gradient = loss_of(batch, implementation, support=support, **more)
        leaf = batch.leaf()
        logps, entropies, over_all = selective_log_softmax(
            *(leaf, batch.ids, batch.mask),
            support=support,
            compute_entropy=True,
            return_vocabulary_logps=True,
            implementation=implementation,
        )
        found = grpo_loss_from_logps(
            *(logps, batch.mask, batch.advantages),
            entropies=entropies,
            kl_logps=over_all,
            old_logps=batch.old_logps,
            ref_logps=batch.ref_logps,
            **{"loss_type": "grpo", "beta": 0.1, "entropy_coef": 0.01} | more,
        )
        found.loss.backward()
        assert relative_error(found.loss, out.loss) < 1e-6
        assert relative_error(leaf.grad, gradient) < 2e-6
        for name, value in out.metrics.items():
            assert found.metrics[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_packed_sequences(implementation, device):
    batch = make_batch(extra=0, device=device)
    lengths, kept = batch.mask.sum(1).tolist(), kept_mask(batch).to(device)
    out, gradient = loss_of(batch, implementation, support=support_from_mask(kept))
    names = ("logits", "ids", "mask", "old_logps", "ref_logps")
    tensors = dict(zip(names, pack(lengths, *(getattr(batch, n) for n in names)), strict=True))
    packed = type(batch)(**tensors, advantages=batch.advantages, sampling_logps=None)
    (rows,) = pack(lengths, kept)
    more = {"cu_seqlens": cu_seqlens(lengths, device), "support": support_from_mask(rows)}
    found, same = loss_of(packed, implementation, **more)
    assert relative_error(found.loss, out.loss) < 1e-6
    assert relative_error(same, pack(lengths, gradient)[0]) < 1e-6


@pytest.mark.parametrize("loss_type", ["grpo", pytest.param("gspo", marks=pytest.mark.slow)])
def test_compiled(loss_type, implementation, device):
    batch = make_batch(B=2, T=3, V=20, device=device)
    support = support_from_mask(kept_mask(batch).to(device))

    def loss(logits):
        return grpo_loss(
            *(logits, batch.ids, batch.mask, batch.advantages),
            **dict(loss_type=loss_type, support=support, implementation=implementation),
            **dict(old_logps=batch.old_logps, ref_logps=batch.ref_logps, beta=0.1),
        ).loss

    torch.compiler.reset()
    eager, compiled = batch.leaf(), batch.leaf()
    loss(eager).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(compiled).backward()
    assert torch.equal(compiled.grad, eager.grad)


def test_an_impossible_target_has_no_nan_in_its_gradient(implementation, device):
    """Its KL is infinite, its ratio e^-80 with a derivative of 0: not inf * 0 in either path."""
    batch = make_batch(B=2, T=3, V=20, mask=torch.ones(2, 3), per_token=True, device=device)
    batch.logits[0, 1, batch.ids[0, 1]] = -torch.inf
    support = support_from_mask(kept_mask(batch, 0.5).to(device))
    options = {"support": support, "use_bias_correction_kl": True, "entropy_coef": 0.0}
    for estimator in ("k1", "k3"):
        out, gradient = loss_of(batch, implementation, kl_estimator=estimator, **options)
        leaf = batch.leaf()
        each = grpo_loss(
            *(leaf * 1.0, batch.ids, batch.mask, batch.advantages),
            **dict(loss_type="grpo", old_logps=batch.old_logps, ref_logps=batch.ref_logps),
            **options | {"beta": 0.1, "kl_estimator": estimator, "reduction": "none"},
            implementation=implementation,
        )
        each.loss.backward(torch.full_like(each.loss, 1 / 6))
        assert not gradient[:, :-1].isnan().any() and not leaf.grad.isnan().any()
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-7)
