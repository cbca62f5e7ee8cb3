"""grpo_loss_from_logps: the losses of grpo_loss, from log-probabilities that others have made."""

import inspect
import math

import pytest
import torch
from batches import assert_gradients_agree, make_batch, relative_error
from packing import cu_seqlens, pack

import oracle
from grpo_fused import (
    LOSSES,
    Cispo,
    Clip,
    Sapo,
    grpo_loss,
    grpo_loss_from_logps,
    linear_selective_log_softmax,
    selective_log_softmax,
)
from grpo_fused.losses.objectives import LEVELS

# What a loss over logits is asked for, and a loss over log-probabilities has behind it.
OF_LOGITS = {"temperature", "logit_softcap", "logit_scale", "compute_entropy", "grad_scale"}
OF_LOGITS |= {"inplace", "implementation", "support", "policy_over", "kl_over", "entropy_over"}


def score(logits, batch):
    """(logps, entropies) (B, T) of a leaf, in plain torch; NaN under the mask."""
    logp = logits[:, : batch.ids.shape[1]].double().log_softmax(-1)
    ids = batch.ids.clamp(min=0)[..., None]
    return logp.gather(-1, ids)[..., 0].float(), -(logp.exp() * logp).sum(-1).float()


def leaf(values):
    return values.detach().clone().requires_grad_(True)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("on_policy", [False, True], ids=["off policy", "on policy"])
@pytest.mark.parametrize("per_token", [False, True], ids=["A(B,)", "A(B,T)"])
def test_every_row_agrees_with_its_paper(loss_type, on_policy, per_token):
    batch = make_batch(per_token=per_token, seed=1)
    options = {
        "loss_type": loss_type,
        "beta": 0.1,
        "ref_logps": batch.ref_logps,
        "old_logps": None if on_policy else batch.old_logps,
        "entropy_coef": 0.02,
    }
    tokens = (batch.mask, batch.advantages)
    truth = oracle.grpo_loss(batch.logits, batch.ids, *tokens, **options)
    logits = batch.leaf()
    logps, entropies = score(logits, batch)
    out = grpo_loss_from_logps(logps, *tokens, entropies=entropies, **options)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(truth.loss, rel=1e-5, abs=2e-6)
    active = batch.mask != 0  # torch's own log-softmax has NaN under the mask, and hands NaN back
    got = torch.where(active[..., None], logits.grad[:, :-1], 0.0)
    assert_gradients_agree(got, truth.dlogits[:, :-1], batch.ids, 2e-6)
    assert relative_error(out.logps, truth.logps) < 5e-7
    assert relative_error(out.entropies, truth.entropies) < 2e-6
    assert out.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        assert out.metrics[name].item() == pytest.approx(value, rel=3e-6, abs=1e-7), name


def test_log_probabilities_of_a_kl_that_is_not_there_raise():
    logps = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="kl_logps requires ref_logps, got None"):
        grpo_loss_from_logps(logps, None, torch.ones(2), kl_logps=logps)
    with pytest.raises(ValueError, match="kl_logps must be float32, bfloat16 or float16"):
        grpo_loss_from_logps(logps, None, torch.ones(2), kl_logps=logps.long(), ref_logps=logps)


def test_arguments_are_those_of_grpo_loss():
    ours = inspect.signature(grpo_loss_from_logps).parameters
    theirs = inspect.signature(grpo_loss).parameters
    own = {"logps", "entropies", "kl_logps", "log_ratio_bounds"}
    assert ours.keys() - theirs.keys() == own
    sharded = {"vocab_parallel_group", "vocab_start"}
    assert theirs.keys() - ours.keys() == OF_LOGITS | sharded | {"logits", "completion_ids"}
    for name in ours.keys() & theirs.keys():
        assert ours[name].default == theirs[name].default


@pytest.mark.parametrize(
    "loss_type", ["dapo", "gspo", "cispo", "vespo", "gmpo", "fipo", "kl_cov", "ipo"]
)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_behind_our_own_log_probabilities_it_is_grpo_loss(loss_type, reduction, implementation):
    batch = make_batch(seed=2)
    correction = torch.full_like(batch.old_logps, 0.5)
    keep = torch.tensor([True, True, False, True])
    options = {
        "loss_type": loss_type,
        "reduction": reduction,
        "beta": 0.1,
        "use_bias_correction_kl": True,
        "kl_estimator": "k3+",
        "old_logps": batch.old_logps,
        "ref_logps": batch.ref_logps,
        "importance_sampling_ratio": correction,
        "policy_mask": keep,
    }
    one, two = batch.leaf(), batch.leaf()
    expected = grpo_loss(
        one, batch.ids, batch.mask, batch.advantages, implementation=implementation, **options
    )
    logps, _ = selective_log_softmax(two, batch.ids, batch.mask, implementation=implementation)
    out = grpo_loss_from_logps(logps, batch.mask, batch.advantages, **options)
    for result in (expected, out):
        result.loss.sum().backward()
    assert out.loss.shape == expected.loss.shape
    assert relative_error(out.loss, expected.loss) < 1e-6
    assert relative_error(two.grad, one.grad) < 2e-6
    torch.testing.assert_close(out.sums, expected.sums, rtol=1e-5, atol=1e-6)


