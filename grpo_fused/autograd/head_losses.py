"""Losses over an LM head in three matmuls: per token, or per sequence with whole sequences a chunk.

Both hold what `autograd.head.LinearLoss` needs: tokens, chunking, backend, the upstream gradient
that is folded in, and `run`.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_fused.autograd.common import make_outputs, make_statistics, reduce
from grpo_fused.autograd.head import in_dtype
from grpo_fused.bundles import (
    Chunking,
    Derivatives,
    Formula,
    LossResults,
    Number,
    Scales,
    Tokens,
)
from grpo_fused.head.chunks import ChunkedHead, slice_tokens
from grpo_fused.head.order import SequenceOrder
from grpo_fused.losses.on_logps import LogpsFormula, loss_on_logps
from grpo_fused.ops import BACKENDS
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


class SequenceLosses(NamedTuple):
    """A loss on the log-probabilities of whole sequences, a few sequences per chunk.

    A chunk holds whole sequences, so that the gradient is known while their logits still exist.
    """

    tokens: Tokens
    scales: Scales
    formula: LogpsFormula
    entropy: bool
    backend: str
    chunking: Chunking
    sequences: Padded
    upstream: Number
    by_sequence: SequenceOrder
    groups: list[tuple[int, int]]  # [first, last) sequences of every chunk

    def run(self, head, gradients):
        """LossResults; writes into Gradients."""
        shape, like = self.tokens.ids.shape, head.hidden
        head = in_dtype(head, self.chunking)
        chunked = ChunkedHead(head, self.chunking, self.tokens.ids, gradients, packs=True)
        results = make_statistics(shape, self.entropy, False, like)
        packed = chunked.pack_outputs(results)
        starts = [0, *accumulate(self.by_sequence.on_host)]
        ends = [starts[last] for _, last in self.groups]
        groups = [group for group in self.groups if starts[group[0]] < starts[group[1]]]
        longest = max((starts[last] - starts[first] for first, last in groups), default=0)
        memory = chunked.memory(longest)
        tokens = self._packed_tokens(chunked)
        for group, (start, middle, stop) in zip(groups, chunked.chunks(ends), strict=True):
            states = chunked.states(start, stop)
            logits = chunked.logits(states, memory[: stop - start])
            part, sequences = self._part(tokens, group, start, stop)
            n = middle - start if chunked.wants_gradient else 0
            found = self._chunk(logits, part, sequences, n)
            for target, values in zip(packed, found, strict=True):
                if target is not None:
                    target[:, start:stop] = values
            if n:
                chunked.backward(start, middle, states[:n], logits[:n])
        chunked.unpack_outputs(results, packed)
        logps, entropies = results[:2]
        with torch.no_grad():
            loss, sums, metrics = loss_on_logps(
                logps, entropies, self.tokens, self.formula, self.sequences
            )
        return LossResults(loss, sums, metrics, logps, entropies)

    def _packed_tokens(self, chunked):
        """Tokens in the order of the head: values per token (1, n), those per sequence as (B,)."""
        kept = {n: v for n, v in self.tokens._asdict().items() if _per_sequence(v)}
        tokens = self.tokens._replace(active=None, **dict.fromkeys(kept))
        return chunked.pack(tokens)._replace(**kept)

    def _part(self, tokens, group, start, stop):
        """(packed tokens [start, stop), their sequences)."""
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

    def _chunk(self, logits, tokens, sequences, n):
        """Statistics of a chunk; writes the gradient of its first n rows over their logits."""
        launchers, shape = BACKENDS[self.backend], tokens.ids.shape
        found = make_statistics(shape, self.entropy, n > 0, logits)
        launchers.logprob_fwd(logits[None], tokens.of_softmax(), self.scales, found, False)
        if n:
            derivatives = self._derivatives(found, tokens, sequences)
            tokens, statistics, derivatives = (
                slice_tokens(bundle, 0, n) for bundle in (tokens.of_softmax(), found, derivatives)
            )
            rows = logits[None, :n]
            derivatives = derivatives._replace(dlogits=rows)
            launchers.logprob_bwd(rows, tokens, self.scales, statistics, derivatives)
        return found._replace(maxima=None, totals=None)

    def _derivatives(self, found, tokens, sequences):
        """`Derivatives` of the loss times the upstream gradient.

        This small graph must not run the caller's hooks on saved tensors: checkpointing would
        repeat the whole forward to unpack them, offloading would send them to the host.
        """
        logps, entropies = found[:2]
        kept = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with kept, torch.enable_grad():
            wanted = [logps.detach().requires_grad_()]
            if tokens.w_entropy is not None:
                entropies = entropies.detach().requires_grad_()
                wanted.append(entropies)
            loss, *_ = loss_on_logps(wanted[0], entropies, tokens, self.formula, sequences)
            gradients = torch.autograd.grad(loss, wanted)
        return Derivatives(*(values * self.upstream for values in gradients))


def _per_sequence(values: Tensor | float | None):
    return isinstance(values, Tensor) and values.dim() == 1
