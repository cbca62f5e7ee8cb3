"""`check_objective`: tests of user-defined objectives."""

import itertools

import torch
from torch import Tensor

from grpo_fused.kernels.objective import OBJECTIVES
from grpo_fused.losses.objectives import Objective
from grpo_fused.validation import choose_implementation

RATIOS = (0.05, 0.5, 0.79, 0.81, 0.95, 1.0, 1.05, 1.15, 1.27, 1.35, 1.5, 3.0, 5.5)
EXTREME_LOG_RATIOS = (-200.0, -79.0, 79.0, 200.0)  # around the clamp of exponents at +-80
ADVANTAGES = (-1.7, -0.3, 0.0, 0.3, 1.0, 1.7)
LOGPS = (-9.0, -2.0, -0.1)


def regimes(device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Grid of test inputs that covers every branch of the built-in objectives.

    It has ratios inside and outside of usual bounds, log-ratios inside and outside of the clamp of
    exponents at +-80, and positive, negative and zero advantages. `check_objective` puts the
    sampler's log-probability halfway between those of the policy and of the old one.

    Returns:
        (logp, log_ratio, advantage), each (n,) float32 on the device.
    """
    log_ratios = [*torch.tensor(RATIOS).log().tolist(), *EXTREME_LOG_RATIOS]
    cases = torch.tensor(list(itertools.product(LOGPS, log_ratios, ADVANTAGES)))
    logp, log_ratio, advantage = (column.contiguous().to(device) for column in cases.unbind(1))
    return logp, log_ratio, advantage


def check_objective(
    objective: Objective, *, device: str | torch.device = "cpu", rtol: float = 1e-5
) -> list[str]:
    """Check the implementation of a token-level objective on a grid of inputs (`regimes`).

    Verifies that
    - the derivative returned by `evaluate` matches autograd of its loss, in float64;
    - clipped is 0 at advantage 0, and so are loss and derivative if the objective needs one;
    - `per_token` matches `evaluate` in float32, if the device can run it.

    Args:
        objective: an Objective with its parameters.
        device: of the comparison with `per_token`: a GPU, or the CPU under TRITON_INTERPRET=1.
        rtol: relative tolerance of that comparison.

    Returns:
        Names of the checks that ran: "derivative", and "kernel" if `per_token` ran.

    Raises:
        ValueError: not an Objective, or one that couples tokens: autograd differentiates those.
        AssertionError: a check failed; the message has its first failing case. The grid avoids the
            kinks of usual bounds, where derivatives are not unique.

    Example:
        check_objective(Clip(0.2, 0.28))
    """
    if not isinstance(objective, Objective) or objective.couples != "token":
        raise ValueError(f"objective must be a token-level Objective, got {objective!r}")
    logp, log_ratio, advantage = (column.double() for column in regimes())
    logp.requires_grad_(True)
    log_ratio.requires_grad_(True)
    sampling_logp = (logp - log_ratio / 2).detach()
    loss, derivative, clipped = objective.of_tokens(logp, log_ratio, advantage, sampling_logp)
    gradients = torch.autograd.grad(
        loss.sum(), (logp, log_ratio), allow_unused=True, materialize_grads=True
    )
    columns = (logp, log_ratio, advantage)
    _compare("derivative", derivative, sum(gradients), columns, 1e-9)
    zero = torch.zeros_like(loss)
    results = {"loss": loss, "derivative": derivative, "clipped": clipped}
    for name, values in results.items():
        if name != "clipped" and not objective.needs_advantage:
            continue
        at_zero = torch.where(advantage == 0, values, zero)
        _compare(f"{name} at advantage 0", at_zero, zero, columns, 0.0)
    checks = ["derivative"]
    if hasattr(objective, "per_token") and can_run_kernels(device):
        columns = regimes(device)
        sampling_logp = columns[0] - columns[1] / 2
        got = run_per_token(objective, *columns, sampling_logp)
        want = objective.of_tokens(*columns, sampling_logp)
        for name, a, b in zip(results, got, want, strict=True):
            _compare(f"{name} of per_token", a, b, columns, rtol)
        checks.append("kernel")
    return checks


def can_run_kernels(device):
    """Whether Triton runs on the device, natively or in its interpreter."""
    try:
        return choose_implementation("triton", torch.device(device)) == "triton"
    except ValueError:
        return False


def run_per_token(objective, logp, log_ratio, advantage, sampling_logp=None):
    """(loss, derivative, clipped), each (n,), of an objective's `per_token`, run by Triton.

    A sampling_logp of None is that of the policy itself.
    """
    from grpo_fused.kernels.evaluate import evaluate

    out = torch.empty(3, len(logp), device=logp.device)
    sampling_logp = logp if sampling_logp is None else sampling_logp
    columns = (logp, log_ratio, advantage, sampling_logp if objective.uses_sampling_logps else None)
    evaluate(OBJECTIVES[objective.name()], objective.params(), *columns, out)
    return out.unbind()


def _compare(name, got, want, columns, rtol):
    got, want = got.detach().double(), want.detach().double()
    wrong = ~((got - want).abs() <= rtol * (want.abs() + 1e-6))
    if wrong.any():
        first = wrong.nonzero()[0, 0]
        case = ", ".join(
            f"{column} {values[first].item():.6g}"
            for column, values in zip(("logp", "log_ratio", "advantage"), columns, strict=True)
        )
        found = f"{got[first].item():.9g}, expected {want[first].item():.9g}"
        raise AssertionError(f"{name} is {found} at {case} ({int(wrong.sum())} cases)")
