"""Adapters of docs/integrations that take logits or a model, against plain torch."""

from types import SimpleNamespace

import pytest
import torch
from adapters import (
    BETA,
    HIGH,
    LOW,
    SLIME,
    assert_same,
    clipped,
    fake_megatron,
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


CASES = {
    "grpo": {},
    "gspo": {"advantage_estimator": "gspo", "eps_clip_c": None},
    "cispo": {"advantage_estimator": "cispo"},
    "over the sampler": {"use_rollout_logprobs": True, "use_unbiased_kl": True},
    "tis": {"use_tis": True, "tis_clip_low": 0.8},
    "low_var_kl": {"kl_loss_type": "low_var_kl", "use_unbiased_kl": True},
    "k1": {"kl_loss_type": "k1"},
    "without KL": {"use_kl_loss": False, "entropy_coef": 0.0},
    "on policy": {},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padding", [0, 6])
def test_slime(case, padding):
    logits, data = slime_batch(padding)
    logits.requires_grad_(True)
    data["ref_log_probs"][1] -= 5.0  # beyond the bound of low_var_kl: a value of 10 has d = -11
    data["ref_log_probs"][2] += 3.0  # or d = 2.6
    if case == "on policy":
        del data["log_probs"]
    args = SimpleNamespace(**SLIME | CASES[case])
    reduce = sum_of_sample_mean(data)
    loss, log = load("slime").fused_policy_loss(args, data, logits, reduce)

    terms, end, ratios, penalties, entropies = [], 0, [], [], []
    lists = ("unconcat_tokens", "total_lengths", "response_lengths")
    for i, (ids, total, n) in enumerate(zip(*(data[name] for name in lists), strict=True)):
        end += total
        rows = logits[0, end - n - 1 : end - 1] / 0.7
        logps, mask = log_softmax_of(rows, ids[-n:]), data["loss_masks"][i]
        trained = data["log_probs"][i] if "log_probs" in data else logps.detach()
        rollout, log_p = data["rollout_log_probs"][i], torch.log_softmax(rows.double(), -1)
        old = (rollout if args.use_rollout_logprobs else trained).double()
        ratios.append(old - logps)
        own, advantages = logps, data["advantages"][i]
        if case == "gspo":
            own = old + (((logps - old) * mask).sum() / mask.sum()).expand_as(logps)
        loss_i = clipped(own, old, advantages, cap=args.eps_clip_c)
        if case == "cispo":
            weight = torch.exp(logps - old).detach().clamp(1 - LOW, 1 + HIGH)
            loss_i = -weight * advantages * logps
        if args.use_tis:
            loss_i = loss_i * torch.exp(trained.double() - rollout).clamp(0.8, 1.2)
        ratio = torch.exp(logps - old) if args.use_unbiased_kl else 1.0
        d = data["ref_log_probs"][i].double() - logps
        penalties.append(ratio * (-d if args.kl_loss_type == "k1" else torch.exp(d) - d - 1))
        if args.kl_loss_type == "low_var_kl":
            assert i != 2 or (penalties[i] > 10).any()
            penalties[i] = penalties[i].clamp(-10, 10)
        entropies.append(-(log_p.exp() * log_p).sum(-1))
        terms.append(loss_i - args.entropy_coef * entropies[i])
    wanted, kl = reduce(torch.cat(terms)), reduce(torch.cat(penalties))
    if args.use_kl_loss:
        wanted = wanted + BETA * kl
        assert log["kl_loss"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert_same(loss, wanted, logits)
    assert not log["loss"].requires_grad and log["loss"] == loss
    expected = {"ppo_kl": reduce(torch.cat(ratios)), "entropy_loss": reduce(torch.cat(entropies))}
    for name, value in expected.items():
        assert log[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context_parallel_size", 2),
        ("rollout_top_p", 0.9),
        ("use_opsm", True),
        ("custom_tis_function_path", "my.function"),
    ],
)
def test_slime_refuses_what_the_adapter_does_not_have(name, value):
    logits, data = slime_batch(0)
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        args = SimpleNamespace(**SLIME | {name: value})
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
