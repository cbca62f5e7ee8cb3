"""PPO with a value model: every part, and all of them together, against float64 loops."""

import math

import pytest
import torch
from batches import relative_error
from packing import cu_seqlens, pack, unpack
from ppo_oracle import (
    KL,
    LENGTHS,
    gae_equation,
    kl_rewards_equation,
    ppo_batch,
    ppo_equation,
    token_batch,
)

from grpo_fused import (
    gae_advantages,
    grpo_loss,
    kl_rewards,
    selective_log_softmax,
    value_loss,
    whiten,
)

NAN = math.nan


def assert_close(got, want, atol=1e-6):
    assert got.dtype == torch.float32
    want = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1), (1, 1), (0.99, 0), (0, 1)])
def test_gae(gamma, lam, dtype):
    rewards, values, mask = token_batch()
    got = gae_advantages(rewards, values, mask.to(dtype), gamma=gamma, lam=lam)
    for tensor, want in zip(got, gae_equation(rewards, values, mask, gamma, lam), strict=True):
        assert_close(tensor, want)
        assert (tensor[~mask] == 0).all()


def test_gae_with_lambda_1_is_the_discounted_return_minus_the_value():
    rewards, values, _ = token_batch(T=9)
    rewards, values = rewards.nan_to_num(0), values.nan_to_num(0).requires_grad_()
    discount = 0.9 ** (torch.arange(9) - torch.arange(9)[:, None]).double()
    want = rewards.double() @ discount.triu().T
    advantages, returns = gae_advantages(rewards, values, gamma=0.9, lam=1.0)
    assert not advantages.requires_grad and not returns.requires_grad
    assert_close(returns, want.tolist())
    assert_close(advantages, (want - values).tolist())


@pytest.mark.parametrize("decay", [1.0, 0.9999, 0.95, 1e-3, 1e-30, 0.0])
def test_gae_of_long_sequences(decay):
    """The reward of the last of 32768 tokens adds decay^n to the token n before it."""
    rewards = torch.zeros(1, 32768)
    rewards[0, -1] = 1.0
    got, _ = gae_advantages(rewards, torch.zeros(1, 32768), gamma=1.0, lam=decay)
    want = decay ** torch.arange(32767, -1, -1, dtype=torch.float64)[None]
    assert_close(got, want.tolist(), atol=1e-37)
    summed, _ = gae_advantages(torch.ones_like(rewards), torch.zeros(1, 32768), lam=decay)
    assert_close(summed, want.flip(1).cumsum(1).flip(1).tolist())


def test_whiten():
    advantages, _, mask = token_batch()
    got = whiten(advantages, mask)
    active = advantages[mask].double()
    assert_close(got[mask], ((active - active.mean()) / active.std()).tolist())
    assert (got[~mask] == 0).all()
    small = whiten(torch.tensor([1e-4, -1e-4]))  # of variance 2e-8, beside the epsilon of 1e-8
    assert_close(small, [3**-0.5, -(3**-0.5)])
    assert whiten(torch.tensor([3.0, NAN]), torch.tensor([1, 0])).tolist() == [0.0, 0.0]
    assert (
        whiten(torch.full((3, 2), 0.1)).abs().max() < 1e-6 and whiten(torch.zeros(0)).numel() == 0
    )


@pytest.mark.parametrize("kl_estimator", KL)
@pytest.mark.parametrize("per_token", [False, True])
def test_kl_rewards(kl_estimator, per_token):
    mask, scores, rewards, _, _, logps, ref_logps = ppo_batch()
    rewards = rewards if per_token else scores
    options = {"beta": 0.3, "kl_estimator": kl_estimator}
    want = kl_rewards_equation(rewards, logps, ref_logps, mask, **options)
    logps.requires_grad_()
    got = kl_rewards(rewards, logps, ref_logps, mask, **options)
    assert not got.requires_grad and got.dtype == torch.float32
    assert relative_error(got, want) < 1e-7 and (got[~mask] == 0).all()
    packed = pack(LENGTHS, logps, ref_logps, mask)
    rewards = pack(LENGTHS, rewards)[0] if per_token else rewards
    packed = kl_rewards(
        rewards, *packed, **options, cu_seqlens=cu_seqlens(LENGTHS, "cpu", torch.int64)
    )
    assert torch.equal(unpack(LENGTHS, 37, packed), got)


def test_kl_rewards_in_words():
    """The reward stands at the last active token; without beta the KL may be anything."""
    logps = torch.tensor([[-math.inf, -1.0, NAN], [-2.0, NAN, -3.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    got = kl_rewards(torch.tensor([True, False]), logps, torch.zeros(2, 3), mask, beta=0)
    assert got.tolist() == [[0, 1, 0], [0, 0, 0]]
    got = kl_rewards(torch.tensor([4, 8]), logps, torch.zeros(2, 3), mask, beta=0.5)
    assert got.tolist() == [[math.inf, 4.5, 0], [1, 0, 9.5]]
    got = kl_rewards(torch.tensor([4, 8]), torch.zeros(2, 3), torch.zeros(2, 3), beta=0.5)
    assert got.tolist() == [[0, 0, 4], [0, 0, 8]]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1), (0.99, 0)])
def test_gae_of_packed_sequences_is_that_of_padded_ones(gamma, lam, masked):
    """Neither values nor advantages pass from one sequence to the one before it."""
    mask, _, rewards, values, *_ = ppo_batch()
    if not masked:
        mask = torch.arange(37) < torch.tensor(LENGTHS)[:, None]
        rewards, values = rewards.nan_to_num(0.4), values.nan_to_num(-0.3)
    want = gae_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    tensors = pack(LENGTHS, rewards, values, mask if masked else None)
    ends = cu_seqlens(LENGTHS, "cpu")
    got = gae_advantages(*tensors, gamma=gamma, lam=lam, cu_seqlens=ends)
    for packed, padded in zip(got, want, strict=True):
        # The scan doubles its steps from other places: sums are rounded in another order.
        assert relative_error(unpack(LENGTHS, 37, packed), padded) < 1e-7