def test_packed_equals_padded():
    lengths = (6, 0, 3, 5)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    batch = make_batch(mask=mask.long(), seed=3)
    logps, entropies = (leaf(t.nan_to_num()) for t in score(batch.logits, batch))
    options = {"loss_type": "gspo", "beta": 0.1, "entropy_coef": 0.1}
    packed = pack(lengths, logps, entropies, batch.old_logps, batch.ref_logps)
    results = []
    for values, where in (
        ((logps, entropies, batch.old_logps, batch.ref_logps), {}),
        (packed, {"cu_seqlens": cu_seqlens(lengths, "cpu")}),
    ):
        given = dict(zip(("entropies", "old_logps", "ref_logps"), values[1:], strict=True))
        active = None if where else batch.mask
        out = grpo_loss_from_logps(values[0], active, batch.advantages, **given, **where, **options)
        gradients = torch.autograd.grad(out.loss, (logps, entropies))
        results.append((out.loss, *gradients))
    assert out.logps.shape == out.entropies.shape == (sum(lengths),)
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_nothing_under_the_mask_counts():
    """NaN and infinities there reach neither loss nor gradient, whatever the objective."""
    for loss_type in LOSSES:
        batch = make_batch(seed=4)
        hidden = batch.mask == 0
        clean = score(batch.logits, batch)[0].nan_to_num()
        for fill in (0.0, math.nan, math.inf, -math.inf):
            logps = leaf(clean.masked_fill(hidden, fill))
            out = grpo_loss_from_logps(
                logps,
                batch.mask,
                batch.advantages,
                entropies=logps.detach(),
                old_logps=batch.old_logps,
                loss_type=loss_type,
            )
            out.loss.backward()
            assert (logps.grad[hidden] == 0).all() and (out.logps[hidden] == 0).all()
            if fill == 0.0:
                loss, gradient = out.loss, logps.grad
            assert torch.equal(out.loss, loss) and torch.equal(logps.grad, gradient)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("objective", [Clip(0.2, 0.2, 3.0), Sapo(), Cispo(1.5)], ids=repr)
