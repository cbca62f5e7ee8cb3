"""Every objective: its two spellings, and its derivative, wherever it branches."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from grpo_fused import LOSSES, Clip
from grpo_fused.kernels.launch import kernel
from grpo_fused.kernels.objective import OBJECTIVES, k3
from grpo_fused.objectives import Objective
from grpo_fused.objectives import k3 as torch_k3

KNOBS = {
    Clip: [Clip(), Clip(0.2, 0.28), Clip(0.1, 0.3, 2.0), Clip(0.2, 0.4, 1.1), Clip(0.0, 0.0)],
}
CASES = [objective for objectives in KNOBS.values() for objective in objectives]


def regimes():
    """Log-ratios and advantages that reach every branch: far, clipped, inside; A < 0, = 0, > 0."""
    ratios = torch.tensor([0.05, 0.5, 0.79, 0.81, 0.95, 1.0, 1.05, 1.15, 1.27, 1.35, 1.5, 3.0])
    log_ratios = torch.cat([ratios.log(), torch.tensor([-200.0, -79.0, 79.0, 200.0])])
    pairs = itertools.product(log_ratios.tolist(), (-1.7, -0.3, 0.0, 0.3, 1.7))
    log_ratio, advantage = torch.tensor(list(pairs)).unbind(1)
    return -1.0 - torch.rand(len(log_ratio)), log_ratio.contiguous(), advantage.contiguous()


@kernel
def _evaluate_kernel(
    logp_ptr, log_ratio_ptr, advantage_ptr, knobs, out_ptr, OBJECTIVE: tl.constexpr
):
    i = tl.program_id(0)
    loss, dlogp, clipped = OBJECTIVE(
        tl.load(logp_ptr + i), tl.load(log_ratio_ptr + i), tl.load(advantage_ptr + i), *knobs
    )
    tl.store(out_ptr + 3 * i, loss)
    tl.store(out_ptr + 3 * i + 1, dlogp)
    tl.store(out_ptr + 3 * i + 2, clipped)


@kernel
def _k3_kernel(difference_ptr, out_ptr):
    i = tl.program_id(0)
    value, derivative = k3(tl.load(difference_ptr + i))
    tl.store(out_ptr + 2 * i, value)
    tl.store(out_ptr + 2 * i + 1, derivative)


def test_every_objective_is_tested():
    assert {type(row.objective) for row in LOSSES.values()} <= set(KNOBS)
    assert all(OBJECTIVES[cls.name()] is cls.per_token for cls in KNOBS)


@pytest.mark.parametrize("objective", CASES, ids=repr)
def test_the_two_spellings_agree(objective, device):
    inputs = [tensor.to(device) for tensor in regimes()]
    out = torch.full((len(inputs[0]), 3), torch.nan, device=device)
    _evaluate_kernel[(len(out),)](
        *inputs, tuple(objective.knobs()), out, OBJECTIVE=type(objective).per_token
    )
    want = torch.stack(objective.evaluate(*inputs), dim=1)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("objective", CASES, ids=repr)
def test_the_derivative_is_autograds(objective):
    """In float64, away from the kinks, where every subgradient is right."""
    logp, log_ratio, advantage = (tensor.double() for tensor in regimes())
    logp, log_ratio = logp.requires_grad_(True), log_ratio.requires_grad_(True)
    loss, derivative, clipped = objective.evaluate(logp, log_ratio, advantage)
    by_logp, by_ratio = torch.autograd.grad(
        loss.sum(), (logp, log_ratio), allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(derivative, by_logp + by_ratio)
    assert ((clipped == 0) | (derivative == 0)).all()
    assert (clipped == -1).any() and (clipped == 1).any() and (derivative[clipped == 0] != 0).any()


def test_nothing_is_gained_or_lost_at_advantage_zero():
    logp, log_ratio, advantage = regimes()
    for objective in CASES:
        loss, derivative, clipped = objective.evaluate(logp, log_ratio, torch.zeros_like(advantage))
        assert (loss == 0).all() and (derivative == 0).all() and (clipped == 0).all()


@pytest.mark.parametrize("spelling", ["torch", "triton"])
def test_k3_keeps_its_digits(spelling, device):
    """e^d - d - 1 cancels: at d = 1e-3 the plain float32 formula is off by 10 %."""
    d = torch.cat([torch.logspace(-4, 0, 41), torch.tensor([2.0, 10.0, 79.0])])
    d = torch.cat([d, -d, torch.zeros(1)]).to(device)
    truth = d.double().cpu()
    truth = torch.stack([torch.expm1(truth) - truth, -torch.expm1(truth)], dim=1)
    if spelling == "torch":
        got = torch.stack(torch_k3(d), dim=1)
    else:
        got = torch.full((len(d), 2), torch.nan, device=device)
        _k3_kernel[(len(d),)](d, got)
    errors = (got.double().cpu() - truth).abs() / truth.abs().clamp(min=1e-12)
    cancelled = 2e-7 / d.abs().cpu().clamp(min=1e-7) if spelling == "torch" else 0.0
    assert (errors[:, 0] < 1e-6 + cancelled).all()
    assert (errors[:, 1] < 1e-6).all()


def test_k3_beyond_the_clamp():
    """The exponential stops at e^80 and has derivative 0 there; the linear term goes on."""
    value, derivative = torch_k3(torch.tensor([200.0, -200.0]))
    assert value[0].item() == pytest.approx(torch.tensor(80.0).double().exp().item(), rel=1e-6)
    assert value[1].item() == pytest.approx(199.0)
    assert derivative.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("knobs", "name"),
    [
        ({"epsilon_low": -0.1}, "epsilon_low"),
        ({"epsilon_high": float("inf")}, "epsilon_high"),
        ({"epsilon_low": float("nan")}, "epsilon_low"),
        ({"delta": 0.0}, "delta"),
    ],
)
def test_clip_refuses_bad_knobs(knobs, name):
    with pytest.raises(ValueError, match=name):
        Clip(**knobs)


class TestUserObjective:
    """A loss nobody has written yet, defined outside the package, runs in both implementations."""

    def test_runs(self, implementation, device):
        from dataclasses import dataclass

        from batches import make_batch, relative_error

        from grpo_fused import grpo_loss

        @dataclass(frozen=True)
        class Damped(Objective):
            """-A log(1 + c rho) / log(1 + c): concave in the ratio, never clipped."""

            damping: float = 0.5

            def evaluate(self, logp, log_ratio, advantage):
                ratio = torch.exp(log_ratio)
                c = self.damping
                derivative = -advantage * c * ratio / (1 + c * ratio)
                return -advantage * torch.log(1 + c * ratio), derivative, torch.zeros_like(ratio)

            @staticmethod
            @triton.jit
            def per_token(logp, log_ratio, advantage, c):
                ratio = tl.exp(log_ratio)
                derivative = -advantage * c * ratio / (1 + c * ratio)
                return -advantage * tl.log(1 + c * ratio), derivative, 0.0 * ratio

        batch = make_batch(extra=0, mask=torch.ones(4, 6), device=device)
        logits = batch.leaf()
        out = grpo_loss(
            logits,
            batch.ids,
            batch.mask,
            batch.advantages,
            old_logps=batch.old_logps,
            objective=Damped(0.7),
            normalizer="token-sum",
            implementation=implementation,
        )
        out.loss.backward()
        leaf = batch.logits.double().requires_grad_(True)
        logp = leaf.log_softmax(-1).gather(-1, batch.ids[..., None])[..., 0]
        ratio = torch.exp(logp - batch.old_logps)
        want = (-batch.advantages[:, None] * torch.log(1 + 0.7 * ratio)).sum()
        want.backward()
        assert out.loss.item() == pytest.approx(want.item(), rel=1e-5)
        assert relative_error(logits.grad, leaf.grad) < 2e-6
