"""Adapters of docs/integrations that take log-probabilities, against plain torch."""

import math
from dataclasses import dataclass
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
from tiny_models import V


def mean_of(values, mask):
    return (values * mask).sum() / mask.sum()


def test_verl(monkeypatch):
    pytest.importorskip("verl", reason="verl 0.9.1 is installed by `make` for Python below 3.13")
    from verl.trainer.ppo import core_algos
    from verl_peer import actor_config, make_verl_batch, run

    losses = dict(core_algos.POLICY_LOSS_REGISTRY)
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", losses)
    load("verl")
    losses["grpo_fused_soft"] = losses["soft"]  # `run` recognises ours by the prefix
    values, mode = make_verl_batch(), "seq-mean-token-mean"
    wanted = run("sapo", values, actor_config(tau_pos=0.9, tau_neg=1.2), mode)
    got = run("grpo_fused_soft", values, actor_config(), mode)
    assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    assert relative_error(got.gradient, wanted.gradient) < 2e-6


def prime_rl_terms(kind, logps, old, ref, advantages):
    """prime-rl's losses of tokens."""
    if kind == "clipped_loss":
        return clipped(logps, old, advantages) + BETA * k3(logps, ref)
    log_ratio, advantages = logps - old, 0.7 * advantages
    moved = (logps.exp() - old.exp()).detach()
    kept = moved.abs() <= 0.1
    if kind == "dppo_loss":
        kept = torch.where(advantages > 0, moved <= 0.1, moved >= -0.05)
    assert kept.any() and not kept.all()
    return -advantages * kept * log_ratio.exp() + 0.02 * log_ratio**2


