"""Advantages, rewards and the value loss against those of verl 0.9.1, in float64."""

import pytest
import torch
from batches import relative_error
from peers import require
from ppo_oracle import hidden, ppo_batch

pytest.importorskip("verl", reason="verl 0.9.1 is installed by `make` for Python below 3.13")
require("verl", "0.9.1")

import numpy as np  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402

from grpo_fused import (  # noqa: E402
    gae_advantages,
    kl_penalty,
    kl_rewards,
    multi_reward_advantages,
    outcome_advantages,
    value_loss,
    whiten,
)

UIDS = np.array(["a", "b", "a", "c", "b", "a", "c", "b", "a", "d"])
IDS = torch.tensor([ord(uid) for uid in UIDS])
LONE = 9  # the only completion of its prompt


def batch(B=10, T=13):
    """(rewards (B,), at the last tokens (B, T), mask) in float64, of odd lengths."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    mask = torch.arange(T) < lengths[:, None]
    rewards = torch.randn(B, generator=generator).double()
    at_the_end = torch.zeros(B, T, dtype=torch.float64)
    at_the_end[torch.arange(B), lengths - 1] = rewards
    return rewards, at_the_end, mask


def as_tokens(advantages, mask):
    return torch.where(mask, advantages[:, None], 0.0)


def test_opo():
    """A completion alone has its reward as advantage in verl, 0 here."""
    rewards, at_the_end, mask = batch()
    want = core_algos.compute_opo_outcome_advantage(at_the_end, mask.double(), UIDS)[0]
    options = {"group_ids": IDS, "scale": "none", "lengths": mask.sum(1)}
    got = as_tokens(outcome_advantages(rewards, **options), mask)
    want[LONE] = 0.0
    assert relative_error(got, want) < 1e-7


def test_rloo():
    rewards, at_the_end, mask = batch()
    want = core_algos.compute_rloo_outcome_advantage(at_the_end, mask.double(), UIDS)[0]
    options = {"group_ids": IDS, "scale": "none", "leave_one_out": True}
    got = as_tokens(outcome_advantages(rewards, **options), mask)
    want[LONE] = 0.0
    assert relative_error(got, want) < 1e-7


def test_reinforce_plus_plus():
    """verl's deviation is that over tokens: whiten."""
    rewards, at_the_end, mask = batch()
    config = core_algos.AlgoConfig(gamma=0.97)
    want = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        at_the_end, mask.double(), config=config
    )[0]
    tokens, nothing = hidden(mask, at_the_end, torch.zeros_like(at_the_end))
    _, returns = gae_advantages(tokens, nothing, mask, gamma=0.97, lam=1.0)
    assert relative_error(whiten(returns, mask), want) < 1e-6


def test_reinforce_plus_plus_with_baseline():
    keep = [b for b in range(10) if b != LONE]
    rewards, at_the_end, mask = (x[keep] for x in batch())
    want = core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(
        at_the_end, mask.double(), UIDS[keep]
    )[0]
    got = outcome_advantages(rewards, group_ids=IDS[keep], scale="none")
    assert relative_error(whiten(as_tokens(got, mask), mask), want) < 1e-6


