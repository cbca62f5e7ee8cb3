"""Objectives against verl 0.9.1's losses of the same name, which have no recipe of their own."""

import pytest
import torch
from verl_peer import actor_config, get_policy_loss_fn, make_verl_batch

from grpo_fused import ClipCov, Dro, KlCov, PolicyGradient, grpo_loss_from_logps

MODES = ["token-mean", "seq-mean-token-sum"]
# Objective, and verl's configuration. Where verl draws tokens at random, its share is all of those
# between the bounds.
CASES = {
    "dro": (Dro(0.3), {"dro_beta": 0.3}),
    "clip_cov": (
        ClipCov(0.1, 0.3, 1.0, 0.1, 0.6),
        {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 0.6},
    ),
    "kl_cov": (KlCov(0.2, 0.7), {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}),
    "kl_cov, one token": (KlCov(), {"kl_cov_ratio": 2e-4, "ppo_kl_coef": 1.0}),
}


def configured(**options):
    from verl.workers.config import PolicyLossConfig

    policy_loss = PolicyLossConfig(**options)
    info = {"global_batch_size": 8}
    bounds = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3}
    return actor_config(info, policy_loss=policy_loss, **bounds)


def of_verl(function, batch, mode, config):
    """(loss, gradient) of a loss of verl in float64."""
    values = batch._asdict()
    values["log_prob"] = values["log_prob"].clone().requires_grad_(True)
    loss, _ = function(**values, loss_agg_mode=mode, config=config)
    (gradient,) = torch.autograd.grad(loss, values["log_prob"])
    return loss.item(), gradient


def ours(objective, batch, mode):
    logps = batch.log_prob.clone().float().requires_grad_(True)
    weights = batch.rollout_is_weights
    out = grpo_loss_from_logps(
        logps,
        batch.response_mask,
        batch.advantages,
        old_logps=batch.old_log_prob,
        importance_sampling_ratio=weights,
        objective=objective,
        normalizer=mode,
    )
    out.loss.backward()
    return out.loss.item(), logps.grad, out.metrics


@pytest.mark.parametrize("rollout", [False, True], ids=["", "rollout weights"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_an_objective_is_that_of_verl(name, mode, rollout):
    objective, options = CASES[name]
    for seed in range(3):
        batch = make_verl_batch(seed, rollout=rollout)
        loss_mode = name.split(",")[0]
        config = configured(loss_mode=loss_mode, **options)
        want, gradient = of_verl(get_policy_loss_fn(loss_mode), batch, mode, config)
        loss, got, _ = ours(objective, batch, mode)
        assert loss == pytest.approx(want, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(got.double(), gradient, rtol=1e-5, atol=1e-7)


def test_verl_leaves_out_as_many_tokens():
    """At random, where ours are those with the largest covariance."""
    batch = make_verl_batch(1)
    options = {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.05, "clip_cov_ub": 5.0}
    objective = ClipCov(0.1, 0.3, 0.1, 0.05, 5.0)
    config = configured(loss_mode="clip_cov", **options)
    _, gradient = of_verl(get_policy_loss_fn("clip_cov"), batch, "token-mean", config)
    _, got, _ = ours(objective, batch, "token-mean")
    zeros = [(g[batch.response_mask] == 0).sum().item() for g in (gradient, got)]
    assert zeros[0] == zeros[1] > 2


@pytest.mark.parametrize("rollout", [False, True], ids=["", "rollout weights"])
@pytest.mark.parametrize("mode", MODES)
def test_reinforce_with_weights_is_that_of_verl(mode, rollout):
    """The row "reinforce", with verl's rollout_is_weights as importance_sampling_ratio."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_reinforce

    batch = make_verl_batch(2, rollout=rollout)

    def function(old_log_prob, **values):
        return compute_policy_loss_reinforce(old_log_prob, **values)

    want, gradient = of_verl(function, batch, mode, configured())
    loss, got, _ = ours(PolicyGradient(), batch, mode)
    assert loss == pytest.approx(want, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(got.double(), gradient, rtol=1e-5, atol=1e-7)