def test_bounds_clamp_the_log_ratio_of_the_level(objective, level):
    """As if exp were flat outside: the same loss by hand, gradient by autograd."""
    log_ratio = torch.tensor([[-1.5, -1.0, 0.1], [0.3, 1.2, 2.5], [-4.0, -0.6, -0.2]])
    log_ratio = log_ratio.double()
    advantages = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 1.5, -0.5], [0.7, -0.3, 1.1]]).double()
    logps, low, high = leaf(torch.full_like(log_ratio, -1.3)), -0.7, 0.9
    moved = logps - logps.detach() + log_ratio
    own = moved
    if level != "token":
        reduce = torch.sum if level == "sequence_sum" else torch.mean
        own = reduce(moved, 1, keepdim=True).expand_as(moved)
    if level == "sequence_token":
        own = logps - logps.detach() + own.detach()
    own = own.clamp(low, high)
    expected = objective.evaluate(logps, own, advantages)[0].sum()
    (gradient,) = torch.autograd.grad(expected, logps)

    given = leaf(logps.float())
    out = grpo_loss_from_logps(
        given,
        torch.ones_like(log_ratio),
        advantages.float(),
        old_logps=logps.detach().float() - log_ratio.float(),
        objective=objective,
        importance_sampling_level=level,
        normalizer="token-sum",
        log_ratio_bounds=(low, high),
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(given.grad.double(), gradient, rtol=1e-5, atol=1e-6)
    if level == "token":
        assert out.metrics["ratio/max"].item() == pytest.approx(math.exp(high))


@pytest.mark.parametrize("packed", [False, True])
def test_the_sum_over_a_sequence_is_the_ratio_of_the_completion(packed):
    """TRL's RLOO, by hand: one clipped ratio a sequence, and its gradient in every token."""
    drift = torch.tensor([[0.3, -0.1, 0.2, 9.0], [-0.2, -0.1, 0.0, -0.4], [9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    advantages, given = torch.tensor([-2.0, 1.5, 1.0]), leaf(torch.full((3, 4), -1.0))
    ratios = ((given - given.detach() + drift) * mask).sum(1).exp()  # e^0.4, e^-0.7, 1
    terms = torch.min(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages)
    expected = -terms[:2].sum() / 3  # without a token there is no term
    (gradient,) = torch.autograd.grad(expected, given)
    tensors, options = (given, mask, given.detach() - drift), {}
    if packed:
        tensors, options = (x.flatten() for x in tensors), {"cu_seqlens": torch.arange(4) * 4}
    logps, mask, old_logps = tensors
    out = grpo_loss_from_logps(
        logps,
        mask,
        advantages,
        old_logps=old_logps,
        objective=Clip(0.2, 0.2),
        importance_sampling_level="sequence_sum",
        normalizer="seq-mean-token-mean",
        **options,
    )
    (found,) = torch.autograd.grad(out.loss, given)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)
    assert gradient[0, 0] != 0 and gradient[1, 0] != 0, "neither bound stops these"
    assert out.metrics["ratio/mean"].item() == pytest.approx(ratios.mean().item(), rel=1e-6)
    assert out.metrics["ratio/max"].item() == pytest.approx(math.exp(0.4), rel=1e-6)


def test_half_precision_comes_back_as_float32():
    logps = leaf(torch.tensor([[-0.5, -1.25]]).bfloat16())
    out = grpo_loss_from_logps(logps, None, torch.tensor([1.0]), loss_type="gpg")
    out.loss.backward()
    assert out.loss.dtype == out.logps.dtype == torch.float32
    assert logps.grad.dtype == torch.bfloat16
    assert out.loss.item() == pytest.approx(0.875)


def test_any_upstream_gradient_twice_and_no_token():
    logps = leaf(torch.tensor([[-0.5, -1.25]]))
    out = grpo_loss_from_logps(logps, None, torch.tensor([2.0]))
    (3 * out.loss).backward(retain_graph=True)
    out.loss.backward()
    torch.testing.assert_close(logps.grad, torch.full((1, 2), -4.0))
    nothing = grpo_loss_from_logps(logps, torch.zeros(1, 2), torch.tensor([2.0]))
    nothing.loss.backward()
    assert nothing.loss == 0 and nothing.metrics["ratio/max"] == 0


def test_log_probabilities_of_a_head_never_make_the_logits():
    torch.manual_seed(0)
    hidden, weight = leaf(torch.randn(2, 3, 8)), leaf(torch.randn(50, 8))
    ids, advantages = torch.randint(0, 50, (2, 3)), torch.tensor([1.0, -1.0])
    logps, _ = linear_selective_log_softmax(hidden, weight, ids)
    grpo_loss_from_logps(logps, None, advantages).loss.backward()
    gradients = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    grpo_loss(hidden @ weight.T, ids, None, advantages).loss.backward()
    torch.testing.assert_close(gradients, (hidden.grad, weight.grad), rtol=1e-5, atol=1e-6)


LOGPS, ADVANTAGES = torch.zeros(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    "match, changed",
    [
        ("logps must be a tensor", {"logps": [0.0]}),
        ("logps must be float32", {"logps": LOGPS.double()}),
        (r"logps must be \(B, T\), got \(3,\)", {"logps": LOGPS[0]}),
        (r"logps must be \(N,\) with cu", {"cu_seqlens": torch.tensor([0, 2])}),
        ("entropies must have shape", {"entropies": LOGPS[:, :2]}),
        ("entropies are needed", {"entropy_coef": 0.1}),
        ("completion_mask must have shape", {"completion_mask": torch.ones(2, 4)}),
        ("advantages must have shape", {"advantages": torch.zeros(3)}),
        ("old_logps must have shape", {"old_logps": LOGPS[:1]}),
        ("ref_logps is needed", {"beta": 0.1}),
        ("loss_type must be one of", {"loss_type": "ppo2"}),
        ("log_ratio_bounds", {"log_ratio_bounds": (1.0, -1.0)}),
        ("log_ratio_bounds", {"log_ratio_bounds": (math.nan, 1.0)}),
        ("log_ratio_bounds", {"log_ratio_bounds": 20.0}),
        ("log_ratio_bounds", {"log_ratio_bounds": (None, 1.0)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(match, changed):
    arguments = {"logps": LOGPS, "completion_mask": None, "advantages": ADVANTAGES} | changed
    with pytest.raises(ValueError, match=match):
        grpo_loss_from_logps(**arguments)


@pytest.mark.parametrize("ref, sign", [(-1.0, 0), (-30.0, -1)], ids=["cut", "within"])
def test_a_token_far_below_the_reference_is_not_pushed_further_down(ref, sign):
    """Where the exponential of k3 is cut at e^80, its linear term alone would: +0.04 here."""
    logps = torch.tensor([[-101.0]], requires_grad=True)
    mask, advantages = torch.ones(1, 1), torch.zeros(1)
    reference = torch.tensor([[ref]])
    grpo_loss_from_logps(logps, mask, advantages, ref_logps=reference, beta=0.04).loss.backward()
    assert logps.grad.sign().item() == sign
