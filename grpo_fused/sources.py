"""Where logits come from: given as a whole, or made of hidden states by the head in chunks.

Or from nowhere: log-probabilities that somebody else has made. A source knows how to run each kind
of loss on what it has; the rest of the package does not ask.
"""

import torch

from grpo_fused import validation
from grpo_fused.autograd import FusedLoss, LogProb, run_fused_loss, run_logprob
from grpo_fused.coupled import coupled_loss
from grpo_fused.kernels.linear import chunk_limit, logits_bytes
from grpo_fused.linear_autograd import (
    NONE,
    LinearLogProb,
    LinearLoss,
    LogProbOptions,
    Projection,
    TokenLosses,
    run_linear_logprob,
)
from grpo_fused.linear_coupled import SequenceLosses
from grpo_fused.ordering import (
    cut_at_ends,
    order_sequences,
    order_tokens,
    tokens_with_gradient,
)
from grpo_fused.sequence_objectives import SequenceObjective

# Logits of a chunk. On a GPU long enough for its matmuls to be bound by arithmetic and for dW to be
# touched rarely; on a CPU what its caches nearly hold, but no fewer rows than make a good matmul.
CHUNK_BYTES = 1 << 30
CPU_CHUNK_BYTES, CPU_CHUNK_ROWS = 32 << 20, 240


def default_chunk_bytes(device, V, dtype):
    """Budget for the logits (n, V) of a chunk; it does not depend on how much memory is free."""
    if device.type != "cpu":
        return CHUNK_BYTES
    return max(CPU_CHUNK_BYTES, CPU_CHUNK_ROWS * logits_bytes(1, V, dtype))


class Logits:
    """Logits (B, L, V) that exist.

    Attributes:
        fuses: whether a loss per token is made in the pass that reads them.
    """

    name, columns, fuses = "logits", "V", True

    def __init__(self, logits, inplace):
        validation.check_floats(self.name, logits)
        self.tensor, self.inplace = logits, inplace
        self.vocabulary, self.dtype = logits.shape[-1] if logits.dim() else 0, logits.dtype

    def check(self):
        validation.check_logits(self.tensor, self.inplace)

    def wants_gradient(self):
        return torch.is_grad_enabled() and self.tensor.requires_grad

    def log_probabilities(self, tokens, scales, options):
        """(logps, entropies) (B, T), differentiable if the logits are; entropies may be None."""
        arguments = (self.tensor, tokens.ids, tokens.active, scales, options)
        if self.wants_gradient():
            return LogProb.apply(*arguments, self.inplace)
        return tuple(run_logprob(*arguments)[:2])

    def fused_loss(self, tokens, weights, scales, formula, options, sequences):
        """LossResults of a loss that knows of one token at a time."""
        arguments = (self.tensor, tokens, weights, scales, formula, options)
        if self.wants_gradient():
            return FusedLoss.apply(*arguments, self.inplace)
        return run_fused_loss(*arguments)

    def coupled_loss(self, tokens, weights, scales, formula, options, sequences, grad_scale):
        """LossResults of a loss on log-probabilities."""
        logps, entropies = self.log_probabilities(tokens, scales, options)
        results = coupled_loss(logps, entropies, tokens, weights, formula, sequences)
        return *results, logps, entropies


