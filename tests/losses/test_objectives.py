"""Both implementations and the derivative of every objective and KL estimator."""

from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl
from batches import make_batch, relative_error
from dppo import DppoTv as UsersDppo

from grpo_fused import (
    LOSSES,
    Cispo,
    Clip,
    DppoKl,
    DppoTv,
    Dro,
    Gmpo,
    ImportanceSampling,
    Ipo,
    PolicyGradient,
    RolloutIs,
    Sapo,
    Vespo,
    grpo_loss,
    selective_log_softmax,
)
from grpo_fused.kernels.launch import kernel
from grpo_fused.kernels.objective import KL_ESTIMATORS as KERNELS
from grpo_fused.kernels.objective import OBJECTIVES
from grpo_fused.losses.kl import KL_ESTIMATORS
from grpo_fused.losses.objectives import Objective
from grpo_fused.testing import check_objective, regimes

CASES = [
    *(Clip(), Clip(0.2, 0.28), Clip(0.1, 0.3, 2.0), Clip(0.2, 0.4, 1.1), Clip(0.01, 0.01)),
    *(Cispo(), Cispo(1.2), Cispo(1.2, 0.8)),
    *(Sapo(), Sapo(3.0, 0.5)),
    PolicyGradient(),
    *(DppoTv(), DppoTv(0.05, 0.3, 2.0), UsersDppo(), UsersDppo(0.05, 0.3, 2.0)),
    *(DppoKl(), DppoKl(0.02, 0.1, 1.5), ImportanceSampling()),
    *(Dro(), Dro(1.0), Ipo(), Ipo(0.01, 0.5), RolloutIs(), RolloutIs(0.05, 1.0)),
]
BOUNDED = [objective for objective in CASES if isinstance(objective, Clip)]


def test_every_objective_is_tested():
    tested = {type(objective) for objective in CASES}
    for row in LOSSES.values():
        assert row.objective.couples != "token" or type(row.objective) in tested
        assert row.level in row.objective.levels
    assert all(OBJECTIVES[cls.name()] is cls.per_token for cls in tested)


@pytest.mark.parametrize("objective", CASES, ids=repr)
def test_derivative_and_kernel(objective, device):
    assert check_objective(objective, device=device) == ["derivative", "kernel"]


@pytest.mark.parametrize("objective", BOUNDED, ids=repr)
def test_regimes_cover_both_bounds(objective):
    _, derivative, clipped = objective.evaluate(*regimes())
    assert (clipped == -1).any() and (clipped == 1).any() and (derivative[clipped == 0] != 0).any()
    assert ((clipped == 0) | (derivative == 0)).all()


@dataclass(frozen=True)
class Wrong(Objective):
    """-A rho^2, with a selectable mistake."""

    mistake: float = 0.0

    def evaluate(self, logp, log_ratio, advantage):
        ratio = log_ratio.clamp(-20.0, 20.0).exp()
        inside = log_ratio.abs() <= 20
        derivative = torch.where(inside, -(2 - (self.mistake == 1)) * advantage * ratio**2, 0.0)
        loss = -advantage * ratio**2 + (self.mistake == 2) * (advantage == 0)
        return loss, derivative, torch.zeros_like(ratio)

    @staticmethod
    @triton.jit
    def per_token(logp, log_ratio, advantage, mistake):
        ratio = tl.exp(tl.minimum(tl.maximum(log_ratio, -20.0), 20.0))
        inside = tl.abs(log_ratio) <= 20
        derivative = tl.where(inside, -2 * advantage * ratio * ratio, 0.0)
        scale = tl.where(mistake == 3, 1.001, 1.0)
        return -advantage * ratio * ratio * scale, derivative, 0.0 * ratio


@pytest.mark.parametrize(
    ("mistake", "message"),
    [(1, "^derivative is"), (2, "loss at advantage 0"), (3, "loss of per_token")],
)
def test_check_objective_finds_mistakes(mistake, message, device):
    assert check_objective(Wrong(), device=device) == ["derivative", "kernel"]
    with pytest.raises(AssertionError, match=message):
        check_objective(Wrong(mistake), device=device)


