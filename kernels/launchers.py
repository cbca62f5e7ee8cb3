"""What the rest of the package launches; `grpo_fused.reference` has the same functions."""

from .fused_loss import fused_loss
from .logprob import logprob_bwd, logprob_fwd
from .reduce import reduce
from .rescale import rescale

__all__ = ["fused_loss", "logprob_bwd", "logprob_fwd", "reduce", "rescale"]