def test_gdpo():
    """Whitened over tokens, as verl does. Rewards of thousands drown the epsilons, which differ."""
    keep = [b for b in range(10) if b != LONE]
    first, at_the_end, mask = (x[keep] for x in batch())
    rewards = 1e4 * torch.stack((first, (first > 0).double()), 1)
    components = {"correct": rewards[:, 0].numpy(), "format": rewards[:, 1].numpy()}
    prompts = torch.zeros(len(keep), 1, dtype=torch.int64)
    attended = torch.cat((prompts + 1, mask.long()), 1)
    config = {"gdpo_reward_keys": list(components), "gdpo_reward_weights": [1.0, 0.25]}
    want = core_algos.compute_gdpo_outcome_advantage(
        at_the_end,
        mask.double(),
        UIDS[keep],
        config=config,
        non_tensor_batch=components,
        batch={"prompts": prompts, "attention_mask": attended},
    )[0]
    weights = torch.tensor([1.0, 0.25])
    got = multi_reward_advantages(rewards, group_ids=IDS[keep], weights=weights)
    assert relative_error(whiten(as_tokens(got, mask), mask), want) < 1e-6


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_rewards(estimator):
    mask, scores, rewards, _, _, logps, ref_logps = ppo_batch()
    penalty = core_algos.kl_penalty(
        logps.nan_to_num(0).double(), ref_logps.nan_to_num(0).double(), estimator
    )
    want = torch.where(mask, rewards.double() - 0.2 * penalty, 0.0)
    got = kl_rewards(rewards, logps, ref_logps, mask, beta=0.2, kl_estimator=estimator)
    assert relative_error(got, want) < 1e-7


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("name", ["kl", "abs", "mse", "low_var_kl"])
def test_kl_penalty(name, plus):
    """verl's names, with differences beyond both of its bounds; value and gradient."""
    differences = torch.tensor([-40.0, -15.0, -8.0, -1.0, -0.2, 0.0, 0.3, 2.0, 2.7, 15.0, 40.0])
    theirs = torch.linspace(-3.0, -0.1, 11).double().requires_grad_()
    ours = theirs.detach().float().requires_grad_()
    want = core_algos.kl_penalty(theirs, theirs.detach() + differences, name + plus)
    estimator = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(name, name)
    bounds = {"max_difference": 20.0, "max_kl": 10.0} if estimator == "k3" else {}
    estimator += plus if estimator != "k2" else ""
    ref_logps = (theirs.detach() + differences).float()
    got = kl_penalty(ours, ref_logps, kl_estimator=estimator, **bounds)
    upstream = torch.linspace(-1.0, 2.0, 11)
    want.backward(upstream.double())
    got.backward(upstream)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.98, 1.0)])
def test_gae(gamma, lam):
    """verl returns whitened advantages, and returns for masked tokens too."""
    mask, _, values, rewards, *_ = ppo_batch()
    plain = (x.nan_to_num(0).double() for x in (rewards, values))
    want, returns = core_algos.compute_gae_advantage_return(*plain, mask.double(), gamma, lam)
    got = gae_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    assert relative_error(whiten(got[0], mask), torch.where(mask, want, 0.0)) < 1e-6
    assert relative_error(got[1], torch.where(mask, returns, 0.0)) < 1e-7


@pytest.mark.parametrize(
    ("rule", "divisors", "theirs"),
    [
        ("token-mean", {}, {}),
        ("token-mean", {"num_items_in_batch": 71}, {"batch_num_tokens": 71}),
        ("seq-mean-token-mean", {"num_sequences_in_batch": 9}, {"global_batch_size": 9}),
        ("seq-mean-token-sum", {"num_sequences_in_batch": 9}, {"global_batch_size": 9}),
        (
            "seq-mean-token-sum-norm",
            {"num_sequences_in_batch": 9, "max_completion_length": 50},
            {"global_batch_size": 9, "loss_scale_factor": 50},
        ),
        ("token-sum", {}, {}),
    ],
)
def test_value_loss(rule, divisors, theirs):
    mask, _, values, old_values, returns, *_ = ppo_batch()
    leaf = values.nan_to_num(0).double().requires_grad_()
    others = (x.nan_to_num(0).double() for x in (returns, old_values))
    want, clipped = core_algos.compute_value_loss(
        leaf, *others, mask.double(), 0.25, loss_agg_mode=rule, **theirs
    )
    want.backward()
    own = values.clone().requires_grad_()
    options = {"old_values": old_values, "cliprange": 0.25, "normalizer": rule}
    got = value_loss(own, returns, mask, **options, **divisors)
    got.loss.backward()
    assert got.loss.item() == pytest.approx(want.item(), rel=3e-7)
    assert relative_error(own.grad, leaf.grad) < 3e-7
    assert got.metrics["value/clip_ratio"].item() == pytest.approx(clipped.item(), rel=1e-6)
    assert 0.1 < clipped < 0.9
