"""Where supports come from, and what becomes of wrong ones."""

import pytest
import torch
from batches import make_batch
from supports import EVERYWHERE, kept_mask, loss_of

from grpo_fused import (
    checks,
    grpo_loss,
    rollout_weights,
    sampling_support,
    selective_log_softmax,
    support_from_mask,
)
from grpo_fused.bundles import (
    Derivatives,
    Formula,
    Outputs,
    OverSupport,
    Scales,
    Statistics,
    Support,
    Tokens,
)
from grpo_fused.losses.objectives import Clip
from grpo_fused.ops import BACKENDS


def test_without_a_change_of_the_policy_rollout_weights_are_1(device):
    """Seen with TRL at top_p = 0.8: mean weight 0.90, smallest 0.81."""
    batch = make_batch(B=2, T=12, mask=torch.ones(2, 12), device=device)
    rows, chosen = batch.logits[:, :-1], {"top_p": 0.8, "temperature": 0.9}
    offsets, ids = support = sampling_support(rows, **chosen)
    sampled = torch.stack(
        [
            kept[torch.randint(len(kept), ())]
            for kept in (ids[a:b] for a, b in zip(offsets, offsets[1:], strict=False))
        ]
    ).view(2, 12)
    x = (rows.double() / 0.9).flatten(0, 1)
    for n, row in enumerate(x):
        mine = row.clone()
        row.fill_(-torch.inf)
        columns = ids[offsets[n] : offsets[n + 1]].long()
        row[columns] = mine[columns]
    sampler = x.log_softmax(1).gather(1, sampled.long().view(-1, 1)).view(2, 12)
    logps, _ = selective_log_softmax(rows, sampled, support=support, temperature=0.9)
    torch.testing.assert_close(rollout_weights(logps, sampler), torch.ones(2, 12, device=device))
    biased, _ = selective_log_softmax(rows, sampled, temperature=0.9)
    weights = rollout_weights(biased, sampler)
    assert weights.mean() < 0.95 and weights.max() < 1


@pytest.mark.parametrize("top_k", [None, 1, 7, 500])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.1, 1.0])
def test_samplers_of_transformers_keep_the_same(top_k, top_p, min_p):
    processors = pytest.importorskip("transformers.generation.logits_process")
    rows = 2.5 * torch.randn(40, 97)
    rows[0] = 0.0  # ties
    scores = rows / 0.7
    for name, value in (("TopK", top_k), ("TopP", top_p), ("MinP", min_p)):
        if value is not None and not (name == "TopP" and value == 1):
            scores = getattr(processors, f"{name}LogitsWarper")(value)(None, scores)
    want = support_from_mask(scores > -torch.inf)
    found = sampling_support(rows, top_k=top_k, top_p=top_p, min_p=min_p, temperature=0.7)
    # Of equal logits any one may reach top_p.
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1][found[0][1] :], want[1][want[0][1] :])


def test_samplers_stop_at_top_p():
    """Where the most likely tokens add up to it exactly, none more is kept; of equal ones any."""
    offsets, ids = sampling_support(torch.zeros(1, 2, 4), top_p=0.5)
    assert offsets.tolist() == [0, 2, 4] and len(ids) == 4


def direct(batch, support, implementation, over):
    """(outputs, gradient) of the launcher itself, whose inputs nobody checks, as on a GPU."""
    B, T = batch.ids.shape
    offsets, ids = support
    tokens = Tokens(
        *(batch.ids.clamp(min=0), batch.mask != 0, 1.0, batch.advantages[:, None].expand(B, T)),
        *(batch.old_logps, batch.ref_logps, 1.0, 0.1),
        support=Support(offsets[:-1].view(B, T), offsets[1:].clone().view(B, T), ids),
    )
    tokens = tokens._replace(advantages=tokens.advantages.contiguous())
    outputs = Outputs(*torch.empty(6, B, T, device=batch.ids.device), batch.logits.clone())
    formula = Formula(Clip().name(), Clip().params(), "k3", False, 1.0, over)
    BACKENDS[implementation].fused_loss(batch.logits, tokens, Scales(), formula, outputs)
    return outputs, tokens


