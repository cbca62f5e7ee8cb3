"""Inputs of a loss: logits, hidden states with an LM head, or log-probabilities.

All three compute log-probabilities and each kind of loss behind one interface.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_fused import validation
from grpo_fused.autograd.head import LinearLogProb, LinearLoss, run_linear_logprob
from grpo_fused.autograd.head_losses import LogpsLosses, TokenLosses
from grpo_fused.autograd.logits import FusedLoss, LogProb, run_fused_loss, run_logprob
from grpo_fused.bundles import Chunking, Gradients, Head, LossResults
from grpo_fused.head.chunks import chunk_limit, logits_bytes
from grpo_fused.head.order import (
    group_sequences,
    order_sequences,
    order_tokens,
    tokens_with_gradient,
)
from grpo_fused.losses.objectives import Objective
from grpo_fused.losses.on_logps import loss_on_logps
from grpo_fused.parallel import Shards, in_shard, largest_shard

# Logits of a chunk. On a GPU long enough for its matmuls to be bound by arithmetic and for few
# updates of dW; on a CPU about the size of its caches, but no fewer rows than a fast matmul needs.
CHUNK_BYTES = 1 << 30
CPU_CHUNK_BYTES, CPU_CHUNK_ROWS = 32 << 20, 240


def default_chunk_bytes(device, V, dtype):
    """Budget for the logits (n, V) of a chunk; it does not depend on how much memory is free."""
    if device.type != "cpu":
        return CHUNK_BYTES
    return max(CPU_CHUNK_BYTES, CPU_CHUNK_ROWS * logits_bytes(1, V, dtype))


@dataclass(frozen=True)
class LogitsInput:
    """Logits (B, L, V) or, before `with_rows`, (N, V).

    Attributes:
        fuses: whether a token-level loss is computed in the pass that reads the logits.
        by_sequence: whether that pass takes advantages (B,).
        shards: where the columns lie in the vocabulary, or None: they are all of it.
    """

    tensor: Tensor
    ids: Tensor
    ids_name: str = "completion_ids"
    inplace: bool = False
    shards: Shards | None = None
    name, columns, by_sequence = "logits", "V", True

    def __post_init__(self):
        validation.check_floats(self.name, self.tensor)

    @property
    def fuses(self):
        return self.shards is None

    @property
    def vocabulary(self):
        """Its number of tokens, or None: not known to this rank."""
        return self.tensor.shape[-1] if self.shards is None else self.shards.size

    @property
    def dtype(self):
        return self.tensor.dtype

    def with_rows(self):
        """The same with a dimension of sequences: (1, N, V)."""
        return replace(self, tensor=self.tensor[None], ids=self.ids[None])

    def check(self):
        validation.check_logits(self.tensor, self.inplace)

    def wants_gradient(self):
        return torch.is_grad_enabled() and self.tensor.requires_grad

    def log_probabilities(self, tokens, scales, entropy, backend, sequences):
        """(logps, entropies) (B, T), differentiable; entropies is None without `entropy`."""
        tokens = in_shard(self.shards, tokens.of_softmax())
        arguments = (self.tensor, tokens, scales, entropy, backend, self.shards)
        if self.wants_gradient():
            return LogProb.apply(*arguments, self.inplace)
        return tuple(run_logprob(*arguments)[:2])

    def token_loss(self, tokens, scales, formula, entropy, backend, sequences):
        """LossResults of a token-level loss."""
        arguments = (self.tensor, tokens, scales, formula, entropy, backend)
        if self.wants_gradient():
            return FusedLoss.apply(*arguments, self.inplace)
        return run_fused_loss(*arguments)

    def logps_loss(self, tokens, scales, formula, entropy, backend, sequences, grad_scale):
        """LossResults of a loss on log-probabilities."""
        logps, entropies = self.log_probabilities(tokens, scales, entropy, backend, sequences)
        results = loss_on_logps(logps, entropies, tokens, formula, sequences)
        return LossResults(*results, logps, entropies)


@dataclass(frozen=True)
class HeadInput:
    """Hidden states (B, L, H) or, before `with_rows`, (N, H), and the LM head (V, H)."""

    tensor: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    ids_name: str = "completion_ids"
    chunk_bytes: int | None = None
    upcast: bool = False
    main_grad: Tensor | None = None
    save_logits: bool = False
    shards: Shards | None = None
    name, columns, by_sequence = "hidden", "H", False

    def __post_init__(self):
        validation.check_floats(self.name, self.tensor)

    @property
    def fuses(self):
        return self.shards is None

    @property
    def vocabulary(self):
        """As of `LogitsInput`."""
        return len(self.weight) if self.shards is None else self.shards.size

    @property
    def converts(self):
        """Whether hidden states and weight may differ in dtype."""
        return self.upcast or torch.is_autocast_enabled(self.tensor.device.type)

    @property
    def dtype(self):
        """Of the logits."""
        device = self.tensor.device.type
        if self.upcast:
            return torch.float32
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.tensor.dtype

    def with_rows(self):
        """The same with a dimension of sequences: (1, N, H)."""
        return replace(self, tensor=self.tensor[None], ids=self.ids[None])

    def check(self):
        validation.check_head(self)

    def wants_gradient(self):
        parameters = (self.tensor, self.weight, self.bias)
        wanted = any(t is not None and t.requires_grad for t in parameters)
        return torch.is_grad_enabled() and wanted

    def log_probabilities(self, tokens, scales, entropy, backend, sequences, order=None):
        """(logps, entropies) (B, T), differentiable; entropies is None without `entropy`.

        Args:
            order: of the tokens; None: active ones as they come.
        """
        chunking = self._chunking(order_tokens(sequences.local) if order is None else order)
        tokens = in_shard(self.shards, tokens.of_softmax())
        arguments = (tokens, scales, chunking, entropy, backend, self.save_logits, self.shards)
        if self.wants_gradient():
            inputs = (self.tensor, self.weight, self.bias, self.main_grad)
            return LinearLogProb.apply(*inputs, *arguments)
        return tuple(run_linear_logprob(self._head(), *arguments)[0][:2])

    def token_loss(self, tokens, scales, formula, entropy, backend, sequences):
        """LossResults of a token-level loss."""
        sequences = sequences.local
        needs_advantage = Objective.by_name[formula.objective].needs_advantage
        wanted = tokens_with_gradient(tokens, sequences, needs_advantage=needs_advantage)
        chunking = self._chunking(order_tokens(sequences, wanted))
        return self._run(TokenLosses(tokens, scales, formula, entropy, backend, chunking))

    def logps_loss(self, tokens, scales, formula, entropy, backend, sequences, grad_scale):
        """LossResults of a loss on log-probabilities.

        Where a chunk has all that the gradient of its tokens depends on, the gradient is computed
        with the loss: of token-level losses in every chunk, of sequence-level ones if the longest
        sequence fits a chunk. Otherwise the logits are computed twice, as they are where a loss
        couples the tokens of the batch.
        """
        couples, local = formula.couples_tokens, sequences.local
        over_ranks = couples and sequences.group is not None
        # Over ranks, tokens of others decide whether a token here has a gradient.
        wanted = None
        if not over_ranks:
            needs_advantage = formula.objective.needs_advantage
            wanted = tokens_with_gradient(tokens, local, couples, needs_advantage)
        known = formula.reduction == "sum" and grad_scale is not None and not over_ranks
        known = known and formula.objective.couples != "batch"
        losses = None
        if known and not torch.compiler.is_compiling():  # autograd does not run inside of an op
            arguments = (tokens, scales, formula, entropy, backend, sequences, grad_scale)
            losses = self._chunked_losses(arguments, wanted)
        if losses is not None:
            return self._run(losses)
        arguments = (tokens, scales, entropy, backend, sequences, order_tokens(local, wanted))
        logps, entropies = self.log_probabilities(*arguments)
        results = loss_on_logps(logps, entropies, tokens, formula, sequences)
        return LossResults(*results, logps, entropies)

    def _chunked_losses(self, arguments, wanted):
        """`LogpsLosses`, or None: a sequence does not fit a chunk."""
        tokens, _, formula, _, _, sequences, _ = arguments
        losses = LogpsLosses(*arguments, self.shards)
        losses = losses._replace(tokens=in_shard(self.shards, tokens))
        local, V = sequences.local, None
        if self.shards is not None:  # the ranks exchange chunks of the same tokens
            V = largest_shard(self.shards, len(self.weight), self.tensor.device)
        if not formula.couples_tokens:
            chunking = self._chunking(order_tokens(local, wanted), V, losses.depth)
            return losses._replace(chunking=chunking)
        order, by_sequence = order_sequences(local, wanted)
        chunking = self._chunking(order, V, losses.depth)
        limit = chunk_limit(len(self.weight), self.dtype, chunking.chunk_bytes)
        groups = group_sequences(by_sequence.on_host, limit)
        rows = tokens.ids.numel() if order.counts is None else int(order.counts[1])
        # On a device wrong cu_seqlens may end before the tokens do: see `sequences.Packed`.
        if groups is None or sum(by_sequence.on_host) != rows:
            return None
        return losses._replace(chunking=chunking, by_sequence=by_sequence, groups=groups)

    def _chunking(self, order, V=None, depth=1):
        """`Chunking` for `depth` chunks at a time, of as many rows as fit with V columns."""
        own = len(self.weight)
        V, chunk_bytes = own if V is None else V, self.chunk_bytes
        if chunk_bytes is None:
            chunk_bytes = default_chunk_bytes(self.tensor.device, V, self.dtype)
        if V != own or depth > 1:
            rows = chunk_limit(V, self.dtype, chunk_bytes // depth)
            chunk_bytes = logits_bytes(rows, own, self.dtype)
        return Chunking(self.dtype, *order, chunk_bytes)

    def _head(self):
        return Head(self.tensor, self.weight, self.bias)

    def _run(self, losses):
        if self.wants_gradient():
            return LinearLoss.apply(*self._head(), self.main_grad, losses)
        return losses.run(self._head(), Gradients())


@dataclass(frozen=True)
class LogpsInput:
    """Log-probabilities (B, T) or (N,), and entropies or None."""

    tensor: Tensor
    entropies: Tensor | None = None
    ids, ids_name = None, None
    name, fuses, dtype = "logps", False, torch.float32

    def with_rows(self):
        """The same with a dimension of sequences: (1, N)."""
        entropies = None if self.entropies is None else self.entropies[None]
        return replace(self, tensor=self.tensor[None], entropies=entropies)

    def check(self):
        pass

    def wants_gradient(self):
        return torch.is_grad_enabled() and self.tensor.requires_grad

    def logps_loss(self, tokens, scales, formula, entropy, backend, sequences, grad_scale):
        """LossResults of a loss on log-probabilities."""
        # Selected at once: masked values may be NaN, and come back as 0.
        logps = sequences.select(self.tensor.float())
        entropies = None if self.entropies is None else sequences.select(self.entropies.float())
        results = loss_on_logps(logps, entropies, tokens, formula, sequences)
        return LossResults(*results, logps, entropies)
