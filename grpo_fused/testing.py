"""For those who write an objective: is its derivative right, and are its two spellings one?"""

import itertools

import torch

from grpo_fused.kernels.objective import HAS_TRITON, OBJECTIVES
from grpo_fused.objectives import Objective
from grpo_fused.sequence_objectives import SequenceObjective
from grpo_fused.validation import choose_implementation

RATIOS = (0.05, 0.5, 0.79, 0.81, 0.95, 1.0, 1.05, 1.15, 1.27, 1.35, 1.5, 3.0, 5.5)
FAR = (-200.0, -79.0, 79.0, 200.0)
ADVANTAGES = (-1.7, -0.3, 0.0, 0.3, 1.0, 1.7)
LOGPS = (-9.0, -2.0, -0.1)


def regimes(device="cpu"):
    """(logp, log_ratio, advantage), each (n,) float32: inside and outside of usual bounds and of
    the clamp of exponentials at +-80, advantages of either sign and 0."""
    log_ratios = [*torch.tensor(RATIOS).log().tolist(), *FAR]
    cases = torch.tensor(list(itertools.product(LOGPS, log_ratios, ADVANTAGES)))
    return [column.contiguous().to(device) for column in cases.unbind(1)]


def check_objective(objective, *, device="cpu", rtol=1e-5):
    """Hold an objective of your own to what the package needs of it.

    On a grid of log-probabilities, ratios and advantages that reaches far and near: the derivative
    that `evaluate` returns is what autograd makes of its loss, in float64; nothing is lost or
    gained at advantage 0; and where the device can run it, `per_token` gives the same numbers.

    Args:
        objective: an Objective with its knobs.
        device: of the comparison with `per_token`; a GPU, or the CPU under TRITON_INTERPRET=1.
        rtol: relative to the size of the value, for the two spellings in float32.

    Returns:
        Names of what was compared: "derivative", and "kernel" if `per_token` ran.

    Raises:
        ValueError: an objective that couples tokens: it has no derivative of its own to check.
        AssertionError: with the first case that disagrees. Kinks (a ratio exactly on a bound) are
            nowhere on the grid for usual bounds.

    Example:
        check_objective(Clip(0.2, 0.28))
    """
    if not isinstance(objective, Objective) or isinstance(objective, SequenceObjective):
        raise ValueError(f"objective must be an Objective per token, got {objective!r}")
    logp, log_ratio, advantage = (column.double() for column in regimes())
    logp.requires_grad_(True)
    log_ratio.requires_grad_(True)
    loss, derivative, clipped = objective.evaluate(logp, log_ratio, advantage)
    gradients = torch.autograd.grad(
        loss.sum(), (logp, log_ratio), allow_unused=True, materialize_grads=True
    )
    columns = (logp, log_ratio, advantage)
    _compare("derivative", derivative, sum(gradients), columns, 1e-9)
    nothing = advantage == 0
    zero = torch.zeros_like(loss)
    for name, values in (("loss", loss), ("derivative", derivative), ("clipped", clipped)):
        _compare(f"{name} at advantage 0", torch.where(nothing, values, zero), zero, columns, 0.0)
    done = ["derivative"]
    if hasattr(objective, "per_token") and can_run_kernels(device):
        columns = regimes(device)
        got, want = run_per_token(objective, *columns), objective.evaluate(*columns)
        for name, a, b in zip(("loss", "derivative", "clipped"), got, want, strict=True):
            _compare(f"{name} of per_token", a, b, columns, rtol)
        done.append("kernel")
    return done


def can_run_kernels(device):
    """Whether Triton runs on the device, by its driver or by the interpreter."""
    try:
        return HAS_TRITON and choose_implementation("triton", torch.device(device))
    except ValueError:
        return False


def run_per_token(objective, logp, log_ratio, advantage):
    """(loss, derivative, clipped) (n,) of an objective's `per_token`, computed by Triton."""
    from grpo_fused.kernels.evaluate import evaluate

    out = torch.empty(3, len(logp), device=logp.device)
    evaluate(OBJECTIVES[objective.name()], objective.knobs(), logp, log_ratio, advantage, out)
    return out.unbind()


def _compare(what, got, want, columns, rtol):
    got, want = got.detach().double(), want.detach().double()
    wrong = ~((got - want).abs() <= rtol * (want.abs() + 1e-6))
    if wrong.any():
        first = wrong.nonzero()[0, 0]
        case = ", ".join(
            f"{name} {column[first].item():.6g}"
            for name, column in zip(("logp", "log_ratio", "advantage"), columns, strict=True)
        )
        found = f"{got[first].item():.9g}, want {want[first].item():.9g}"
        raise AssertionError(f"{what} is {found} at {case} ({int(wrong.sum())} cases)")
