"""What the rest of the package launches; `grpo_fused.reference` has the same functions."""

from .fused_loss import fused_loss
from .linear_launchers import RowLaunchers, linear_launchers
from .logprob import logprob_bwd, logprob_fwd
from .packing import locate
from .reduce import reduce
from .rescale import rescale

linear_loss, linear_logprob_fwd, linear_logprob_bwd = linear_launchers(
    RowLaunchers(fused_loss, logprob_fwd, logprob_bwd)
)

__all__ = [
    "fused_loss",
    "linear_logprob_bwd",
    "linear_logprob_fwd",
    "linear_loss",
    "locate",
    "logprob_bwd",
    "logprob_fwd",
    "reduce",
    "rescale",
]