def test_a_users_objective_in_both_implementations(implementation, device):
    """verl's DPPO, defined outside of the package, against autograd of its formula."""
    batch = make_batch(B=8, extra=0, mask=torch.ones(8, 6), device=device)
    objective, w = UsersDppo(0.02, 0.02, 1.2), torch.rand(8, device=device)
    logits = batch.leaf()
    out = grpo_loss(
        logits,
        batch.ids,
        batch.mask,
        batch.advantages,
        old_logps=batch.old_logps,
        importance_sampling_ratio=w,
        objective=objective,
        normalizer="token-sum",
        implementation=implementation,
    )
    out.loss.backward()
    leaf = batch.logits.double().requires_grad_(True)
    logp = leaf.log_softmax(-1).gather(-1, batch.ids[..., None])[..., 0]
    moved = logp.exp() - batch.old_logps.double().exp()
    advantage = batch.advantages[:, None]
    inside = torch.where(advantage > 0, moved <= 0.02, moved >= -0.02)
    ratio = (logp - batch.old_logps).exp().clamp(max=1.2)
    weight = (ratio * inside * w[:, None]).detach()
    want = -(weight * advantage * logp).sum()
    want.backward()
    assert 0.1 < inside.double().mean() < 0.95
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert relative_error(logits.grad, leaf.grad) < 2e-6


@kernel
def _divergence_kernel(difference_ptr, out_ptr, DIVERGENCE: tl.constexpr):
    i = tl.program_id(0)
    value, derivative, both = DIVERGENCE(tl.load(difference_ptr + i))
    tl.store(out_ptr + 3 * i, value)
    tl.store(out_ptr + 3 * i + 1, derivative)
    tl.store(out_ptr + 3 * i + 2, both)


def differences():
    d = torch.cat([torch.logspace(-4, 0, 41), torch.tensor([2.0, 10.0, 79.0, 80.0, 81.0, 200.0])])
    return torch.cat([d, -d, torch.zeros(1)])


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_kl_estimators(name, device):
    """Derivatives match autograd, kernels match torch; "+" has the gradient of k2."""
    d = differences().double()
    logp = (-d).requires_grad_(True)
    value, derivative, both = KL_ESTIMATORS[name](-logp)
    source = value if not name.endswith("+") else (-logp) ** 2 / 2
    if name == "k3":  # without the cut, beyond which there is no gradient: torch has another at it
        source = torch.where(-logp > 80, value.detach(), torch.expm1(-logp) + logp)
    (gradient,) = torch.autograd.grad(source.sum(), logp)
    torch.testing.assert_close(derivative.detach(), gradient)
    cancelled = (both - (value + derivative)).abs() / (value.abs() + derivative.abs() + 1e-9)
    assert (cancelled < 1e-9).all()
    torch.testing.assert_close(value.detach(), KL_ESTIMATORS[name.rstrip("+")](d)[0])
    got = torch.full((len(d), 3), torch.nan, device=device)
    _divergence_kernel[(len(d),)](d.float().to(device), got, DIVERGENCE=KERNELS[name])
    want = torch.stack([value, derivative, both], dim=1).detach()
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("estimator", ["torch", "triton"])
def test_k3_is_accurate(estimator, device):
    """e^d - d - 1 cancels: at d = 1e-3 the direct float32 formula has an error of 10 %."""
    d = differences()[differences().abs() <= 80].to(device)
    truth = d.double().cpu()
    truth = torch.stack([torch.expm1(truth) - truth, -torch.expm1(truth)], dim=1)
    if estimator == "torch":
        got = torch.stack(KL_ESTIMATORS["k3"](d), dim=1)
    else:
        got = torch.full((len(d), 3), torch.nan, device=device)
        _divergence_kernel[(len(d),)](d, got, DIVERGENCE=KERNELS["k3"])
    errors = (got.double().cpu()[:, :2] - truth).abs() / truth.abs().clamp(min=1e-12)
    cancelled = 2e-7 / d.abs().cpu().clamp(min=1e-7) if estimator == "torch" else 0.0
    assert (errors[:, 0] < 1e-6 + cancelled).all()
    assert (errors[:, 1] < 1e-6).all()


def test_k3_beyond_the_clamp():
    """No gradient where the exponential is cut: -d alone would push away from the reference."""
    value, derivative, _ = KL_ESTIMATORS["k3"](torch.tensor([200.0, -200.0]))
    assert value[0].item() == pytest.approx(torch.tensor(80.0).double().exp().item(), rel=1e-6)
    assert value[1].item() == pytest.approx(199.0)
    assert derivative.tolist() == [0.0, 1.0]


