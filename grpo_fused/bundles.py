"""The bundles that travel from the public functions to the kernels.

A value per token is a number, a 0-d tensor, or a contiguous (B, T) float32 tensor. Packed batches
of N tokens are one row: B = 1, T = N. Bundles are taken apart in `ops` alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

Number = float | Tensor  # a Python number or a 0-d tensor
PerToken = float | Tensor  # ... or (B, T)


class Support(NamedTuple):
    """The columns that the sampler kept of every row of logits: ids[start:stop] of its token."""

    starts: Tensor  # (B, T) int64, contiguous
    stops: Tensor  # (B, T) int64, contiguous
    ids: Tensor  # (K,) integer, distinct within a row

    def per_token(self, function):
        """A function of values per token, applied to those here."""
        return Support(function(self.starts), function(self.stops), self.ids)


class Tokens(NamedTuple):
    """Per-token inputs of the kernels; constants for autograd.

        loss = w_policy objective(logp, logp - old_logps, advantages) + w_kl KL - w_entropy H

    A weight of 0 drops its term. Log-probabilities need the first three fields and the last alone.
    """

    ids: Tensor  # (B, T) integer, contiguous
    active: Tensor | None  # (B, T) bool, contiguous; None: all tokens are
    temperature: PerToken = 1.0
    advantages: PerToken | None = None  # or (B,): over logits, and for sequence-level losses
    old_logps: Tensor | None = None  # (B, T); None: on policy
    ref_logps: Tensor | None = None  # (B, T); None: no KL
    w_policy: PerToken | None = None  # normaliser, rollout ratio, policy mask
    w_kl: PerToken | None = None  # normaliser, beta
    w_entropy: PerToken | None = None  # None: no entropy bonus
    correction: Tensor | None = None  # rollout ratio (B,) or (B, T), for `SequenceObjective`s
    sampling_logps: Tensor | None = None  # (B, T), of the sampler, or None: not read, or on policy
    support: Support | None = None  # None: no softmax is over kept columns

    def of_softmax(self):
        """The fields that log-probabilities need, alone."""
        return Tokens(self.ids, self.active, self.temperature, support=self.support)


def per_token(function, bundle):
    """A bundle with a function of values per token applied to each field, a support's included."""
    return bundle._make(
        value.per_token(function) if isinstance(value, Support) else function(value)
        for value in bundle
    )


class Scales(NamedTuple):
    """Logit scale and softcap, applied before the temperature."""

    logit_scale: Number = 1.0
    logit_softcap: Number | None = None


class LogProbs(NamedTuple):
    """Log-probabilities and entropies (B, T); or, as flags, which of them are wanted."""

    logps: Tensor | None
    entropies: Tensor | None
    kept_logps: Tensor | None = None  # over the support
    kept_entropies: Tensor | None = None

    def over(self, support: bool):
        """(log-probabilities, entropies) over the support or over the vocabulary."""
        return self[2:] if support else self[:2]


class OverSupport(NamedTuple):
    """Which terms of a loss are over the support; the others are over the vocabulary."""

    policy: bool = False  # ratio and objective
    kl: bool = False
    entropy: bool = False

    def wanted(self, tokens, entropy):
        """`LogProbs` of flags: what a loss on these tokens needs, with entropies of one softmax."""
        if tokens.support is None:
            return LogProbs(True, entropy)
        kl_over_all = tokens.ref_logps is not None and not self.kl
        entropy_over_all = entropy and not self.entropy
        logps = not self.policy or kl_over_all or entropy_over_all
        return LogProbs(logps, entropy_over_all, True, entropy and self.entropy)


class Formula(NamedTuple):
    """Which loss the kernels compute: names that launchers resolve, and numbers."""

    objective: str  # a key of `Objective.by_name`
    params: list[float]
    kl_estimator: str
    bias_correction: bool  # whether the KL is multiplied by the ratio
    grad_scale: Number  # expected upstream gradient, folded into the gradient alone
    over: OverSupport = OverSupport()
    uses_sampling: bool = False  # whether the objective takes the log-probability of the sampler


class Outputs(NamedTuple):
    """Outputs of the fused loss: (B, T) float32, 0 where masked, and the gradient."""

    loss: Tensor  # weighted
    kl: Tensor
    clipped: Tensor  # -1, 0, +1: the active clip bound
    ratio: Tensor
    logps: Tensor
    entropies: Tensor | None
    dlogits: Tensor | None = None  # (B, L, V)


class Statistics(NamedTuple):
    """Softmax statistics of the rows, (B, T) float32, from which the gradient starts.

    Over the vocabulary and over the support; None = not computed.
    """

    logps: Tensor | None
    entropies: Tensor | None
    maxima: Tensor | None = None
    totals: Tensor | None = None
    kept_logps: Tensor | None = None
    kept_entropies: Tensor | None = None
    kept_maxima: Tensor | None = None
    kept_totals: Tensor | None = None

    def logprobs(self):
        """`LogProbs` of the rows."""
        return LogProbs(self.logps, self.entropies, self.kept_logps, self.kept_entropies)


class Derivatives(NamedTuple):
    """Upstream gradients of log-probabilities and entropies, (B, T) float32, and of the logits."""

    dlogps: Tensor | None
    dentropies: Tensor | None = None
    dlogits: Tensor | None = None  # (B, L, V), to be written
    kept_dlogps: Tensor | None = None  # over the support
    kept_dentropies: Tensor | None = None


class Weight(NamedTuple):
    """coefficient / (max(items, 1) divisor); numbers, 0-d tensors, or per sequence or token."""

    coefficient: PerToken
    items: PerToken
    divisor: Number


class TokenValues(NamedTuple):
    """Inputs of `token_weights`: numbers, 0-d tensors, (B,) or (B, T)."""

    advantages: PerToken
    policy_mask: Tensor | None  # nonzero = on
    policy: Weight  # its coefficient is the rollout ratio
    kl: Weight  # ... beta
    entropy: Weight | None  # ... the entropy coefficient


class TokenWeights(NamedTuple):
    """Outputs of `token_weights`, (B, T) float32; None = not computed."""

    advantages: Tensor | None
    w_policy: Tensor | None
    w_kl: Tensor | None
    w_entropy: Tensor | None


class Head(NamedTuple):
    """Hidden states and the LM head that makes logits of them."""

    hidden: Tensor  # (B, L, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)


class Chunking(NamedTuple):
    """How a head is applied: in which dtype, to which tokens in which order, how many at a time."""

    dtype: torch.dtype  # of the operands of the matmuls, the gradient of the logits among them
    logits_dtype: torch.dtype  # the same, or float32
    order: Tensor | None  # (B * T,) indices: tokens with gradient, active ones, masked ones
    counts: Tensor | None  # (2,) on the CPU: how many tokens have a gradient, how many are active
    chunk_bytes: int  # memory for the logits of a chunk and for their gradient


class Gradients(NamedTuple):
    """Output buffers of the gradients; None = not computed."""

    hidden: Tensor | None = None  # (B, L, H)
    weight: Tensor | None = None  # (V, H); float32 where several chunks add up
    bias: Tensor | None = None  # (V,) float32


class LossResults(NamedTuple):
    """Results of a loss."""

    loss: Tensor  # (), or (B, T) for reduction="none"
    sums: Tensor  # (8,)
    metrics: Tensor  # (7,)
    logps: Tensor  # (B, T)
    entropies: Tensor | None  # (B, T)
