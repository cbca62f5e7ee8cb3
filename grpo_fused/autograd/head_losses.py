"""Losses over an LM head in three matmuls: in one launch a chunk, or on log-probabilities.

Both hold what `autograd.head.LinearLoss` needs: tokens, chunking, backend, the upstream gradient
that is folded in, and `run`.
"""

from collections import deque
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_fused.autograd.common import make_derivatives, make_outputs, make_statistics, reduce
from grpo_fused.autograd.head import in_dtype
from grpo_fused.bundles import (
    Chunking,
    Formula,
    LogProbs,
    Number,
    Scales,
    Statistics,
    Tokens,
)
from grpo_fused.collectives import Pending
from grpo_fused.head.chunks import ChunkedHead, slice_tokens
from grpo_fused.head.order import SequenceOrder
from grpo_fused.losses.on_logps import LogpsFormula, loss_on_logps
from grpo_fused.ops import BACKENDS
from grpo_fused.parallel import Shards, exchange_statistics, merge, reduce_hidden_grad
from grpo_fused.sequences import Packed, Padded


class TokenLosses(NamedTuple):
    """A token-level loss: one launch per chunk."""

    tokens: Tokens
    scales: Scales
    formula: Formula
    entropy: bool
    backend: str
    chunking: Chunking

    @property
    def upstream(self):
        return self.formula.grad_scale

    def run(self, head, gradients):
        """LossResults; writes into Gradients."""
        outputs = make_outputs(self.tokens.ids.shape, self.entropy, head.hidden)
        launchers, arguments = BACKENDS[self.backend], (self.scales, self.formula, outputs)
        launchers.linear_loss(
            in_dtype(head, self.chunking), self.chunking, self.tokens, *arguments, gradients
        )
        return reduce(launchers, outputs, self.tokens.active)


class Chunk(NamedTuple):
    """A chunk whose log-probabilities are under way."""

    start: int  # of packed tokens [start, stop) those before middle have a gradient
    middle: int
    stop: int
    states: Tensor  # (n, H)
    logits: Tensor  # (n, V)
    tokens: Tokens
    sequences: Padded
    found: Statistics
    exchange: Pending | None  # of the statistics, over the ranks of a sharded vocabulary


