"""grpo_fused_bypass_mode against verl's bypass_mode, over its options."""

import math

import pytest
import torch
from verl_peer import actor_config, make_verl_batch, run

IS = {
    "none": {"rollout_is": None},
    "token": {"rollout_is": "token", "rollout_is_threshold": 1.3},
    "icepop": {"rollout_is": "token", "rollout_is_threshold": "0.6_1.4"},
    "sequence": {"rollout_is": "sequence", "rollout_is_threshold": 1.5},
    "normalized": {"rollout_is": "token", "rollout_is_batch_normalize": True},
    "normalized sequences": {"rollout_is": "sequence", "rollout_is_batch_normalize": True},
}
REJECTIONS = {
    "none": {},
    "token_k1": {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.6_1.5"},
    "token_k3": {"rollout_rs": "token_k3", "rollout_rs_threshold": 0.2},
    "geometric": {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.7_1.3"},
    "two": {"rollout_rs": "token_k2,seq_max_k3", "rollout_rs_threshold": "0.3,1.5"},
}
INFO = {"dp_size": 2, "batch_num_tokens": 37, "global_batch_size": 9}
MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
# Every kind of weights with every rejection; averages and divisors take turns.
CASES = [(a, b) for a in IS for b in REJECTIONS]
CASES = [(*case, MODES[n % 3], {} if n % 2 else INFO) for n, case in enumerate(CASES)]


def configured(info=None, **options):
    from verl.trainer.config.algorithm import RolloutCorrectionConfig
    from verl.workers.config import PolicyLossConfig

    correction = RolloutCorrectionConfig(bypass_mode=True, **options)
    policy_loss = PolicyLossConfig(loss_mode="bypass_mode", rollout_correction=correction)
    bounds = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "clip_ratio_c": 1.4}
    return actor_config(info, policy_loss=policy_loss, **bounds)


@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
@pytest.mark.parametrize(("weights", "rejection", "mode", "info"), CASES)
def test_is_that_of_verl(weights, rejection, mode, info, loss_type):
    """verl in float64, zeros under the mask, against ours in float32, NaN under the mask."""
    batch = make_verl_batch(5)
    config = configured(info, loss_type=loss_type, **IS[weights], **REJECTIONS[rejection])
    wanted = run("bypass_mode", batch, config, mode)
    got = run("grpo_fused_bypass_mode", batch, config, mode, under_mask=math.nan)
    size = wanted.loss.abs() + wanted.gradient.abs().sum()
    assert (got.loss - wanted.loss).abs() < 2e-6 * size
    assert (got.gradient - wanted.gradient).norm() < 2e-6 * wanted.gradient.norm()
    for name, number in wanted.metrics.items():
        assert got.metrics[name] == pytest.approx(number, rel=1e-4, abs=1e-6), name
    removed = (got.gradient == 0) & batch.response_mask
    if rejection != "none":
        share = wanted.metrics["rollout_corr/rollout_rs_masked_fraction"]
        assert 0.05 < share < 0.8 and removed.sum() >= share * batch.response_mask.sum() - 0.5


def test_weights_of_the_call_are_ignored():
    """verl computes its own; the clipped loss takes none."""
    batch, other = make_verl_batch(5), make_verl_batch(5, rollout=True)
    other = batch._replace(rollout_is_weights=other.rollout_is_weights)
    for loss_type in ("ppo_clip", "reinforce"):
        config = configured(loss_type=loss_type, rollout_is="token")
        found = [run("grpo_fused_bypass_mode", b, config) for b in (batch, other)]
        assert found[0].loss == found[1].loss


def test_batches_without_a_token():
    """verl raises; ours is a 0 with a gradient, but where ranks exchange a mean weight."""
    batch = make_verl_batch()
    batch = batch._replace(response_mask=torch.zeros_like(batch.response_mask))
    got = run("grpo_fused_bypass_mode", batch, configured(loss_type="reinforce"))
    assert got.loss == 0 and (got.gradient == 0).all()
    for name in ("bypass_mode", "grpo_fused_bypass_mode"):
        with pytest.raises(ValueError, match="at least one valid token"):
            run(name, batch, configured(rollout_is_batch_normalize=True))


def test_everything_rejected():
    """verl divides 0 by 0."""
    batch = make_verl_batch()
    options = {"rollout_rs": "token_k2", "rollout_rs_threshold": 1e-12}
    got = run("grpo_fused_bypass_mode", batch, configured(**options))
    assert got.loss == 0 and (got.gradient == 0).all()
    assert run("bypass_mode", batch, configured(**options)).loss.isnan()


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (
            r"policy_loss.rollout_correction.loss_type must be one of .*, got 'ppo'",
            {"loss_type": "ppo"},
        ),
        ("Invalid rollout_rs option: token_k4", {"rollout_rs": "token_k4"}),
        ("rollout_rs_threshold must be", {"rollout_rs": "token_k1", "rollout_rs_threshold": None}),
        ("Invalid rollout_is: geometric", {"rollout_is": "geometric"}),
    ],
)
def test_invalid_options_raise(match, options):
    options = {"rollout_rs_threshold": 1.0} | options
    with pytest.raises(ValueError, match=match):
        run("grpo_fused_bypass_mode", make_verl_batch(), configured(**options))


def test_the_correction_is_required():
    from verl.workers.config import PolicyLossConfig

    policy_loss = PolicyLossConfig(loss_mode="bypass_mode", rollout_correction=None)
    with pytest.raises(ValueError, match="policy_loss.rollout_correction is required"):
        run("grpo_fused_bypass_mode", make_verl_batch(), actor_config(policy_loss=policy_loss))
