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
from grpo_fused.bundles import Chunking, Gradients, Head, LogProbs, OverSupport
from grpo_fused.head.chunks import adds_up_in_float32, chunk_limit, logits_bytes
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
# updates of dW; twice as much if their gradient is apart, in three times the bytes. On a CPU about
# the size of its caches, but no fewer rows than a fast matmul needs.
CHUNK_BYTES = 1 << 30
CPU_CHUNK_BYTES, CPU_CHUNK_ROWS = 32 << 20, 240


def default_chunk_bytes(device, V, dtype, logits_dtype):
    """Budget for the logits (n, V) of a chunk; it does not depend on how much memory is free."""
    if device.type != "cpu":
        return CHUNK_BYTES if dtype == logits_dtype else 2 * CHUNK_BYTES
    return max(CPU_CHUNK_BYTES, CPU_CHUNK_ROWS * logits_bytes(1, V, dtype, logits_dtype))


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

    def log_probabilities(self, tokens, scales, wanted, backend, sequences):
        """`LogProbs`, differentiable, of those that are wanted."""
        tokens = in_shard(self.shards, tokens.of_softmax())
        arguments = (self.tensor, tokens, scales, wanted, backend, self.shards)
        if self.wants_gradient():
            return LogProbs(*LogProb.apply(*arguments, self.inplace))
        return run_logprob(*arguments).logprobs()

    def token_loss(self, tokens, scales, formula, entropy, backend, sequences):
        """LossResults of a token-level loss."""
        arguments = (self.tensor, tokens, scales, formula, entropy, backend)
        if self.wants_gradient():
            return FusedLoss.apply(*arguments, self.inplace)
        return run_fused_loss(*arguments)

    def logps_loss(self, tokens, scales, formula, entropy, backend, sequences, grad_scale):
        """LossResults of a loss on log-probabilities."""
        wanted = formula.over.wanted(tokens, entropy)
        found = self.log_probabilities(tokens, scales, wanted, backend, sequences)
        return loss_on_logps(found, tokens, formula, sequences)


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
    logits_dtype: torch.dtype | None = None
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
        """Of the operands of the matmuls."""
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

    def log_probabilities(self, tokens, scales, wanted, backend, sequences, order=None):
        """`LogProbs`, differentiable, of those that are wanted.

        Args:
            order: of the tokens; None: active ones as they come.
        """
        chunking = self._chunking(order_tokens(sequences.local) if order is None else order)
        tokens = in_shard(self.shards, tokens.of_softmax())
        arguments = (tokens, scales, chunking, wanted, backend, self.save_logits, self.shards)
        if self.wants_gradient():
            inputs = (self.tensor, self.weight, self.bias, self.main_grad)
            return LogProbs(*LinearLogProb.apply(*inputs, *arguments))
        return run_linear_logprob(self._head(), *arguments)[0].logprobs()

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
        first = None
        if not over_ranks:
            needs_advantage = formula.objective.needs_advantage
            first = tokens_with_gradient(tokens, local, couples, needs_advantage)
        wanted = formula.over.wanted(tokens, entropy)
        known = formula.reduction == "sum" and grad_scale is not None and not over_ranks
        known = known and formula.objective.couples != "batch"
        losses = None
        if known and not torch.compiler.is_compiling():  # autograd does not run inside of an op
            arguments = (tokens, scales, formula, wanted, backend, sequences, grad_scale)
            losses = self._chunked_losses(arguments, first)
        if losses is not None:
            return self._run(losses)
        arguments = (tokens, scales, wanted, backend, sequences, order_tokens(local, first))
        return loss_on_logps(self.log_probabilities(*arguments), tokens, formula, sequences)

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
        groups = group_sequences(by_sequence.on_host, chunk_limit(len(self.weight), chunking))
        rows = tokens.ids.numel() if order.counts is None else int(order.counts[1])
        # On a device wrong cu_seqlens may end before the tokens do: see `sequences.Packed`.
        if groups is None or sum(by_sequence.on_host) != rows:
            return None
        return losses._replace(chunking=chunking, by_sequence=by_sequence, groups=groups)

    def _chunking(self, order, V=None, depth=1):
        """`Chunking` for `depth` chunks at a time, of as many rows as fit with V columns."""
        own, dtypes = len(self.weight), (self.dtype, self._dtype_of_logits())
        V, chunk_bytes = own if V is None else V, self.chunk_bytes
        if chunk_bytes is None:
            chunk_bytes = default_chunk_bytes(self.tensor.device, V, *dtypes)
        chunking = Chunking(*dtypes, *order, chunk_bytes // depth)
        if V != own or depth > 1:
            chunk_bytes = logits_bytes(chunk_limit(V, chunking), own, *dtypes)
            chunking = chunking._replace(chunk_bytes=chunk_bytes)
        return chunking

    def _dtype_of_logits(self):
        """float32 where half-precision matrices multiply into it at no loss of speed."""
        if self.logits_dtype is not None:
            return self.logits_dtype
        device = self.tensor.device
        into_float32 = device.type == "cpu" or adds_up_in_float32(device, self.dtype)
        return torch.float32 if into_float32 else self.dtype

    def _head(self):
        return Head(self.tensor, self.weight, self.bias)

    def _run(self, losses):
        if self.wants_gradient():
            return LinearLoss.apply(*self._head(), self.main_grad, losses)
        return losses.run(self._head(), Gradients())


@dataclass(frozen=True)
class LogpsInput:
    """Log-probabilities (B, T) or (N,), entropies, and log-probabilities for the KL, or None."""

    tensor: Tensor
    entropies: Tensor | None = None
    kl_logps: Tensor | None = None
    ids, ids_name = None, None
    name, fuses, dtype = "logps", False, torch.float32

    def with_rows(self):
        """The same with a dimension of sequences: (1, N)."""
        entropies, kl_logps = (
            None if t is None else t[None] for t in (self.entropies, self.kl_logps)
        )
        return replace(self, tensor=self.tensor[None], entropies=entropies, kl_logps=kl_logps)

    def check(self):
        pass

    def wants_gradient(self):
        return torch.is_grad_enabled() and self.tensor.requires_grad

    def logps_loss(self, tokens, scales, formula, entropy, backend, sequences, grad_scale):
        """LossResults of a loss on log-probabilities."""
        # Selected at once: masked values may be NaN, and come back as 0.
        logps, entropies, kl_logps = (
            None if t is None else sequences.select(t.float())
            for t in (self.tensor, self.entropies, self.kl_logps)
        )
        found, over = LogProbs(logps, entropies), OverSupport()
        if kl_logps is not None:  # the policy's are in the place of those over the support
            found, over = LogProbs(kl_logps, entropies, logps), OverSupport(policy=True)
        return loss_on_logps(found, tokens, formula._replace(over=over), sequences)