@pytest.mark.parametrize("over", [OverSupport(True, True, True), OverSupport(True, False, True)])
@pytest.mark.parametrize("what", ["target", "id"])
def test_wrong_supports_make_their_rows_nan(what, over, implementation, device):
    """A target that was not kept, or an id outside of the vocabulary: nothing else is touched."""
    batch = make_batch(V=300, extra=0, device=device)
    kept = kept_mask(batch).to(device)
    right, _ = direct(batch, support_from_mask(kept), implementation, over)
    if what == "target":
        kept[0, 1, batch.ids[0, 1]] = False
    support = support_from_mask(kept)
    if what == "id":
        support[1][support[0][2] - 1] = 300  # of row 1
    wrong, tokens = direct(batch, support, implementation, over)
    for name in ("loss", "logps", "dlogits"):
        got, want = getattr(wrong, name), getattr(right, name)
        bad = torch.zeros(got.shape, dtype=torch.bool, device=device)
        bad[0, 1] = True
        if name != "logps" or what == "id":
            assert got[0, 1].isnan().all(), name
        assert torch.equal(got[~bad], want[~bad]), name

    B, T = batch.ids.shape
    statistics = Statistics(*torch.empty(8, B, T, device=device))
    softmax = tokens.of_softmax()
    backend = BACKENDS[implementation]
    backend.logprob_fwd(batch.logits, softmax, Scales(), statistics, False)
    assert statistics.kept_logps[0, 1].isnan() and not statistics.kept_logps[0, 0].isnan()
    ones = torch.ones(B, T, device=device)
    derivatives = Derivatives(None, None, batch.logits.clone(), ones, ones)
    backend.logprob_bwd(batch.logits, softmax, Scales(), statistics, derivatives)
    assert derivatives.dlogits[0, 1].isnan().all() and not derivatives.dlogits[0, 0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_past_the_ids_read_nothing(dtype, implementation, device):
    """Where they are not checked, on a device, they are clamped: out of bounds is not an option."""
    batch = make_batch(device=device)
    offsets, ids = support_from_mask(kept_mask(batch).to(device))
    far = torch.where(torch.arange(len(offsets), device=device) > 3, 10**6, offsets).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "is_readable", lambda device: False)
        out, _ = loss_of(batch, implementation, support=(far, ids))
        assert out.loss.isnan()
        right, _ = loss_of(batch, implementation, support=(offsets, ids))
        offsets[0] = -64
        out, _ = loss_of(batch, implementation, support=(offsets.to(dtype), ids))
        assert torch.equal(out.loss, right.loss)
        offsets[3] = 0  # falling: the row is empty
        out, _ = loss_of(batch, implementation, support=(offsets.to(dtype), ids))
        assert out.loss.isnan()


BAD = {
    "no pair": (lambda o, i: o, "support must be a pair of tensors"),
    "lists": (lambda o, i: (o.tolist(), i), "support must be a pair of tensors"),
    "float ids": (lambda o, i: (o, i.float()), "support ids must be int32 or int64"),
    "short offsets": (lambda o, i: (o[:-1], i), r"support offsets must have shape \(7,\) for 6"),
    "2-D ids": (lambda o, i: (o, i[None]), r"support ids must have shape \(K,\)"),
    "elsewhere": (lambda o, i: (o, i.to("meta")), "support ids is on meta, logits are on cpu"),
    "first": (lambda o, i: (o + 1, i), "support offsets must be nondecreasing from 0 to"),
    "last": (lambda o, i: (o, i[:-1]), "support offsets must be nondecreasing from 0 to"),
    "falling": (lambda o, i: (o[[0, 2, 1, 3, 4, 5, 6]], i), "support offsets must be nondec"),
    "too large": (lambda o, i: (o, i + 11), r"support ids must lie in \[0, 11\) .* got"),
    "negative": (lambda o, i: (o, i - 11), r"support ids must lie in \[0, 11\) .* got -"),
    "no target": (lambda o, i: (o * 0, i[:0]), "support must have the target of every active"),
    "twice": (lambda o, i: (o * 2, i.repeat_interleave(2)), "support ids must be distinct"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_supports_raise(name):
    batch = make_batch(B=2, T=3, V=11, mask=torch.ones(2, 3))
    change, message = BAD[name]
    support = change(*support_from_mask(kept_mask(batch, 0.5)))
    with pytest.raises(ValueError, match=message):
        grpo_loss(batch.logits, batch.ids, batch.mask, batch.advantages, support=support)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_unknown_softmaxes_raise(name):
    batch = make_batch(B=2, T=3, V=11)
    with pytest.raises(ValueError, match=f"{name} must be one of support, vocabulary, got 'all'"):
        grpo_loss(batch.logits, batch.ids, batch.mask, batch.advantages, **{name: "all"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k must be an integer >= 1 or None, got 0"),
        ({"top_k": 2.0}, "top_k must be an integer"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\] or None, got 0.0"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\] or None, got 1.5"),
        ({"temperature": 0}, "temperature must be a finite number > 0, got 0"),
        ({"logits": torch.zeros(3)}, r"logits must be \(B, T, V\) or \(N, V\), got \(3,\)"),
    ],
)
def test_samplers_that_make_no_sense_raise(arguments, message):
    logits = arguments.get("logits", torch.zeros(2, 3))
    rest = {k: v for k, v in arguments.items() if k != "logits"}
    with pytest.raises(ValueError, match=message):
        sampling_support(logits, **rest)


def test_a_kl_over_a_support_that_is_not_given_raises():
    batch = make_batch(B=2, T=3, V=11)
    with pytest.raises(ValueError, match='kl_over="support" requires a support, got None'):
        grpo_loss(batch.logits, batch.ids, batch.mask, batch.advantages, kl_over="support")
