"""The LM head in chunks: logits of a few rows at a time, turned into their gradient where they lie.

Plain torch around the launchers over logits of either implementation. Three matmuls in all:
logits = h W^T, dh = G W, dW += G^T h; who comes back later for the gradient makes the logits again.
"""

import functools
import math

import torch

TILE_ROWS, TILE_COLUMNS = 128, 256  # of a half-precision matmul on a tensor core
CAST_BYTES = 64 << 20  # of the weight in another dtype at a time


def chunk_limit(V, dtype, budget):
    """Rows of logits (V columns of a dtype) that a budget of bytes holds."""
    return max(1, budget // (_padded(V) * dtype.itemsize))


def chunk_rows(rows, limit, H, processors):
    """Rows of a chunk, at most `limit`: as few chunks as that takes, the last one not ragged.

    On a device with many processors, of all lengths that use at least half of the limit, the one
    that leaves the fewest of them idle in the matmul that makes dh (rows, H). Measured nowhere yet:
    counted in tiles of TILE_ROWS x TILE_COLUMNS.
    """
    if rows <= limit:
        return max(rows, 1)
    even = math.ceil(rows / math.ceil(rows / limit))
    first = limit // 2 // TILE_ROWS * TILE_ROWS
    if processors == 1 or first == 0:
        return even

    def waves(length):
        tiles = math.ceil(length / TILE_ROWS) * math.ceil(H / TILE_COLUMNS)
        return math.ceil(tiles / processors)

    def cost(length):
        return rows // length * waves(length) + waves(rows % length)

    # Longer chunks touch dW less often: they win a tie.
    return min(range(first, limit + 1, TILE_ROWS), key=lambda n: (cost(n), -n))


def _padded(V):
    """Stride of a row of V columns: a multiple of 8 keeps every row aligned for 128-bit loads."""
    return -(-V // 8) * 8


def logits_memory(rows, V, dtype, device):
    """Memory for logits (rows, V), every row aligned."""
    return torch.empty((rows, _padded(V)), dtype=dtype, device=device)[:, :V]


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
    ones not at all.

    Args:
        hidden, weight, bias: (B, L, H), (V, H), (V,) or None. Logits have the dtype of hidden.
        order, counts: indices into the tokens (B * T,), and (2,) on the CPU: how many of them want
            a gradient, how many are active. None: all of both.
        ids: (B, T).
        chunk_bytes: budget for the logits of a chunk.
        dhidden, dweight, dbias: (B, L, H), (V, H), (V,) to write gradients into, or None. dweight
            and dbias may be float32 where the others are not.
        accumulate: whether dweight already holds what is to be added to.
    """

    def __init__(
        self,
        hidden,
        weight,
        bias,
        order,
        counts,
        ids,
        chunk_bytes,
        dhidden=None,
        dweight=None,
        dbias=None,
        accumulate=False,
    ):
        positions, self.T = hidden.shape[1], ids.shape[1]
        self.hidden, self.weight = hidden.flatten(0, 1), weight
        self.bias = None if bias is None else bias.to(hidden.dtype)
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
        self.limit = chunk_limit(V, hidden.dtype, chunk_bytes)
        processors = _processors(hidden.device.type, hidden.device.index)
        self.chunk_rows = chunk_rows(self.active, self.limit, H, processors)

    def pack(self, values):
        """Values per token (B, T) or sequence (B,) as (1, n) in the order of tokens."""
        if not isinstance(values, torch.Tensor) or values.dim() == 0:
            return values
        if values.dim() == 1:
            values = values[:, None].expand(-1, self.T)
        values = values.flatten()
        return (values if self.tokens is None else values[self.tokens])[None]

    def unpack(self, values, packed):
        """Write packed values (..., n) into those of all tokens (..., B, T), masked ones as 0."""
        values = values.flatten(-2)
        if self.tokens is None:
            values.copy_(packed)
        else:
            values.zero_().index_copy_(-1, self.tokens, packed)

    def memory(self, rows):
        """Memory for logits (rows, V)."""
        return logits_memory(rows, len(self.weight), self.hidden.dtype, self.hidden.device)

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

    def logits(self, start, stop, out):
        """Logits of packed tokens, written into `out` (stop - start, V)."""
        hidden = self._hidden(start, stop)
        for columns, weight in self._weights():
            target = out[:, columns]
            if self.bias is None:
                torch.mm(hidden, weight.t(), out=target)
            else:
                torch.addmm(self.bias[columns], hidden, weight.t(), out=target)
        return out

    def backward(self, start, stop, dlogits):
        """Gradients from those of the logits of packed tokens, which come in rising order."""
        if self.dhidden is not None:
            self._store_dhidden(start, stop, dlogits)
        accumulate = self.accumulate or start > 0
        if self.dweight is not None:
            add_product(self.dweight, dlogits, self._hidden(start, stop), accumulate)
        if self.dbias is not None:
            total = dlogits.sum(0, dtype=self.dbias.dtype)
            self.dbias.copy_(total if start == 0 else self.dbias + total)

    def _store_dhidden(self, start, stop, dlogits):
        if self.rows is None:
            target = self.dhidden[start:stop]
        else:
            target = torch.empty_like(self.dhidden[start:stop])
        for k, (columns, weight) in enumerate(self._weights()):
            if k == 0:
                torch.mm(dlogits[:, columns], weight, out=target)
            else:
                torch.addmm(target, dlogits[:, columns], weight, out=target)
        if self.rows is not None:
            self.dhidden.index_copy_(0, self.rows[start:stop], target)

    def _hidden(self, start, stop):
        if self.rows is None:
            return self.hidden[start:stop]
        return self.hidden.index_select(0, self.rows[start:stop])

    def _weights(self):
        """The weight in the dtype of hidden, as a whole or, where that takes a copy, in blocks."""
        V, H = self.weight.shape
        rows = V
        if self.weight.dtype != self.hidden.dtype:
            rows = max(1, CAST_BYTES // (H * self.hidden.element_size()))
        for first in range(0, V, rows):
            columns = slice(first, min(first + rows, V))
            yield columns, self.weight[columns].to(self.hidden.dtype)


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
        rows = max(1, CAST_BYTES // (len(hidden) * total.element_size()))
        hidden = hidden.to(total.dtype)
        for first in range(0, len(total), rows):
            block = slice(first, first + rows)
            columns = dlogits[:, block].to(total.dtype)
            add_product(total[block], columns, hidden, accumulate)