class Hidden:
    """Hidden states (B, L, H), and the head (V, H) that would make logits of them."""

    name, columns, fuses = "hidden", "H", True

    def __init__(self, hidden, weight, bias, chunk_bytes, upcast, main_grad, save_logits=False):
        validation.check_floats(self.name, hidden)
        self.tensor, self.weight, self.bias, self.main_grad = hidden, weight, bias, main_grad
        self.save_logits = save_logits
        self.chunk_bytes, device = chunk_bytes, hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        self.converts = upcast or autocast
        self.dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        self.dtype = torch.float32 if upcast else self.dtype

    @property
    def vocabulary(self):
        return len(self.weight)

    def check(self):
        validation.check_head(self)
        if self.chunk_bytes is None:
            device = self.tensor.device
            self.chunk_bytes = default_chunk_bytes(device, self.vocabulary, self.dtype)

    def wants_gradient(self):
        parameters = (self.tensor, self.weight, self.bias)
        wanted = any(t is not None and t.requires_grad for t in parameters)
        return torch.is_grad_enabled() and wanted

    def log_probabilities(self, tokens, scales, options, order):
        """(logps, entropies) (B, T), differentiable if anything here is; entropies may be None."""
        projection = Projection(self.dtype, order, self.chunk_bytes)
        how = LogProbOptions(scales, options, projection, self.save_logits)
        head = (self.tensor, self.weight, self.bias)
        if self.wants_gradient():
            return LinearLogProb.apply(*head, self.main_grad, tokens.ids, how)
        return run_linear_logprob(*head, tokens.ids, how)[:2]

    def fused_loss(self, tokens, weights, scales, formula, options, sequences):
        """LossResults of a loss that knows of one token at a time."""
        live = tokens_with_gradient(tokens, weights, formula.beta, sequences, coupled=False)
        projection = Projection(self.dtype, order_tokens(sequences, live), self.chunk_bytes)
        return self._run(TokenLosses(tokens, weights, scales, formula, options, projection))

    def coupled_loss(self, tokens, weights, scales, formula, options, sequences, grad_scale):
        """LossResults of a loss on log-probabilities.

        Where the longest sequence fits a chunk the gradient is made with it; else, or when the
        upstream gradient is not known, the logits are made twice.
        """
        couples = formula.level != "token" or isinstance(formula.objective, SequenceObjective)
        live = tokens_with_gradient(tokens, weights, formula.beta, sequences, coupled=couples)
        known = formula.reduction == "sum" and grad_scale is not None
        if known and not torch.compiler.is_compiling():  # autograd does not run inside of an op
            order, by_sequence = order_sequences(sequences, live)
            projection = Projection(self.dtype, order, self.chunk_bytes)
            limit = chunk_limit(self.vocabulary, self.dtype, self.chunk_bytes)
            groups = cut_at_ends(by_sequence.on_host, limit)
            # Sequences that end before the tokens do, on a device: see `sequences.Packed`.
            complete = sum(by_sequence.on_host) == projection.rows(tokens.ids)
            if groups is not None and complete:
                how = (sequences, projection, grad_scale, by_sequence, groups)
                return self._run(SequenceLosses(tokens, weights, scales, formula, options, *how))
        else:
            order = order_tokens(sequences, live)
        logps, entropies = self.log_probabilities(tokens, scales, options, order)
        results = coupled_loss(logps, entropies, tokens, weights, formula, sequences)
        return *results, logps, entropies

    def _run(self, losses):
        head = (self.tensor, self.weight, self.bias)
        if self.wants_gradient():
            return LinearLoss.apply(*head, self.main_grad, losses)
        return losses.run(*head, NONE)


class LogProbs:
    """Log-probabilities (B, T) that exist, and entropies or None: rows of one column, no logits."""

    name, columns, fuses = "logps", "1", False
    vocabulary, dtype = 1, torch.float32

    def __init__(self, logps, entropies):
        self.tensor, self.entropies = logps[..., None], entropies

    def check(self):
        if self.entropies is not None and self.entropies.dim() == 1:  # packed, as the rows now are
            self.entropies = self.entropies[None]

    def wants_gradient(self):
        return torch.is_grad_enabled() and self.tensor.requires_grad

    def coupled_loss(self, tokens, weights, scales, formula, options, sequences, grad_scale):
        """LossResults of a loss on log-probabilities."""
        # Selected at once: what is masked may be NaN, and comes back 0.
        logps = sequences.select(self.tensor[..., 0].float())
        entropies = self.entropies
        entropies = None if entropies is None else sequences.select(entropies.float())
        results = coupled_loss(logps, entropies, tokens, weights, formula, sequences)
        return *results, logps, entropies
