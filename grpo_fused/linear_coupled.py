"""Losses that couple the tokens of a sequence, over a head, in three matmuls.

A chunk holds whole sequences: what a sequence needs of all its tokens is known while its logits are
still there.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from grpo_fused.autograd import (
    LAUNCHERS,
    LossResults,
    Options,
    Scales,
    Tokens,
    Weights,
    output,
)
from grpo_fused.coupled import CoupledFormula, coupled_loss
from grpo_fused.kernels.linear import Head, cut
from grpo_fused.linear_autograd import Projection
from grpo_fused.ordering import SequenceOrder
from grpo_fused.sequences import Packed, Padded


class SequenceLosses(NamedTuple):
    """A loss on the log-probabilities of whole sequences, a few sequences a chunk.

    Attributes:
        grad_scale: upstream gradient that is folded in.
        by_sequence: SequenceOrder of the tokens.
        groups: [first, last) of the sequences of every chunk, none longer than a chunk.
    """

    tokens: Tokens
    weights: Weights
    scales: Scales
    formula: CoupledFormula
    options: Options
    sequences: Padded
    projection: Projection
    grad_scale: float | torch.Tensor
    by_sequence: SequenceOrder
    groups: list[tuple[int, int]]

    def run(self, hidden, weight, bias, gradients):
        """LossResults; writes into Gradients."""
        ids, entropy = self.tokens.ids, self.options.compute_entropy
        inputs = self.projection.inputs(hidden, weight, bias)
        head = Head(*inputs, ids, self.projection.chunk_bytes, *gradients, packs=True)
        results = [output(*ids.shape, like=hidden) if w else None for w in (True, entropy)]
        packed = [None if t is None else head.packed(t) for t in results]
        starts = [0, *accumulate(self.by_sequence.on_host)]
        cuts = [starts[last] for _, last in self.groups]
        groups = [group for group in self.groups if starts[group[0]] < starts[group[1]]]
        longest = max((starts[last] - starts[first] for first, last in groups), default=0)
        memory = head.memory(longest)
        writes = any(gradient is not None for gradient in gradients)
        whole = self._packed(head)
        for group, (start, middle, stop) in zip(groups, head.chunks(cuts), strict=True):
            states, live = head.states(start, stop), middle - start if writes else 0
            logits = head.logits(states, memory[: stop - start])
            part = whole._part(group, start, stop)
            targets = [cut(values, start, stop) for values in packed]
            self._chunk(logits, part, targets, live)
            if live:
                head.backward(start, middle, states[:live], logits[:live])
        for values, source in zip(results, packed, strict=True):
            if values is not None:
                head.unpack(values, source)
        with torch.no_grad():
            loss, sums, metrics = coupled_loss(
                *results, self.tokens, self.weights, self.formula, self.sequences
            )
        return LossResults(loss, sums, metrics, *results)

    def _packed(self, head):
        """The same with values per token as (1, n), in the order of the head."""

        def pack(inputs):
            return inputs._make(
                values if _per_sequence(values) else head.pack(values) for values in inputs
            )

        return self._replace(
            tokens=pack(self.tokens._replace(active=None)),
            weights=pack(self.weights),
            scales=pack(self.scales),
        )

    def _part(self, group, start, stop):
        """Of packed values those of tokens [start, stop), of sequences [first, last)."""
        first, last = group
        index, lengths = self.by_sequence.index, self.by_sequence.lengths

        def take(inputs):
            return inputs._make(
                (values if index is None else values[index])[first:last]
                if _per_sequence(values)
                else cut(values, start, stop)
                for values in inputs
            )

        tokens, ends = take(self.tokens), F.pad(lengths[first:last].cumsum(0), (1, 0))
        return self._replace(
            tokens=tokens,
            weights=take(self.weights),
            scales=take(self.scales),
            sequences=Packed(tokens.ids, None, ends),
        )

    def _chunk(self, logits, part, outputs, live):
        """Log-probabilities and entropies, and the gradient of the first `live` rows in place."""
        launchers, ids = LAUNCHERS[self.options.implementation], part.tokens.ids
        temperature, *scales = part.scales
        if _per_sequence(temperature):
            temperature = part.sequences.argument(temperature)
        maxima, totals = output(*ids.shape, like=logits), output(*ids.shape, like=logits)
        launchers.logprob_fwd(
            *(logits[None], ids, None, temperature, *scales, *outputs, maxima, totals)
        )
        if not live:
            return
        statistics = (*outputs, maxima, totals, *part.derivatives(*outputs))
        rows = logits[None, :live]
        launchers.logprob_bwd(
            *(rows, cut(ids, 0, live), None, cut(temperature, 0, live), *scales),
            *(cut(values, 0, live) for values in statistics),
            rows,
        )

    def derivatives(self, logps, entropies):
        """(dL/dlogps, dL/dentropies or None) for the upstream gradient grad_scale.

        What this small graph saves is none of the business of the caller's hooks: checkpointing
        would run the whole forward again to unpack it, offloading would send it to the host.
        """
        kept = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with kept, torch.enable_grad():
            wanted = [logps.detach().requires_grad_()]
            if self.weights.entropy_coef is not None:
                wanted.append(entropies.detach().requires_grad_())
            loss, *_ = coupled_loss(
                *(wanted if len(wanted) == 2 else (*wanted, entropies)),
                *(self.tokens, self.weights, self.formula, self.sequences),
            )
            found = torch.autograd.grad(loss, wanted)
        found = [values * self.grad_scale for values in found]
        return found if len(found) == 2 else (*found, None)


def _per_sequence(values):
    return isinstance(values, torch.Tensor) and values.dim() == 1