PRIME_RL = {
    "ipo_loss": {"eps": 0.1, "adv_tau": 0.7, "kl_tau": 0.02},
    "dppo_loss": {"dppo_mask_low": 0.05, "dppo_mask_high": 0.1, "adv_tau": 0.7, "kl_tau": 0.02},
    "clipped_loss": {"epsilon_low": LOW, "epsilon_high": HIGH, "beta": BETA},
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", PRIME_RL)
def test_prime_rl(kind, weighted, monkeypatch):
    """prime-rl passes one sample at a time and adds the sums up."""

    @dataclass
    class LossOutputs:
        loss: torch.Tensor
        metrics: dict

    make_fake(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    fused_loss = getattr(load("prime_rl"), kind)
    logps, old, ref, advantages, mask = make_tokens()
    mask[3] = True  # a lone token would not have both sides of a bound
    weights = torch.linspace(0.1, 2.0, logps.shape[1]) if weighted else None
    logps.requires_grad_(True)
    total = 0.0
    for b in range(len(logps)):
        inputs = SimpleNamespace(
            trainer_logprobs=logps[b],
            inference_logprobs=old[b],
            ref_logprobs=ref[b] if kind == "clipped_loss" else None,
            advantages=advantages[b],
            loss_mask=mask[b],
            loss_weights=weights,
        )
        out = fused_loss(inputs, **PRIME_RL[kind])
        total = total + out.loss
    terms = prime_rl_terms(kind, logps.double(), old.double(), ref.double(), advantages.double())
    terms = terms * (1.0 if weights is None else weights)
    assert_same(total, terms[mask].sum(), logps)
    assert all(value.dim() == 0 for value in out.metrics.values())
    inputs.ref_logprobs = None
    assert fused_loss(inputs).loss.isfinite()


TIS = {"enable_vllm_is_correction": True, "vllm_is_truncated_threshold": [0.8, 1.3]}
OPENRLHF = {
    "token": {"dual_clip": 1.5},
    "sequence means": {"token_level_loss": False},
    "gspo": {"policy_loss_type": "gspo"},
    "gspo, corrected": {"policy_loss_type": "gspo", "enable_vllm_is_correction": True},
    "tis": TIS,
    "icepop": TIS | {"vllm_is_correction_type": "icepop"},
    "seq-mask-tis": TIS | {"vllm_is_correction_type": "seq-mask-tis"},
}


@pytest.fixture
def openrlhf(monkeypatch):
    actor = make_fake(monkeypatch, "openrlhf.models.actor")
    trainer = make_fake(monkeypatch, "openrlhf.trainer.ray.ppo_actor")
    load("openrlhf")
    return SimpleNamespace(actor=actor, trainer=trainer)


@pytest.mark.parametrize("counted", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("case", OPENRLHF)
def test_openrlhf_policy_loss(case, counted, openrlhf):
    options = OPENRLHF[case]
    logps, old, rollout, advantages, mask = make_tokens()
    mask[1] = False  # no sequence without a token is counted
    logps.requires_grad_(True)
    own, first = logps.double(), old
    counts = {"dp_size": 2, "batch_num_tokens": 37.0, "global_batch_size": 9.0} if counted else {}
    loss_fn = openrlhf.trainer.PolicyLoss(clip_eps_low=LOW, clip_eps_high=HIGH, **options)
    loss, clip_ratio, ppo_kl, vllm_kl = loss_fn(
        logps, old, advantages, action_mask=mask, rollout_log_probs=rollout, **counts
    )
    if "gspo" in case:
        old = rollout if "corrected" in case else old
        counts_of_rows = mask.sum(1, keepdim=True).clamp(min=1)
        own = old.double() + ((own - old) * mask).sum(1, keepdim=True) / counts_of_rows
    terms = clipped(own, old, advantages, cap=options.get("dual_clip"))
    if options.get("vllm_is_truncated_threshold"):
        difference = old.double() - rollout
        ratio = torch.exp(difference)
        rows = ((difference * mask).sum(1) / mask.sum(1).clamp(min=1)).exp()[:, None]
        criterion = rows if case == "seq-mask-tis" else ratio
        kept = ((criterion >= 0.8) & (criterion <= 1.3)).expand_as(old)
        assert kept[mask].any() and not kept[mask].all()
        terms = terms * (ratio.clamp(0.8, 1.3) if case == "tis" else ratio * kept)
        assert vllm_kl.item() == pytest.approx(mean_of(rollout - old, mask).item(), rel=1e-4)
    else:
        assert vllm_kl is None
    if "gspo" in case or case == "sequence means":
        sums = (terms * mask).sum(1) / mask.sum(1).clamp(min=1)
        wanted = sums.sum() * 2 / 9 if counted else sums.sum() / 4
    else:
        wanted = (terms * mask).sum() * 2 / 37 if counted else mean_of(terms, mask)
    assert_same(loss, wanted, logps)
    ratio, gains = torch.exp(own - old), advantages > 0
    outside = torch.where(gains, ratio > 1 + HIGH, ratio < 1 - LOW) & (advantages != 0)
    assert clip_ratio.item() == pytest.approx(mean_of(outside.double(), mask).item(), rel=1e-5)
    assert ppo_kl.item() == pytest.approx(mean_of(first - logps.detach(), mask).item(), rel=1e-4)


def test_openrlhf_bounds_log_ratios(openrlhf):
    """Of tokens to +-20, without a gradient outside."""
    logps = torch.tensor([[-50.0, -1.0]], requires_grad=True)
    old, advantages, mask = torch.tensor([[-1.0, -50.0]]), -torch.ones(1, 2), torch.ones(1, 2)
    loss, *_ = openrlhf.trainer.PolicyLoss()(logps, old, advantages, action_mask=mask)
    loss.backward()
    assert loss.item() == pytest.approx((0.8 + math.exp(20.0)) / 2)
    assert (logps.grad == 0).all()


def test_openrlhf_log_probabilities(openrlhf):
    """Both in one forward, entropies first and at temperature 1, as its actor calls them."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2, 5, V, generator=generator)
    labels = torch.randint(0, V, (2, 5), generator=generator)
    upstream = torch.randn(2, 2, 5, generator=generator)
    gradients = []
    for fused in (True, False):
        leaf = raw.clone().requires_grad_(True)
        if fused:
            logits = leaf * 1.0
            entropies = openrlhf.actor.compute_entropy(logits)
            logps = openrlhf.actor.log_probs_from_logits(logits, labels, temperature=0.7)
        else:
            logps = log_softmax_of(leaf / 0.7, labels)
            log_p = torch.log_softmax(leaf.double(), -1)
            entropies = -(log_p.exp() * log_p).sum(-1)
        (logps * upstream[0] + entropies * upstream[1]).sum().backward()
        gradients.append(leaf.grad)
    assert relative_error(*gradients) < 2e-6