class LogpsLosses(NamedTuple):
    """A loss on log-probabilities, whose gradient is known while the logits of a chunk exist.

    A chunk holds any tokens, or whole sequences where a loss couples their tokens. Over a sharded
    vocabulary the ranks exchange statistics once a chunk, during the matmul of the next one.
    """

    tokens: Tokens
    scales: Scales
    formula: LogpsFormula
    wanted: LogProbs  # of flags
    backend: str
    sequences: Padded
    upstream: Number
    shards: Shards | None = None
    chunking: Chunking | None = None
    by_sequence: SequenceOrder | None = None
    groups: list[tuple[int, int]] | None = None  # [first, last) sequences of every chunk

    @property
    def depth(self):
        """Chunks whose logits exist at a time."""
        return 1 if self.shards is None else 2

    def run(self, head, gradients):
        """LossResults; writes into Gradients."""
        shape, like = self.tokens.ids.shape, head.hidden
        head = in_dtype(head, self.chunking)
        chunked = ChunkedHead(head, self.chunking, self.tokens.ids, gradients, packs=True)
        results = make_statistics(shape, self.wanted, False, like)
        packed = chunked.pack_outputs(results)
        tokens, chunks = self._packed_tokens(chunked), list(self._chunks(chunked))
        rows = max((stop - start for start, _, stop, _ in chunks), default=0)
        memory = [chunked.memory(rows) for _ in chunks[: self.depth]]
        gradient = chunked.gradient_memory(rows)
        pending = deque()
        for k, place in enumerate(chunks):
            pending.append(self._start(chunked, tokens, *place, memory[k % self.depth]))
            if len(pending) == self.depth:
                self._finish(chunked, pending.popleft(), packed, gradient)
        for chunk in pending:
            self._finish(chunked, chunk, packed, gradient)
        chunked.unpack_outputs(results, packed)
        if self.shards is not None and gradients.hidden is not None:
            reduce_hidden_grad(self.shards, gradients.hidden)
        with torch.no_grad():
            arguments = (self.tokens, self.formula, self.sequences)
            return loss_on_logps(results.logprobs(), *arguments)

    def _chunks(self, chunked):
        """Yield (start, middle, stop, group of sequences or None) of every chunk."""
        if self.groups is None:
            for chunk in chunked.chunks():
                yield *chunk, None
            return
        starts = [0, *accumulate(self.by_sequence.on_host)]
        ends = [starts[last] for _, last in self.groups]
        groups = [group for group in self.groups if starts[group[0]] < starts[group[1]]]
        for chunk, group in zip(chunked.chunks(ends), groups, strict=True):
            yield *chunk, group

    def _start(self, chunked, tokens, start, middle, stop, group, memory):
        """`Chunk`: its logits and statistics are launched, and their exchange."""
        states = chunked.states(start, stop)
        logits = chunked.logits(states, memory[: stop - start])
        part, sequences = self._part(tokens, group, start, stop)
        middle, sharded = middle if chunked.wants_gradient else start, self.shards is not None
        found = make_statistics(part.ids.shape, self.wanted, middle > start or sharded, logits)
        BACKENDS[self.backend].logprob_fwd(
            logits[None], part.of_softmax(), self.scales, found, sharded
        )
        exchange = exchange_statistics(self.shards, found) if sharded else None
        return Chunk(start, middle, stop, states, logits, part, sequences, found, exchange)

    def _finish(self, chunked, chunk, packed, gradient):
        """Write the log-probabilities of a chunk and add its gradients."""
        found, n = chunk.found, chunk.middle - chunk.start
        if chunk.exchange is not None:
            found = merge(chunk.exchange, found, chunk.tokens, self.scales, self.backend)
        for target, values in zip(packed, found, strict=True):
            if target is not None:
                target[:, chunk.start : chunk.stop] = values
        if n:
            derivatives = self._derivatives(found, chunk.tokens, chunk.sequences)
            bundles = (chunk.tokens.of_softmax(), found, derivatives)
            tokens, statistics, derivatives = (slice_tokens(b, 0, n) for b in bundles)
            rows = chunk.logits[:n]
            dlogits = rows if gradient is None else gradient[:n]
            derivatives = derivatives._replace(dlogits=dlogits[None])
            BACKENDS[self.backend].logprob_bwd(
                rows[None], tokens, self.scales, statistics, derivatives
            )
            chunked.backward(chunk.start, chunk.middle, chunk.states[:n], dlogits)

    def _packed_tokens(self, chunked):
        """Tokens in the order of the head: values per token (1, n), those per sequence as (B,)."""
        tokens, kept = self.tokens, {}
        if self.groups is None:
            advantages = self.sequences.local.broadcast(tokens.advantages)
            tokens = tokens._replace(advantages=advantages)
        else:
            kept = {n: v for n, v in tokens._asdict().items() if _per_sequence(v)}
        tokens = tokens._replace(active=None, **dict.fromkeys(kept))
        return chunked.pack(tokens)._replace(**kept)

    def _part(self, tokens, group, start, stop):
        """(packed tokens [start, stop), their sequences)."""
        if group is None:
            n = stop - start
            return slice_tokens(tokens, start, stop), Padded((1, n), None, tokens.ids.device)
        first, last = group
        index, lengths = self.by_sequence.index, self.by_sequence.lengths
        kept = {
            name: (values if index is None else values[index])[first:last]
            for name, values in tokens._asdict().items()
            if _per_sequence(values)
        }
        part = slice_tokens(tokens._replace(**dict.fromkeys(kept)), start, stop)._replace(**kept)
        ends = F.pad(lengths[first:last].cumsum(0), (1, 0))
        return part, Packed((1, stop - start), None, ends)

    def _derivatives(self, found, tokens, sequences):
        """`Derivatives` of the loss times the upstream gradient.

        This small graph must not run the caller's hooks on saved tensors: checkpointing would
        repeat the whole forward to unpack them, offloading would send them to the host.
        """
        kept = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with kept, torch.enable_grad():
            leaves = [None if t is None else t.detach().requires_grad_() for t in found.logprobs()]
            wanted = [leaf for leaf in leaves if leaf is not None]
            arguments = (tokens, self.formula, sequences)
            loss = loss_on_logps(LogProbs(*leaves), *arguments).loss
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        gradients = iter(gradients)
        upstream = [None if leaf is None else next(gradients) for leaf in leaves]
        upstream = [None if g is None else g * self.upstream for g in upstream]
        return make_derivatives(found, upstream)


def _per_sequence(values: Tensor | float | None):
    return isinstance(values, Tensor) and values.dim() == 1
