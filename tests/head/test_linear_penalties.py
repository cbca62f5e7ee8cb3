"""Objectives with a gradient where there is no advantage, and those that read the sampler's logps.

A head skips tokens whose gradient is 0: it must know that these have one.
"""

import pytest
import torch
from batches import make_batch, relative_error
from heads import chunk_bytes, exact, loss_of, make_head_batch

from grpo_fused import (
    Clip,
    Dro,
    Ipo,
    PolicyGradient,
    RolloutIs,
    grpo_loss,
    grpo_loss_from_logps,
    rollout_weights,
)

PENALISED = [Dro(0.7), Ipo(0.05, 0.4)]


def with_sampler(head, seed=3):
    """Log-probabilities of a sampler, NaN under the mask."""
    noise = torch.randn(head.batch.mask.shape, generator=torch.Generator().manual_seed(seed))
    return (head.batch.old_logps.cpu() + 0.2 * noise).clamp(max=0.0).to(head.hidden.device)


def check(head, implementation, rows=100, **options):
    truth, gradients = exact(head, **options)
    out, leaves = loss_of(head, implementation, chunk_bytes=chunk_bytes(rows), **options)
    out.loss.backward()
    for leaf, want in zip(leaves, gradients, strict=True):
        assert relative_error(leaf.grad, want) < 5e-6
    return leaves[0].grad


@pytest.mark.parametrize("rows", [100, 7, 3])
@pytest.mark.parametrize("objective", PENALISED, ids=repr)
def test_tokens_without_an_advantage_are_penalised(objective, rows, implementation, device):
    """One sequence without an advantage, then all of them; masked tokens are still skipped."""
    head = make_head_batch(device=device)
    options = {"objective": objective, "old_logps": head.batch.old_logps}
    options |= {"sampling_logps": with_sampler(head)}
    assert head.batch.advantages[1] == 0
    assert check(head, implementation, rows, **options)[1, 0].any()
    head.batch.advantages = torch.zeros_like(head.batch.advantages)
    gradient = check(head, implementation, rows, **options)
    active = head.batch.mask != 0
    assert gradient[:, :-1][active].any(-1).all() and not gradient[:, :-1][~active].any()


@pytest.mark.parametrize("objective", PENALISED, ids=repr)
def test_switched_off_tokens_are_not(objective, implementation, device):
    """policy_mask switches the penalty off with the rest of the policy term."""
    head = make_head_batch(mask=torch.ones(4, 6), device=device)
    on = torch.tensor([1, 1, 0, 1], device=device)
    options = {"objective": objective, "old_logps": head.batch.old_logps, "policy_mask": on}
    gradient = check(head, implementation, **options)
    assert gradient[1].any() and not gradient[2].any()


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("objective", [Ipo(0.05, 0.4), RolloutIs()], ids=repr)
def test_the_sampler_is_the_old_policy_unless_it_is_given(
    objective, given, on_policy, implementation, device
):
    """Over a head in short chunks, over logits, and over log-probabilities."""
    head = make_head_batch(device=device)
    options = {"objective": objective}
    options |= {} if on_policy else {"old_logps": head.batch.old_logps}
    options |= {"sampling_logps": with_sampler(head)} if given else {}
    check(head, implementation, 5, **options)
    b, results = head.batch, []
    logits = b.logits.float().requires_grad_(True)
    tokens = (b.ids, b.mask, b.advantages)
    for reduction in ("sum", "none"):
        rule = "token-sum" if reduction == "sum" else None
        more = {"normalizer": rule, "reduction": reduction, "implementation": implementation}
        out = grpo_loss(logits, *tokens, **options, **more)
        results.append(out.loss.sum())
    logps = grpo_loss_from_logps(out.logps, *tokens[1:], normalizer="token-sum", **options)
    for result in (results[1], logps.loss):
        assert relative_error(result, results[0]) < 1e-6


def test_a_band_over_the_sampler_is_a_rollout_weight(implementation, device):
    """GLM-5's weight is that of `rollout_weights`, of the policy itself over the sampler."""
    batch = make_batch(device=device)
    inputs = (batch.logits, batch.ids, batch.mask, batch.advantages)
    options = {"normalizer": "token-sum", "implementation": implementation}
    sampler = {"sampling_logps": batch.sampling_logps}
    got = grpo_loss(*inputs, objective=RolloutIs(0.2, 0.3), **sampler, **options)
    weights = rollout_weights(
        got.logps, batch.sampling_logps, batch.mask, mode="mask", cap=1.3, floor=0.8
    )
    assert 0 < (weights == 0).sum() < (batch.mask != 0).sum() / 1.2
    options |= {"objective": PolicyGradient(), "importance_sampling_ratio": weights}
    want = grpo_loss(*inputs, **options)
    assert relative_error(got.loss, want.loss) < 1e-6


def test_other_objectives_ignore_the_sampler(implementation, device):
    batch = make_batch(device=device)
    inputs = (batch.logits, batch.ids, batch.mask, batch.advantages)
    options = {"objective": Clip(), "old_logps": batch.old_logps, "implementation": implementation}
    want = grpo_loss(*inputs, **options).loss
    nothing = torch.full_like(batch.old_logps, torch.nan)
    assert torch.equal(grpo_loss(*inputs, sampling_logps=nothing, **options).loss, want)


@pytest.mark.parametrize("objective", [Ipo(), RolloutIs()], ids=repr)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_unknown_sampler_is_the_policy(objective, reduction, implementation, device):
    batch = make_batch(extra=0, mask=torch.ones(4, 6), device=device)
    batch.advantages.fill_(0.5)
    on = torch.ones_like(batch.old_logps)
    batch.sampling_logps[2, 3], on[2, 3] = torch.nan, 0.0
    for policy_mask in (on, None):
        logits = batch.leaf()
        loss = grpo_loss(
            *(logits, batch.ids, batch.mask, batch.advantages),
            old_logps=batch.old_logps,
            sampling_logps=batch.sampling_logps,
            policy_mask=policy_mask,
            objective=objective,
            reduction=reduction,
            implementation=implementation,
        ).loss.sum()
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()
