"""Adapters of docs/integrations.md that take logits or a model, against plain torch."""

import enum
from types import SimpleNamespace

import pytest
import torch
from adapters import (
    BETA,
    HIGH,
    LOW,
    assert_same,
    clipped,
    k3,
    load,
    log_softmax_of,
    make_fake,
    make_tokens,
)
from batches import relative_error
from tiny_models import V, batch, tiny


def slime_batch(padding):
    """Pack three samples into one row; lists hold one tensor per sample, as in slime."""
    generator = torch.Generator().manual_seed(0)
    totals, responses = [7, 5, 9], [4, 1, 6]

    def of_responses(scale=1.0):
        return [scale * torch.randn(n, generator=generator) for n in responses]

    tokens = [torch.randint(0, V, (n,), generator=generator) for n in totals]
    logits = 2 * torch.randn(1, sum(totals) + padding, V, generator=generator)
    starts = [sum(totals[:i]) for i in range(3)]
    rows = [
        logits[0, s + total - n - 1 : s + total - 1]
        for s, total, n in zip(starts, totals, responses, strict=True)
    ]
    own = [
        log_softmax_of(x / 0.7, ids[-n:]).float()
        for x, ids, n in zip(rows, tokens, responses, strict=True)
    ]
    masks = [torch.ones(n, dtype=torch.int) for n in responses]
    masks[2][3] = 0
    return logits, {
        "unconcat_tokens": tokens,
        "total_lengths": totals,
        "response_lengths": responses,
        "loss_masks": masks,
        "advantages": of_responses(),
        "log_probs": [a + b for a, b in zip(own, of_responses(0.5), strict=True)],
        "ref_log_probs": [a + b for a, b in zip(own, of_responses(0.3), strict=True)],
    }


SLIME = {
    "tensor_model_parallel_size": 1,
    "context_parallel_size": 1,
    "advantage_estimator": "grpo",
    "eps_clip": LOW,
    "eps_clip_high": HIGH,
    "eps_clip_c": 1.5,
    "rollout_temperature": 0.7,
    "use_kl_loss": True,
    "kl_loss_coef": BETA,
    "entropy_coef": 0.02,
}


@pytest.mark.parametrize("estimator", ["grpo", "gspo"])
@pytest.mark.parametrize("padding", [0, 6])
def test_slime(estimator, padding):
    logits, data = slime_batch(padding)
    logits.requires_grad_(True)

    def sum_of_sample_mean(values):
        parts = values.split(data["response_lengths"])
        masks = data["loss_masks"]
        return sum((p * m).sum() / m.sum() for p, m in zip(parts, masks, strict=True))

    options = {"eps_clip_c": None} if estimator == "gspo" else {}
    args = SimpleNamespace(**SLIME | options | {"advantage_estimator": estimator})
    loss, log = load("slime").fused_policy_loss(args, data, logits, sum_of_sample_mean)

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
    assert_same(loss, sum_of_sample_mean(torch.cat(terms)), logits)
    assert not log["loss"].requires_grad and log["loss"] == loss
    expected = sum_of_sample_mean(torch.cat(ratios)).item()
    assert log["ppo_kl"].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_slime_with_sharded_logits_raises():
    logits, data = slime_batch(0)
    for name in ("tensor_model_parallel_size", "context_parallel_size"):
        with pytest.raises(ValueError, match="must be 1"):
            args = SimpleNamespace(**SLIME | {name: 2})
            load("slime").fused_policy_loss(args, data, logits, torch.sum)


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("kind", ["FusedPGLossFn", "PGLossFnFromLogps"])
def test_nemo_rl(kind, beta, monkeypatch):
    """Call the loss as NeMo-RL's wrapper does: by keywords that depend on input_type."""
    inputs = enum.Enum("LossInputType", {"LOGIT": "logit", "LOGPROB": "logprob"})
    types = enum.Enum("LossType", {"TOKEN_LEVEL": "token", "SEQUENCE_LEVEL": "sequence"})
    interfaces = "nemo_rl.algorithms.loss.interfaces"
    make_fake(monkeypatch, interfaces, LossInputType=inputs, LossType=types)
    loss_fn = getattr(load("nemo_rl"), kind)(LOW, HIGH, 1.5, beta)

    _, old, ref, advantages, mask = make_tokens(T=7)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, mask.shape, generator=generator)
    logits = 2 * torch.randn(*mask.shape, V, generator=generator)
    own = log_softmax_of(logits[:, :-1], ids[:, 1:])
    shifts = (0.5 * old[:, 1:], 0.3 * ref[:, 1:])
    old[:, 1:], ref[:, 1:] = (own + shift for shift in shifts)
    data = {
        "input_ids": ids,
        "token_mask": mask.long(),
        "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]),
        "advantages": advantages,
        "prev_logprobs": old,
        "reference_policy_logprobs": ref,
    }
    logits.requires_grad_(True)
    logps = log_softmax_of(logits[:, :-1], ids[:, 1:])
    given = {"logits": logits}
    if loss_fn.input_type is inputs.LOGPROB:
        given = {"next_token_logprobs": log_softmax_of(logits[:, :-1], ids[:, 1:]).float()}
    counts = {"global_valid_seqs": torch.tensor(9.0), "global_valid_toks": torch.tensor(50.0)}
    loss, metrics = loss_fn(data=data, **counts, **given)
    where = mask[:, 1:] * data["sample_mask"][:, None]
    terms = clipped(logps, old[:, 1:], advantages[:, 1:], cap=1.5) + beta * k3(logps, ref[:, 1:])
    assert_same(loss, (terms * where).sum() / 50, logits)
    ratio = (torch.exp(logps - old[:, 1:]) * where).sum() / 50
    assert metrics["probs_ratio"] == pytest.approx(ratio.item(), rel=1e-5)
    assert metrics["loss"] == loss.item() and metrics["num_valid_samples"] == 4
    assert loss_fn.loss_type is types.TOKEN_LEVEL


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
