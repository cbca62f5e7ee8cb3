"""The LM head in chunks: logits of a few rows at a time, turned into their gradient where they lie.

Plain torch around the launchers over logits of either implementation. Three matmuls in all:
logits = h W^T, dh = G W, dW += G^T h; who comes back later for the gradient makes the logits again.
"""

import functools
import math

import torch

from .pages import allocate

TILE_ROWS, TILE_COLUMNS = 128, 256  # of a half-precision matmul on a tensor core
COPY_BYTES = 64 << 20  # of a matrix that has to be copied into another dtype, at a time
TURNED_BYTES = 1 << 20  # of logits made as (V, n), at a time: they stay in a core's cache
TURNED_ROWS = 256  # the most rows for which that was faster


def logits_bytes(rows, V, dtype):
    """Bytes of `logits_memory`."""
    return rows * _padded(V) * dtype.itemsize


def chunk_limit(V, dtype, budget):
    """Rows of logits (n, V) that a budget of bytes holds."""
    return max(1, budget // logits_bytes(1, V, dtype))


def chunk_rows(rows, limit, H, processors):
    """Rows of a chunk, at most `limit`, in even chunks.

    As few of them as that takes; on a device with many processors up to twice as many, if that
    leaves fewer of those idle in the matmul that makes dh (rows, H), counted in tiles of a tensor
    core's matmul. Predicted, not measured.
    """

    def length(chunks):
        even = math.ceil(rows / chunks)
        whole = math.ceil(even / TILE_ROWS) * TILE_ROWS
        return whole if whole <= limit and processors > 1 else even

    def waves(chunks):
        tiles = math.ceil(length(chunks) / TILE_ROWS) * math.ceil(H / TILE_COLUMNS)
        return chunks * math.ceil(tiles / processors)

    fewest = max(1, math.ceil(rows / limit))
    if fewest == 1 or processors == 1:
        return max(1, math.ceil(rows / fewest))
    return length(min(range(fewest, 2 * fewest + 1), key=waves))


def _padded(V):
    """Stride of a row of V columns: a multiple of 8 keeps every row aligned for 128-bit loads."""
    return -(-V // 8) * 8


def logits_memory(rows, V, dtype, device):
    """Memory for logits (rows, V), every row aligned."""
    return allocate((rows, _padded(V)), dtype, device)[:, :V]


@functools.cache
def _processors(device_type, index):
    if device_type == "cpu":
        return 1
    properties = torch.get_device_module(device_type).get_device_properties(index or 0)
    return getattr(properties, "multi_processor_count", 1)


def adds_up_in_float32(device, dtype):
    """Whether a matmul of half-precision matrices can add to a float32 one."""
    return dtype != torch.float32 and device.type == "cuda" and torch.version.hip is None


class Head:
    """Hidden states (B, L, H) and the head (V, H) that makes logits of them, for tokens (B, T).

    Tokens come packed: those that want a gradient first, then those that only count, the masked
    ones not at all. A batch that is `whole`, all of its tokens in one chunk, stays as it is.

    Args:
        hidden, weight, bias: (B, L, H), (V, H), (V,) or None.
        dtype: of the logits and their matmuls.
        order, counts: indices into the tokens (B * T,), and (2,) on the CPU: how many of them want
            a gradient, how many are active. None: all of both.
        ids: (B, T).
        chunk_bytes: budget for the logits of a chunk.
        dhidden, dweight, dbias: (B, L, H), (V, H), (V,) to write gradients into, or None; what
            several chunks add up in is float32.
        accumulate: whether dweight already holds what is to be added to.
        packs: whether tokens are (1, n) also where the batch is whole.
    """

    def __init__(
        self,
        hidden,
        weight,
        bias,
        dtype,
        order,
        counts,
        ids,
        chunk_bytes,
        dhidden=None,
        dweight=None,
        dbias=None,
        accumulate=False,
        packs=False,
    ):
        positions, (_, self.T) = hidden.shape[1], ids.shape
        self.hidden, self.weight, self.dtype = hidden.flatten(0, 1), weight, dtype
        self.bias = None if bias is None else bias.to(dtype)
        self.live = self.active = ids.numel()
        if order is not None:
            self.live, self.active = counts.tolist()
            order = order[: self.active]
        self.tokens = self.rows = order
        if positions != self.T:
            tokens = torch.arange(ids.numel(), device=ids.device) if order is None else order
            self.rows = tokens + tokens // max(self.T, 1)
        self.dhidden = None if dhidden is None else dhidden.flatten(0, 1)
        if not (dhidden is None or self.rows is None):
            self.dhidden.zero_()
        self.dweight, self.dbias, self.accumulate = dweight, dbias, accumulate
        if self.live == 0:
            for gradient in (None if accumulate else dweight, dbias):
                if gradient is not None:
                    gradient.zero_()
        V, H = weight.shape
        processors = _processors(hidden.device.type, hidden.device.index)
        limit = chunk_limit(V, dtype, chunk_bytes)
        self.chunk_rows = chunk_rows(self.active, limit, H, processors)
        self.whole = not packs and self.rows is None and self.chunk_rows >= self.active

    def pack(self, values):
        """Values per token (B, T) or sequence (B,) as (1, n) in the order of tokens."""
        if self.whole or not isinstance(values, torch.Tensor) or values.dim() == 0:
            return values
        if values.dim() == 1:
            values = values[:, None].expand(-1, self.T)
        if self.tokens is None:
            # That of one sequence is a view of a single value, where kernels want one per token.
            return values.reshape(1, -1).contiguous()
        return values.flatten()[self.tokens][None]

    def packed(self, output):
        """Memory for an output (..., B, T) of packed tokens: itself where they come as they are."""
        if self.whole:
            return output
        if self.tokens is None:
            return output.flatten(-2).unsqueeze(-2)
        shape = (*output.shape[:-2], 1, self.active)
        return torch.empty(shape, dtype=output.dtype, device=output.device)

    def unpack(self, output, packed):
        """Write packed values (..., 1, n) into an output (..., B, T), masked tokens as 0."""
        if self.tokens is not None:
            output.flatten(-2).zero_().index_copy_(-1, self.tokens, packed[..., 0, :])

    def cut(self, values, start, stop):
        """Of what `pack` or `packed` returned the values of some tokens."""
        return values if self.whole else cut(values, start, stop)

    def batch(self, logits):
        """Logits (n, V) of a chunk as launchers take them: (1, n, V), or (B, T, V)."""
        return logits.unflatten(0, (-1, self.T)) if self.whole else logits[None]

    def memory(self, rows):
        """Memory for logits (rows, V)."""
        return logits_memory(rows, len(self.weight), self.dtype, self.hidden.device)

    def chunks(self, cuts=None):
        """Yield (start, middle, stop): packed tokens [start, middle) want a gradient, the rest not.

        Args:
            cuts: where chunks end, rising to the number of active tokens; None = even lengths.
        """
        if cuts is None:
            cuts = [*range(self.chunk_rows, self.active, self.chunk_rows), self.active]
        start = 0
        for stop in cuts:
            if stop > start:
                yield start, min(max(self.live, start), stop), stop
            start = stop

    def states(self, start, stop):
        """Hidden states (stop - start, H) of packed tokens."""
        if self.rows is None:
            hidden = self.hidden if self.whole else self.hidden[start:stop]
        else:
            hidden = self.hidden.index_select(0, self.rows[start:stop])
        return hidden.to(self.dtype)

    def logits(self, states, out):
        """Logits of states (n, H), written into `out` (n, V)."""
        for columns, weight in self._weights():
            bias = None if self.bias is None else self.bias[columns]
            project(states, weight, bias, of_columns(out, columns))
        return out

    def backward(self, start, stop, states, dlogits):
        """Gradients from those of the logits of packed tokens, which come in rising order."""
        if self.dhidden is not None:
            self._store_dhidden(start, stop, dlogits)
        if self.dweight is not None:
            add_product(self.dweight, dlogits, states, self.accumulate or start > 0)
        if self.dbias is not None:
            bytes_of_column = len(dlogits) * self.dbias.element_size()
            for columns in blocks(len(self.dbias), bytes_of_column, COPY_BYTES):
                total = dlogits[:, columns].sum(0, dtype=self.dbias.dtype)
                self.dbias[columns] = total if start == 0 else self.dbias[columns] + total

    def _store_dhidden(self, start, stop, dlogits):
        direct = self.rows is None and self.dhidden.dtype == self.dtype
        shape = (len(dlogits), self.dhidden.shape[1])
        if direct:
            target = self.dhidden if self.whole else self.dhidden[start:stop]
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
        """The weight in the dtype of the logits: whole or, where that takes a copy, in blocks."""
        V, H = self.weight.shape
        if self.weight.dtype == self.dtype:
            yield slice(0, V), self.weight
            return
        for columns in blocks(V, H * self.dtype.itemsize, COPY_BYTES):
            yield columns, self.weight[columns].to(self.dtype)


def cut(values, start, stop):
    """Packed values (..., n) of some tokens; numbers, 0-d tensors and None as they are."""
    if not isinstance(values, torch.Tensor) or values.dim() == 0:
        return values
    return values if stop - start == values.shape[-1] else values[..., start:stop]


def of_columns(matrix, columns):
    return matrix if columns.stop - columns.start == matrix.shape[1] else matrix[:, columns]


def blocks(rows, bytes_of_row, budget):
    """Slices of as many rows as the budget of bytes holds."""
    length = max(1, budget // max(1, bytes_of_row))
    return [slice(first, min(first + length, rows)) for first in range(0, rows, length)]


def project(states, weight, bias, out):
    """out (n, V) = states (n, H) weight^T + bias.

    Few rows of float32 are made as (V, n) on a CPU and turned: MKL reads the weight up to four
    times as fast that way, and what is turned has at most a quarter of its elements.
    """
    rows, H = states.shape
    on_mkl = out.device.type == "cpu" and torch.backends.mkl.is_available()
    if on_mkl and out.dtype == torch.float32 and 1 < rows <= min(H // 4, TURNED_ROWS):
        for columns in blocks(len(weight), rows * out.element_size(), TURNED_BYTES):
            # Into memory of its own: autocast makes a product without `out` in its dtype.
            turned = out.new_empty((columns.stop - columns.start, rows))
            torch.mm(weight[columns], states.t(), out=turned)
            out[:, columns] = turned.t() if bias is None else turned.t() + bias[columns]
    elif bias is None:
        torch.mm(states, weight.t(), out=out)
    else:
        torch.addmm(bias, states, weight.t(), out=out)


def add_product(total, dlogits, hidden, accumulate):
    """total (V, H) = or += dlogits^T (V, n) hidden (n, H); products are added up in float32.

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
        for columns in blocks(len(total), len(hidden) * total.element_size(), COPY_BYTES):
            add_product(total[columns], dlogits[:, columns].to(total.dtype), hidden, accumulate)
