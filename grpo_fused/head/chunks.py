"""The LM head over chunks of tokens: logits of a few rows at a time, overwritten by their gradient.

Plain torch around the launchers over logits of either backend. Three matmuls in all: logits =
h W^T, dh = G W, dW += G^T h; without saved logits, backward recomputes them.
"""

import math

import torch

from grpo_fused.bundles import per_token
from grpo_fused.torch_backend.pages import allocate

ALIGNED_TOKENS = 16  # chunks start at multiples of these, so that kernels find aligned tensors
COPY_BYTES = 64 << 20  # of a matrix that is copied into another dtype, at a time
TRANSPOSED_BYTES = 1 << 20  # of logits made as (V, n), at a time: they stay in a core's cache
TRANSPOSED_ROWS = 256  # more rows were not faster that way


def logits_bytes(rows, V, dtype, logits_dtype):
    """Bytes of logits (n, V) and of their gradient, which overwrites them if it has their dtype."""
    size = logits_dtype.itemsize + (0 if dtype == logits_dtype else dtype.itemsize)
    return rows * _padded(V) * size


def chunk_limit(V, chunking):
    """Rows of logits (n, V) that fit a chunk."""
    row = logits_bytes(1, V, chunking.dtype, chunking.logits_dtype)
    return max(1, chunking.chunk_bytes // row)


def round_up(n, multiple):
    return -(-n // multiple) * multiple


def chunk_rows(rows, limit):
    """Rows of a chunk: even chunks, as few as the limit allows, that start aligned."""
    even = math.ceil(rows / max(1, math.ceil(rows / limit)))
    aligned = round_up(even, ALIGNED_TOKENS)
    if aligned > limit:
        aligned = limit // ALIGNED_TOKENS * ALIGNED_TOKENS or limit
    return max(1, min(rows, aligned))


def _padded(V):
    """Stride of a row of V columns: a multiple of 8 aligns every row to 128-bit loads."""
    return round_up(V, 8)


def logits_memory(rows, V, dtype, device):
    """Memory for logits (rows, V), every row aligned."""
    return allocate((rows, _padded(V)), dtype, device)[:, :V]


def adds_up_in_float32(device, dtype):
    """Whether the device multiplies half-precision matrices into a float32 one."""
    return dtype != torch.float32 and device.type == "cuda" and torch.version.hip is None


class ChunkedHead:
    """An LM head that computes the logits of packed tokens and the gradients of its inputs.

    Tokens come packed: those that have a gradient first, then those without, masked ones not at
    all. A batch whose tokens all have a gradient and fit a `single_chunk` stays as it is.

    Args:
        head, chunking, gradients: `grpo_fused.bundles`.
        ids: (B, T).
        accumulate: whether gradients.weight already holds a sum to add to.
        packs: pack tokens as (1, n) even in a single chunk.
    """

    def __init__(self, head, chunking, ids, gradients, accumulate=False, packs=False):
        positions, (_, self.T) = head.hidden.shape[1], ids.shape
        self.hidden, self.weight = head.hidden.flatten(0, 1), head.weight
        self.dtype, self.logits_dtype = chunking.dtype, chunking.logits_dtype
        self.bias = None if head.bias is None else head.bias.to(self.logits_dtype)
        order = chunking.order
        self.with_gradient = self.active = ids.numel()
        if order is not None:
            self.with_gradient, self.active = chunking.counts.tolist()
            order = order[: self.active]
        self.tokens = self.rows = order
        if positions != self.T:
            tokens = torch.arange(ids.numel(), device=ids.device) if order is None else order
            self.rows = tokens + tokens // max(self.T, 1)
        dhidden, self.dweight, self.dbias = gradients
        self.dhidden = None if dhidden is None else dhidden.flatten(0, 1)
        if not (dhidden is None or self.rows is None):
            self.dhidden.zero_()
        self.accumulate = accumulate
        if self.with_gradient == 0:
            for gradient in (None if accumulate else self.dweight, self.dbias):
                if gradient is not None:
                    gradient.zero_()
        self.chunk_rows = chunk_rows(self.active, chunk_limit(len(self.weight), chunking))
        self.single_chunk = not packs and self.rows is None and self.chunk_rows >= self.active

    @property
    def wants_gradient(self):
        """Whether any gradient is to be written."""
        return not (self.dhidden is None and self.dweight is None and self.dbias is None)

    def pack(self, bundle):
        """A bundle of values per token (B, T) with (1, n) in the order of packed tokens."""
        return per_token(self._pack, bundle)

    def _pack(self, values):
        if self.single_chunk or not _per_token(values):
            return values
        if self.tokens is None:
            # Contiguous: of one sequence this would be an expanded view.
            return values.reshape(1, -1).contiguous()
        return values.flatten()[self.tokens][None]

    def pack_outputs(self, bundle):
        """Memory for outputs (B, T) of packed tokens: themselves if the order agrees."""
        return bundle._make(map(self._pack_output, bundle))

    def _pack_output(self, output):
        if self.single_chunk or output is None:
            return output
        if self.tokens is None:
            return output.view(1, -1)
        return torch.empty((1, self.active), dtype=output.dtype, device=output.device)

    def unpack_outputs(self, outputs, packed):
        """Write packed values (1, n) into outputs (B, T), masked tokens as 0."""
        if self.tokens is not None:
            for output, values in zip(outputs, packed, strict=True):
                if output is not None:
                    output.view(-1).zero_().index_copy_(0, self.tokens, values[0])

    def slice(self, bundle, start, stop):
        """Of a bundle from `pack` or `pack_outputs` the tokens [start, stop)."""
        whole = self.single_chunk or stop - start == self.active
        return bundle if whole else slice_tokens(bundle, start, stop)

    def batch(self, logits):
        """Logits (n, V) of a chunk as launchers take them: (1, n, V) or (B, T, V)."""
        return logits.unflatten(0, (-1, self.T)) if self.single_chunk else logits[None]

    def memory(self, rows):
        """Memory for logits (rows, V)."""
        return logits_memory(rows, len(self.weight), self.logits_dtype, self.hidden.device)

    def gradient_memory(self, rows):
        """Memory for the gradient of logits (rows, V), None: it overwrites them."""
        if self.dtype == self.logits_dtype or not self.wants_gradient:
            return None
        return logits_memory(rows, len(self.weight), self.dtype, self.hidden.device)

    def chunks(self, ends=None):
        """Yield (start, middle, stop): of packed tokens [start, stop) those before middle have a
        gradient.

        Args:
            ends: where chunks end, rising to the number of active tokens; None: even lengths.
        """
        if ends is None:
            ends = [*range(self.chunk_rows, self.active, self.chunk_rows), self.active]
        start = 0
        for stop in ends:
            if stop > start:
                yield start, min(max(self.with_gradient, start), stop), stop
            start = stop

    def states(self, start, stop):
        """Hidden states (stop - start, H) of packed tokens."""
        if self.rows is None:
            hidden = self.hidden if self.single_chunk else self.hidden[start:stop]
        else:
            hidden = self.hidden.index_select(0, self.rows[start:stop])
        return hidden.to(self.dtype)

    def logits(self, states, out):
        """Logits of states (n, H), written into `out` (n, V)."""
        for columns, weight in self._weights():
            bias = None if self.bias is None else self.bias[columns]
            if self.dtype == self.logits_dtype:
                project(states, weight, bias, of_columns(out, columns))
            else:
                project_exactly(states, weight, bias, of_columns(out, columns))
        return out

    def backward(self, start, stop, states, dlogits):
        """Gradients from those of the logits of packed tokens; chunks come in rising order."""
        if self.dhidden is not None:
            self._store_dhidden(start, stop, dlogits)
        if self.dweight is not None:
            add_product(self.dweight, dlogits, states, self.accumulate or start > 0)
        if self.dbias is not None:
            column_bytes = len(dlogits) * self.dbias.element_size()
            for columns in slices(len(self.dbias), column_bytes, COPY_BYTES):
                total = dlogits[:, columns].sum(0, dtype=self.dbias.dtype)
                self.dbias[columns] = total if start == 0 else self.dbias[columns] + total

    def _store_dhidden(self, start, stop, dlogits):
        direct = self.rows is None and self.dhidden.dtype == self.dtype
        shape = (len(dlogits), self.dhidden.shape[1])
        if direct:
            target = self.dhidden if self.single_chunk else self.dhidden[start:stop]
        else:
            target = torch.empty(shape, dtype=self.dtype, device=dlogits.device)
        for columns, weight in self._weights():
            if columns.start == 0:
                torch.mm(of_columns(dlogits, columns), weight, out=target)
            else:
                torch.addmm(target, of_columns(dlogits, columns), weight, out=target)
        if self.rows is not None:
            target = target.to(self.dhidden.dtype)
            self.dhidden.index_copy_(0, self.rows[start:stop], target)
        elif not direct:
            self.dhidden[start:stop] = target

    def _weights(self):
        """(columns, weight in the dtype of the logits): at once or, if it is cast, in blocks."""
        V, H = self.weight.shape
        if self.weight.dtype == self.dtype:
            yield slice(0, V), self.weight
            return
        for columns in slices(V, H * self.dtype.itemsize, COPY_BYTES):
            yield columns, self.weight[columns].to(self.dtype)


def _per_token(values):
    return isinstance(values, torch.Tensor) and values.dim() > 0


def slice_tokens(bundle, start, stop):
    """A bundle of packed values (1, n) with those of some tokens; numbers and None as they are."""
    return per_token(lambda v: v[:, start:stop] if _per_token(v) else v, bundle)


def of_columns(matrix, columns):
    return matrix if columns.stop - columns.start == matrix.shape[1] else matrix[:, columns]


def slices(rows, row_bytes, budget):
    """Slices of as many rows as fit the budget of bytes."""
    length = max(1, budget // max(1, row_bytes))
    return [slice(first, min(first + length, rows)) for first in range(0, rows, length)]


def project(states, weight, bias, out):
    """out (n, V) = states (n, H) weight^T + bias.

    A few float32 rows are computed as (V, n) on a CPU and transposed: MKL reads the weight up to
    four times as fast that way, and the transposed logits have at most a quarter of its elements.
    """
    rows, H = states.shape
    in_mkl = out.device.type == "cpu" and torch.backends.mkl.is_available()
    if in_mkl and out.dtype == torch.float32 and 1 < rows <= min(H // 4, TRANSPOSED_ROWS):
        for columns in slices(len(weight), rows * out.element_size(), TRANSPOSED_BYTES):
            # Preallocated: under autocast a product without `out` has autocast's dtype.
            transposed = out.new_empty((columns.stop - columns.start, rows))
            torch.mm(weight[columns], states.t(), out=transposed)
            logits = transposed.t()
            out[:, columns] = logits if bias is None else logits + bias[columns]
    elif bias is None:
        torch.mm(states, weight.t(), out=out)
    else:
        torch.addmm(bias, states, weight.t(), out=out)


def project_exactly(states, weight, bias, out):
    """As `project`, of half-precision operands into float32: their products are exact there."""
    if adds_up_in_float32(out.device, states.dtype):
        torch.mm(states, weight.t(), out_dtype=out.dtype, out=out)
        if bias is not None:
            out += bias
        return
    states = states.to(out.dtype)
    for columns in slices(len(weight), weight.shape[1] * out.element_size(), COPY_BYTES):
        part = None if bias is None else bias[columns]
        project(states, weight[columns].to(out.dtype), part, out[:, columns])


def add_product(total, dlogits, hidden, accumulate):
    """total (V, H) = or += dlogits^T (V, n) hidden (n, H); products add up in float32.

    A total of lower precision is rounded once: it takes no second product.
    """
    if total.dtype == dlogits.dtype:
        if accumulate:
            torch.addmm(total, dlogits.t(), hidden, out=total)
        else:
            torch.mm(dlogits.t(), hidden, out=total)
    elif adds_up_in_float32(total.device, dlogits.dtype):
        if accumulate:
            torch.addmm(total, dlogits.t(), hidden, out_dtype=total.dtype, out=total)
        else:
            torch.mm(dlogits.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        hidden = hidden.to(total.dtype)
        for columns in slices(len(total), len(hidden) * total.element_size(), COPY_BYTES):
            add_product(total[columns], dlogits[:, columns].to(total.dtype), hidden, accumulate)