def test_all_together_are_ppo():
    """Rewards, advantages, policy loss and value loss of a batch, by one call each."""
    mask, scores, values, old_values, _, noise, ref_noise = ppo_batch(T=37)
    generator = torch.Generator().manual_seed(9)
    logits = 2 * torch.randn(5, 37, 11, generator=generator)
    ids = torch.randint(0, 11, (5, 37), generator=generator)
    logps = selective_log_softmax(logits, ids)[0]
    old_logps, ref_logps = logps + 0.15 * (noise + 2), logps + 0.2 * (ref_noise + 2)
    wanted = ppo_equation(
        logits, ids, mask, scores, old_logps, ref_logps, old_values, values, beta=0.05
    )

    logits.requires_grad_()
    values.requires_grad_()
    rewards = kl_rewards(scores, old_logps, ref_logps, mask, beta=0.05)
    advantages, returns = gae_advantages(rewards, old_values, mask)
    advantages = whiten(advantages, mask)
    policy = grpo_loss(logits, ids, mask, advantages, old_logps=old_logps, loss_type="ppo")
    critic = value_loss(
        values, returns, mask, old_values=old_values, normalizer="seq-mean-token-mean"
    )
    (policy.loss + 0.1 * critic.loss).backward()
    assert 0 < policy.metrics["clip_ratio/region_mean"] and 0 < critic.metrics["value/clip_ratio"]
    for got, want in zip((logits.grad, values.grad), wanted, strict=True):
        assert relative_error(got, want) < 1e-6
    assert (values.grad[~mask] == 0).all()


def test_reinforce_plus_plus_is_a_value_model_of_zeros():
    """Its eq. 8 and 10: A_t = r - beta sum of the KL from t on, normalised over all tokens."""
    mask, scores, _, _, _, logps, ref_logps = ppo_batch()
    rewards = kl_rewards(scores, logps, ref_logps, mask, beta=0.1)
    _, returns = gae_advantages(rewards, torch.zeros_like(rewards), mask, lam=1.0)
    plain = []
    for b, t in mask.nonzero().tolist():
        later = [s for s in range(t, 37) if mask[b, s]]
        divergence = sum(logps[b, s].item() - ref_logps[b, s].item() for s in later)
        plain.append(scores[b].item() - 0.1 * divergence)
    assert relative_error(returns[mask], torch.tensor(plain)) < 1e-6
    center = sum(plain) / len(plain)
    spread = math.sqrt(sum((a - center) ** 2 for a in plain) / (len(plain) - 1))
    want = torch.tensor([(a - center) / spread for a in plain])
    assert relative_error(whiten(returns, mask)[mask], want) < 1e-6


@pytest.mark.parametrize("where", ["meta", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_no_synchronisation(where, request):
    """Meta tensors have no values: reading one raises an error."""
    tokens, packed = torch.zeros(2, 9, device=where), torch.zeros(9, device=where)
    ends = torch.tensor([0, 4, 9], device=where)
    if where == "cuda":
        request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
        torch.cuda.set_sync_debug_mode("error")
    assert kl_rewards(tokens[:, 0], tokens, tokens, tokens, beta=0.1).shape == (2, 9)
    assert kl_rewards(packed[:2], packed, packed, beta=0.1, cu_seqlens=ends).shape == (9,)
    assert gae_advantages(tokens, tokens, tokens)[1].shape == (2, 9)
    assert gae_advantages(packed, packed, packed, cu_seqlens=ends)[1].shape == (9,)
    assert whiten(tokens, tokens).shape == (2, 9)


def gae(*rest, **options):
    return lambda: gae_advantages(TOKENS, *rest, **options)


def kl(rewards, ref=None, **options):
    ref = TOKENS if ref is None else ref
    return lambda: kl_rewards(rewards, TOKENS, ref, **{"beta": 0.1, **options})


TOKENS, ROW = torch.zeros(2, 3), torch.zeros(6)
BAD = {
    "values": (gae(TOKENS.T), r"values must have shape \(2, 3\) on cpu, got \(3, 2\)"),
    "mask": (gae(TOKENS, ROW), r"mask must have shape \(2, 3\)"),
    "gamma": (gae(TOKENS, gamma=1.1), r"gamma must be a number in \[0, 1\], got 1.1"),
    "lam": (gae(TOKENS, lam=NAN), r"lam must be a number in \[0, 1\], got nan"),
    "device": (lambda: whiten(TOKENS, TOKENS.to("meta")), "mask .*on cpu, got .*on meta"),
    "packed": (lambda: gae_advantages(ROW, ROW), "rewards must .*packed tensors need cu_seqlens"),
    "rewards": (kl(ROW), r"rewards must have shape \(2,\) or \(2, 3\) on cpu, got \(6,\)"),
    "list": (kl([0.0, 1.0]), r"rewards must be a tensor of real numbers, got \[0.0, 1.0\]"),
    "ref": (kl(ROW[:2], ref=TOKENS.T), r"ref_logps must have shape \(2, 3\)"),
    "beta": (kl(ROW[:2], beta=NAN), "beta must be a finite number, got nan"),
    "estimator": (kl(ROW[:2], kl_estimator="k4"), "kl_estimator must be one of k1, .*got 'k4'"),
}


@pytest.mark.parametrize("call", BAD)
def test_invalid_arguments(call):
    with pytest.raises(ValueError, match=BAD[call][1]):
        BAD[call][0]()
