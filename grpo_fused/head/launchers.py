"""Launchers over an LM head: those over logits, called for a chunk of tokens at a time."""

from grpo_fused.bundles import Gradients
from grpo_fused.head.chunks import ALIGNED_TOKENS, ChunkedHead, round_up


def linear_loss(backend, head, chunking, tokens, scales, formula, outputs, gradients):
    """As `fused_loss` of a backend, over hidden states and an LM head.

    Masked tokens are not part of chunking.order; their outputs are 0.
    """
    chunked = ChunkedHead(head, chunking, tokens.ids, gradients)
    tokens = chunked.pack(tokens._replace(active=None))
    packed = chunked.pack_outputs(outputs)
    memory = chunked.memory(min(chunked.chunk_rows, chunked.active))
    gradient = chunked.gradient_memory(len(memory))
    for start, middle, stop in chunked.chunks():
        states = chunked.states(start, stop)
        logits = chunked.logits(states, memory[: stop - start])
        n = middle - start if chunked.wants_gradient else 0
        # A few tokens more, whose gradient is 0: the others then start aligned too.
        wanted = min(start + round_up(n, ALIGNED_TOKENS), stop)
        for first, last in ((start, wanted), (wanted, stop)):
            if first == last:
                continue
            x = chunked.batch(logits[first - start : last - start])
            found = chunked.slice(packed, first, last)
            if last == wanted:
                dx = x if gradient is None else chunked.batch(gradient[: last - start])
                found = found._replace(dlogits=dx)
            else:
                found = found._replace(dlogits=None)
            backend.fused_loss(x, chunked.slice(tokens, first, last), scales, formula, found)
        if n:
            dlogits = logits if gradient is None else gradient
            chunked.backward(start, middle, states[:n], dlogits[:n])
    chunked.unpack_outputs(outputs, packed)


def linear_logprob_fwd(backend, head, chunking, tokens, scales, statistics, logits, shard):
    """As `logprob_fwd` of a backend, over hidden states and an LM head.

    Args:
        logits: (n, V) memory that keeps the logits for backward, or None.
    """
    chunked = ChunkedHead(head, chunking, tokens.ids, Gradients())
    tokens = chunked.pack(tokens._replace(active=None))
    packed = chunked.pack_outputs(statistics)
    memory = logits
    if logits is None:
        memory = chunked.memory(min(chunked.chunk_rows, chunked.active))
    for start, _, stop in chunked.chunks():
        out = memory[: stop - start] if logits is None else logits[start:stop]
        x = chunked.batch(chunked.logits(chunked.states(start, stop), out))
        part, found = (chunked.slice(bundle, start, stop) for bundle in (tokens, packed))
        backend.logprob_fwd(x, part, scales, found, shard)
    chunked.unpack_outputs(statistics, packed)


def linear_logprob_bwd(
    backend, head, chunking, tokens, scales, statistics, derivatives, logits, accumulate, gradients
):
    """As `logprob_bwd` of a backend, over hidden states and an LM head.

    Args:
        derivatives: `grpo_fused.bundles.Derivatives`.
        logits: (n, V) that `linear_logprob_fwd` kept, overwritten; None = recomputed.
        accumulate: whether gradients.weight is added to.
    """
    chunked = ChunkedHead(head, chunking, tokens.ids, gradients, accumulate)
    tokens = chunked.pack(tokens._replace(active=None))
    statistics, derivatives = chunked.pack(statistics), chunked.pack(derivatives)
    rows, memory = min(chunked.chunk_rows, chunked.with_gradient), logits
    if logits is None:
        memory = chunked.memory(rows)
    gradient = chunked.gradient_memory(rows)
    for start, middle, _ in chunked.chunks():
        if middle == start:
            break
        states = chunked.states(start, middle)
        if logits is None:
            x = chunked.logits(states, memory[: middle - start])
        else:
            x = logits[start:middle]
        batch, dlogits = chunked.batch(x), x if gradient is None else gradient[: middle - start]
        part, found, upstream = (
            chunked.slice(bundle, start, middle) for bundle in (tokens, statistics, derivatives)
        )
        upstream = upstream._replace(dlogits=chunked.batch(dlogits))
        backend.logprob_bwd(batch, part, scales, found, upstream)
        chunked.backward(start, middle, states, dlogits)