BAD_PARAMS = [
    (Clip, {"epsilon_low": -0.1}),
    (Clip, {"epsilon_high": float("inf")}),
    (Clip, {"epsilon_low": float("nan")}),
    (Clip, {"delta": 0.0}),
    (Clip, {"delta": "2"}),
    (Clip, {"epsilon_low": None}),
    (Clip, {"epsilon_high": torch.tensor(0.2)}),
    (Cispo, {"max_ratio": 0.0}),
    (Sapo, {"temperature_pos": -1.0}),
    (Sapo, {"temperature_neg": float("inf")}),
    (Vespo, {"k_pos": -1.0}),
    (Vespo, {"lambda_pos": 0.0}),
    (Vespo, {"lambda_neg": float("nan")}),
    (Gmpo, {"epsilon": 0.0}),
]


@pytest.mark.parametrize(("cls", "params"), BAD_PARAMS, ids=str)
def test_invalid_params(cls, params):
    (name,) = params
    with pytest.raises(ValueError, match=f"{name} must be"):
        cls(**params)


def twin(sign):
    """Each call defines a class of the same name, as rerunning a notebook cell does."""

    @dataclass(frozen=True)
    class Twin(Objective):
        def evaluate(self, logp, log_ratio, advantage):
            return sign * advantage * logp, sign * advantage, torch.zeros_like(logp)

        per_token = staticmethod(gain if sign > 0 else PolicyGradient.per_token)

    return Twin()


@triton.jit
def gain(logp, log_ratio, advantage):
    return advantage * logp, advantage, 0.0 * advantage


def test_classes_of_one_name_are_distinct(implementation, device):
    batch = make_batch(device=device)
    arguments = (batch.logits, batch.ids, batch.mask, batch.advantages)
    plus, minus = twin(1), twin(-1)
    losses = [
        grpo_loss(*arguments, objective=objective, implementation=implementation).loss.item()
        for objective in (plus, minus, PolicyGradient())
    ]
    assert losses[0] == -losses[1] and losses[1] == losses[2] != 0


@dataclass(frozen=True)
class OnlyTorch(Objective):
    """-A log(1 + c rho) / c, without `per_token`."""

    damping: float = 0.5

    def evaluate(self, logp, log_ratio, advantage):
        ratio = log_ratio.clamp(-20.0, 20.0).exp()
        inside = log_ratio.abs() <= 20
        derivative = torch.where(inside, -advantage * ratio / (1 + self.damping * ratio), 0.0)
        loss = -advantage * torch.log(1 + self.damping * ratio) / self.damping
        return torch.where(advantage == 0, 0.0, loss), derivative, torch.zeros_like(ratio)


def test_an_objective_without_per_token(implementation, device):
    assert check_objective(OnlyTorch(), device=device) == ["derivative"]
    batch = make_batch(extra=0, mask=torch.ones(4, 6), device=device)
    logits = batch.leaf()
    grpo_loss(
        *(logits, batch.ids, batch.mask, batch.advantages),
        old_logps=batch.old_logps,
        objective=OnlyTorch(0.7),
        normalizer="token-sum",
        implementation=implementation,
    ).loss.backward()
    leaf = batch.logits.double().requires_grad_(True)
    logp = leaf.log_softmax(-1).gather(-1, batch.ids[..., None])[..., 0]
    ratio = torch.exp(logp - batch.old_logps)
    (-batch.advantages[:, None] * torch.log(1 + 0.7 * ratio) / 0.7).sum().backward()
    assert relative_error(logits.grad, leaf.grad) < 2e-6


def test_check_objective_requires_a_token_level_objective():
    with pytest.raises(ValueError, match="token-level"):
        check_objective(Vespo())


@pytest.mark.parametrize("loss_type", ["ipo", "rollout_is"])
def test_tokens_that_the_sampler_did_not_report(loss_type, implementation, device):
    """NaN in sampling_logps is the policy's own log-probability, as in `rollout_weights`."""
    batch = make_batch(device=device)
    inputs = (batch.ids, batch.mask, batch.advantages)
    logps, _ = selective_log_softmax(batch.logits, *inputs[:2], implementation=implementation)
    sampling, results = batch.old_logps.clone(), []
    for unknown in (logps[0, 1], torch.nan):
        sampling[0, 1] = unknown
        leaf = batch.leaf()
        out = grpo_loss(
            *(leaf * 1.0, *inputs),
            loss_type=loss_type,
            old_logps=batch.old_logps,
            sampling_logps=sampling,
            implementation=implementation,
        )
        out.loss.backward()
        results.append((out.loss, leaf.grad))
    assert results[0][0].isfinite()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)
