"""Device functions for one row of logits: softmax statistics in one read.

A row is cut into segments of SEGMENT blocks, whatever the number of rows. Inside of a segment every
lane keeps an online softmax of its own: the reshape of a block to UNROLL x LANES x (LINE / LANES)
puts axes 0 and 2 into one thread, so nothing is exchanged. Segments are merged lane by lane, in
order, and in the end the lanes. So it makes no difference, bit for bit, whether one program reads
the whole row or other programs have left the lanes of every segment in memory (`partials`).

Rows that start anywhere (ENDS) are read in vectors all the same, and which thread has a column then
depends on where its row starts. The result does not: see `other_columns`.
"""

import triton
import triton.language as tl

from .columns import find_middle, inner_columns, line_pointers, skip_head
from .online_softmax import fold, load_capped, merge, nothing, relative


@triton.jit
def count_segments(V, SEGMENT_COLUMNS: tl.constexpr, VECTOR: tl.constexpr, ENDS: tl.constexpr):
    """Segments that have columns of a row, without its `other_columns`."""
    columns = V
    if ENDS:
        columns = inner_columns(V, VECTOR)
    return tl.cdiv(columns, SEGMENT_COLUMNS)


@triton.jit
def segment_statistics(
    x_ptr,
    V,
    segment,
    scale,
    logit_scale,
    softcap,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ENDS: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Running statistics of every lane over one segment of the row at x_ptr."""
    LINE: tl.constexpr = THREADS * VECTOR
    BLOCK: tl.constexpr = UNROLL * LINE
    LANES: tl.constexpr = LINE if ENDS else THREADS
    tile: tl.constexpr = (UNROLL, LANES, LINE // LANES)
    head = 0
    columns = V
    whole = V
    if ENDS:  # the last vector of columns may reach out of a row's middle: it is in no whole block
        head, _ = find_middle(x_ptr, V, VECTOR)
        x_ptr = skip_head(x_ptr, head, VECTOR)
        columns = inner_columns(V, VECTOR)
        whole = tl.maximum(columns - VECTOR, 0)
    first = segment * SEGMENT
    blocks = tl.minimum(whole // BLOCK - first, SEGMENT)
    x_ptrs = line_pointers(x_ptr + first * BLOCK, LINE, VECTOR)
    maximum, total, weighted = nothing(LANES)
    for _ in range(blocks):
        x = load_capped(x_ptrs, None, 0, logit_scale, softcap, UNROLL, LINE, COLUMNS, EVICTION)
        maximum, total, weighted = fold(x, scale, maximum, total, weighted, tile, ENTROPY)
        x_ptrs += UNROLL * x_ptrs.shape[0]
    remaining = tl.multiple_of(columns - (first + blocks) * BLOCK, COLUMNS)
    if (blocks < SEGMENT) & (remaining > 0):
        x = load_capped(
            x_ptrs, remaining, head, logit_scale, softcap, UNROLL, LINE, COLUMNS, EVICTION
        )
        maximum, total, weighted = fold(x, scale, maximum, total, weighted, tile, ENTROPY)
    return maximum, total, weighted


@triton.jit
def other_columns(
    x_ptr,
    V,
    scale,
    logit_scale,
    softcap,
    THREADS: tl.constexpr,
    LINE: tl.constexpr,
    VECTOR: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Statistics of each thread over the columns that segments leave out with ENDS.

    A row's sum must not depend, bit for bit, on where the row starts, but which lane has a column
    does: the first lane's is column `head` of every line. So every lane sums alone, and in the end
    they are put in order of columns. Only the first VECTOR columns of a line change lines too, from
    the end of one to the start of the next, and only the last ones of the row may lie in a vector
    that reaches out of it. These, the same for every row of V columns, are summed here; the lanes
    leave the ones out that had them.
    """
    inner = inner_columns(V, VECTOR)
    starts = tl.cdiv(inner, LINE) * VECTOR
    count = starts + V - inner
    maximum, total, weighted = nothing(THREADS)
    for first in tl.range(0, count, THREADS, disable_licm=True):
        i = first + tl.arange(0, THREADS)
        columns = tl.where(i < starts, i // VECTOR * LINE + (i & (VECTOR - 1)), i - starts + inner)
        x = load_capped(
            x_ptr + columns, count - first, 0, logit_scale, softcap, 1, THREADS, 1, EVICTION
        )
        tile: tl.constexpr = (1, THREADS, 1)
        maximum, total, weighted = fold(x, scale, maximum, total, weighted, tile, ENTROPY)
    return maximum, total, weighted


@triton.jit
def _sum_in_order(values, head, VECTOR: tl.constexpr):
    """Sum of lanes, of which the first has column `head` of a line, in the order of columns.

    Without the first VECTOR columns of a line.
    """
    LINE: tl.constexpr = values.shape[0]
    columns = tl.arange(0, LINE)
    values = tl.gather(values, (columns - head) & (LINE - 1), 0)
    return tl.sum(tl.where(columns < VECTOR, 0.0, values), axis=0)


@triton.jit
def partial_pointer(partials_ptr, row, slots, slot, LANES: tl.constexpr, ENTROPY: tl.constexpr):
    """Where the statistics of a row's lanes over one of its segments, or other columns, lie."""
    VALUES: tl.constexpr = LANES * (3 if ENTROPY else 2)
    return partials_ptr + (row.to(tl.int64) * slots + slot) * VALUES


@triton.jit
def _load_partial(ptr, LANES: tl.constexpr, THREADS: tl.constexpr, ENTROPY: tl.constexpr):
    """Maximum, total, weighted of the first THREADS lanes of a partial at `ptr`."""
    ptrs = ptr + tl.arange(0, THREADS)
    if ENTROPY:
        weighted = tl.load(ptrs + 2 * LANES)
    else:
        weighted = tl.zeros((THREADS,), tl.float32)
    return tl.load(ptrs), tl.load(ptrs + LANES), weighted


@triton.jit
def row_statistics(
    x_ptr,
    V,
    scale,
    logit_scale,
    softcap,
    partials_ptr,
    row,
    slots,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ENDS: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """(maximum, total, weighted) of `online_softmax`; without ENTROPY weighted is 0.

    The row is read once or, if `partials_ptr` is not None, not at all.
    """
    LINE: tl.constexpr = THREADS * VECTOR
    LANES: tl.constexpr = LINE if ENDS else THREADS
    segments = count_segments(V, SEGMENT * UNROLL * LINE, VECTOR, ENDS)
    maximum, total, weighted = nothing(LANES)
    if partials_ptr is None:
        for segment in tl.range(segments, disable_licm=ENDS):
            a, b, c = segment_statistics(
                x_ptr,
                V,
                segment,
                scale,
                logit_scale,
                softcap,
                THREADS,
                UNROLL,
                VECTOR,
                COLUMNS,
                SEGMENT,
                ENDS,
                ENTROPY,
                EVICTION,
            )
            maximum, total, weighted = merge(maximum, total, weighted, a, b, c, ENTROPY)
    else:
        for segment in tl.range(segments, loop_unroll_factor=4):  # loads of four in flight
            ptr = partial_pointer(partials_ptr, row, slots, segment, LANES, ENTROPY)
            a, b, c = _load_partial(ptr, LANES, LANES, ENTROPY)
            maximum, total, weighted = merge(maximum, total, weighted, a, b, c, ENTROPY)
    if ENDS:
        head, _ = find_middle(x_ptr, V, VECTOR)
        if partials_ptr is None:
            a, b, c = other_columns(
                x_ptr, V, scale, logit_scale, softcap, THREADS, LINE, VECTOR, ENTROPY, EVICTION
            )
        else:
            ptr = partial_pointer(partials_ptr, row, slots, slots - 1, LANES, ENTROPY)
            a, b, c = _load_partial(ptr, LANES, THREADS, ENTROPY)
        row_maximum = tl.maximum(tl.max(maximum, axis=0), tl.max(a, axis=0))
        total, weighted = relative(maximum, total, weighted, row_maximum)
        b, c = relative(a, b, c, row_maximum)
        total = _sum_in_order(total, head, VECTOR) + tl.sum(b, axis=0)
        weighted = _sum_in_order(weighted, head, VECTOR) + tl.sum(c, axis=0)
        return row_maximum, total, weighted
    else:
        row_maximum = tl.max(maximum, axis=0)
        total, weighted = relative(maximum, total, weighted, row_maximum)
        return row_maximum, tl.sum(total, axis=0), tl.sum(weighted, axis=0)
