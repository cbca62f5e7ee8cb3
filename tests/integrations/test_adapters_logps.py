"""Adapters of docs/integrations that take log-probabilities, against plain torch."""

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


def mean_of_rows(values, mask):
    return ((values * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


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


@pytest.mark.parametrize("weighted", [False, True])
def test_prime_rl(weighted, monkeypatch):
    """prime-rl passes one sample at a time and adds the sums up."""

    @dataclass
    class LossOutputs:
        loss: torch.Tensor
        metrics: dict

    make_fake(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    fused_loss = load("prime_rl").fused_loss
    logps, old, ref, advantages, mask = make_tokens()
    weights = torch.linspace(0.1, 2.0, logps.shape[1]) if weighted else None
    logps.requires_grad_(True)
    total = wanted = 0.0
    for b in range(len(logps)):
        inputs = SimpleNamespace(
            trainer_logprobs=logps[b],
            inference_logprobs=old[b],
            ref_logprobs=ref[b],
            advantages=advantages[b],
            loss_mask=mask[b],
            loss_weights=weights,
        )
        out = fused_loss(inputs, epsilon_low=LOW, epsilon_high=HIGH, beta=BETA)
        total = total + out.loss
        terms = clipped(logps[b].double(), old[b], advantages[b])
        terms = terms + BETA * k3(logps[b].double(), ref[b])
        wanted = wanted + (terms * (1.0 if weights is None else weights))[mask[b]].sum()
    assert_same(total, wanted, logps)
    assert all(value.dim() == 0 for value in out.metrics.values())
    inputs.ref_logprobs = None
    assert fused_loss(inputs).loss.isfinite()


OPENRLHF = {
    "token": {"dual_clip": 1.5},
    "sequence means": {"token_level_loss": False},
    "gspo": {"policy_loss_type": "gspo"},
    "tis": {"enable_vllm_is_correction": True, "vllm_is_truncated_threshold": [0.7, 1.5]},
}
OPENRLHF["icepop"] = OPENRLHF["tis"] | {"vllm_is_correction_type": "icepop"}
OPENRLHF["gspo, corrected"] = OPENRLHF["gspo"] | {"enable_vllm_is_correction": True}


@pytest.fixture
def openrlhf(monkeypatch):
    actor = make_fake(monkeypatch, "openrlhf.models.actor")
    trainer = make_fake(monkeypatch, "openrlhf.trainer.ray.ppo_actor")
    load("openrlhf")
    return SimpleNamespace(actor=actor, trainer=trainer)


@pytest.mark.parametrize("case", OPENRLHF)
def test_openrlhf_policy_loss(case, openrlhf):
    options = OPENRLHF[case]
    logps, old, rollout, advantages, mask = make_tokens()
    logps.requires_grad_(True)
    own = logps.double()
    loss_fn = openrlhf.trainer.PolicyLoss(clip_eps_low=LOW, clip_eps_high=HIGH, **options)
    loss, clip_ratio, ppo_kl, vllm_kl = loss_fn(
        logps, old, advantages, action_mask=mask, rollout_log_probs=rollout
    )
    if "gspo" in case:
        old = rollout if "corrected" in case else old
        mean = ((own - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        own = old.double() + mean
    terms = clipped(own, old, advantages, cap=options.get("dual_clip"))
    if "gspo" not in case and options.get("enable_vllm_is_correction"):
        ratio = torch.exp(old.double() - rollout)
        terms = terms * (
            ratio.clamp(0.7, 1.5) if case == "tis" else ratio * ((ratio >= 0.7) & (ratio <= 1.5))
        )
        assert vllm_kl.item() == pytest.approx(mean_of(rollout - old, mask).item(), rel=1e-4)
    else:
        assert vllm_kl is None
    rows = "gspo" in case or case == "sequence means"
    assert_same(loss, (mean_of_rows if rows else mean_of)(terms, mask), logps)
    ratio, gains = torch.exp(own - old), advantages > 0
    outside = torch.where(gains, ratio > 1 + HIGH, ratio < 1 - LOW) & (advantages != 0)
    assert clip_ratio.item() == pytest.approx(mean_of(outside.double(), mask).item(), rel=1e-5)
    assert ppo_kl.item() == pytest.approx(mean_of(old - logps.detach(), mask).item(), rel=1e-4)


def test_openrlhf_log_probabilities(openrlhf):
    """Call both functions in one forward: the first one scales the logits in place."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2, 5, V, generator=generator)
    labels = torch.randint(0, V, (2, 5), generator=generator)
    upstream = torch.randn(2, 2, 5, generator=generator)
    gradients = []
    for scaled in (True, False):
        leaf = raw.clone().requires_grad_(True)
        if scaled:
            logits = leaf * 1.0
            logps = openrlhf.actor.log_probs_from_logits(logits, labels, temperature=0.7)
            entropies = openrlhf.actor.compute_entropy(logits)
        else:
            logps = log_softmax_of(leaf / 0.7, labels)
            log_p = torch.log_softmax(leaf.double() / 0.7, -1)
            entropies = -(log_p.exp() * log_p).sum(-1)
        (logps * upstream[0] + entropies * upstream[1]).sum().backward()
        gradients.append(leaf.grad)
    assert relative_error(*gradients) < 2e-6
