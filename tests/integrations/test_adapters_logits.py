"""Adapters of docs/integrations that take logits or a model, against plain torch."""

from types import SimpleNamespace

import pytest
import torch
from adapters import (
    BETA,
    SLIME,
    assert_same,
    clipped,
    fake_megatron,
    k3,
    load,
    log_softmax_of,
    slime_batch,
    sum_of_sample_mean,
)
from batches import relative_error
from tiny_models import batch, tiny


@pytest.fixture(autouse=True)
def megatron(monkeypatch):
    fake_megatron(monkeypatch, None)


@pytest.mark.parametrize("estimator", ["grpo", "gspo"])
@pytest.mark.parametrize("padding", [0, 6])
def test_slime(estimator, padding):
    logits, data = slime_batch(padding)
    logits.requires_grad_(True)

    reduce = sum_of_sample_mean(data)
    options = {"eps_clip_c": None} if estimator == "gspo" else {}
    args = SimpleNamespace(**SLIME | options | {"advantage_estimator": estimator})
    loss, log = load("slime").fused_policy_loss(args, data, logits, reduce)

    terms, end, ratios = [], 0, []
    lists = ("unconcat_tokens", "total_lengths", "response_lengths")
    for i, (ids, total, n) in enumerate(zip(*(data[name] for name in lists), strict=True)):
        end += total
        rows = logits[0, end - n - 1 : end - 1] / 0.7
        logps, mask = log_softmax_of(rows, ids[-n:]), data["loss_masks"][i]
        old, log_p = data["log_probs"][i], torch.log_softmax(rows.double(), -1)
        ratios.append(old - logps)
        own = logps
        if estimator == "gspo":
            own = old + (((logps - old) * mask).sum() / mask.sum()).expand_as(logps)
        loss_i = clipped(own, old, data["advantages"][i], cap=args.eps_clip_c)
        loss_i = loss_i + BETA * k3(logps, data["ref_log_probs"][i])
        terms.append(loss_i + 0.02 * (log_p.exp() * log_p).sum(-1))
    assert_same(loss, reduce(torch.cat(terms)), logits)
    assert not log["loss"].requires_grad and log["loss"] == loss
    expected = reduce(torch.cat(ratios)).item()
    assert log["ppo_kl"].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_slime_with_context_parallelism_raises():
    logits, data = slime_batch(0)
    with pytest.raises(ValueError, match="must be 1"):
        args = SimpleNamespace(**SLIME | {"context_parallel_size": 2})
        load("slime").fused_policy_loss(args, data, logits, torch.sum)


def test_loop():
    """Run the block with the variables that a loop defines."""
    model, plain = tiny(), tiny()
    input_ids, completion_ids, completion_mask, advantages = batch()
    T = completion_ids.shape[1]
    old_logps = -2.5 - torch.rand(completion_ids.shape)
    ran = load(
        "loop",
        torch=torch,
        model=model,
        input_ids=input_ids,
        mask=torch.ones_like(input_ids),
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        advantages=advantages,
        old_logps=old_logps,
        temperature=0.7,
        num_items_in_batch=30,
        T=T,
    )
    logits = plain(input_ids).logits[:, -T - 1 : -1] / 0.7
    logps = log_softmax_of(logits, completion_ids)
    terms = clipped(logps, old_logps, advantages[:, None].expand_as(logps))
    wanted = (terms * completion_mask).sum() / 30
    wanted.backward()
    assert ran.out.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert relative_error(ran.logps, logps * completion_mask) < 1e-6
    for got, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert relative_error(got.grad, expected.grad) < 1e-5
