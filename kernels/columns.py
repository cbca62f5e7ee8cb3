"""Device functions that find the columns of a row: its aligned middle, blocks of it, its ends.

A row is read in blocks of UNROLL lines of THREADS x VECTOR columns, VECTOR being one load of a
thread, 128 bits. A matrix of which every row starts at a multiple of that needs nothing else. Rows
of an odd vocabulary start anywhere (ENDS): their middle is made of the whole vectors in memory that
lie inside the row, and fewer than VECTOR columns remain on either side.
"""

import triton
import triton.language as tl


@triton.jit
def locate(row, positions, tokens_per_sequence):
    """(sequence, position, index of the token among all tokens) of a row of logits (B, L, V)."""
    sequence = row // positions
    position = row % positions
    return sequence, position, sequence * tokens_per_sequence + position


@triton.jit
def row_pointer(
    ptr,
    sequence,
    position,
    stride_sequence,
    stride_position,
    VECTOR: tl.constexpr,
    ENDS: tl.constexpr,
):
    """Start of a row; without ENDS, VECTOR columns from there on are aligned to their size."""
    start = ptr + sequence.to(tl.int64) * stride_sequence + position.to(tl.int64) * stride_position
    ALIGNED: tl.constexpr = 1 if ENDS else VECTOR
    return tl.multiple_of(start, ALIGNED * ptr.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def split_columns(V, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """(number of whole blocks in a row, columns after them, known to be a multiple of COLUMNS)."""
    blocks = V // BLOCK
    return blocks, tl.multiple_of(V - blocks * BLOCK, COLUMNS)


@triton.jit
def line_pointers(x_ptr, LINE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to the first line of a block, for `load`: one vector a thread.

    bfloat16 is read in 32-bit words: one shift and one mask make two float32, where unpacking
    16-bit registers takes three instructions.
    """
    if (x_ptr.dtype.element_ty == tl.bfloat16) & (VECTOR > 1):
        return x_ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, LINE // 2)
    else:
        return x_ptr + tl.arange(0, LINE)


@triton.jit
def block_of(line, UNROLL: tl.constexpr):
    """Columns, or pointers to them, of the UNROLL lines that start with this one.

    A loop that moves one line and derives the others keeps one address a thread: the distance
    between lines is a constant in the instruction.
    """
    return line[None, :] + (tl.arange(0, UNROLL) * line.shape[0])[:, None]


@triton.jit
def load(
    x_ptrs,
    remaining,
    UNROLL: tl.constexpr,
    LINE: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """The block (UNROLL, LINE) in float32; from column `remaining` on, unless None, anything.

    x_ptrs are `line_pointers` to its first line; `remaining` is a multiple of COLUMNS.
    """
    PAIRS: tl.constexpr = x_ptrs.shape[0] < LINE
    within = None
    if remaining is not None:
        within = block_of(tl.arange(0, LINE), UNROLL) < remaining
        if PAIRS:
            pairs = tl.multiple_of((remaining + 1) // 2, (COLUMNS + 1) // 2)
            within = block_of(tl.arange(0, LINE // 2), UNROLL) < pairs
    x = tl.load(block_of(x_ptrs, UNROLL), within, eviction_policy=EVICTION)
    if PAIRS:
        even = (x << 16).to(tl.float32, bitcast=True)
        odd = (x & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(even, odd), (UNROLL, LINE))
    else:
        return x.to(tl.float32)


@triton.jit
def find_middle(x_ptr, V, VECTOR: tl.constexpr):
    """(columns before the first whole vector of a row, columns of all whole vectors)."""
    address = x_ptr.to(tl.int64) // (x_ptr.dtype.element_ty.primitive_bitwidth // 8)
    head = (-address & (VECTOR - 1)).to(tl.int32)
    return head, tl.maximum(V - head, 0) // VECTOR * VECTOR


@triton.jit
def skip_head(x_ptr, head, VECTOR: tl.constexpr):
    """Start of the middle; VECTOR columns from there on are aligned to their size."""
    start = x_ptr + head
    return tl.multiple_of(start, VECTOR * x_ptr.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def end_columns(head, middle, THREADS: tl.constexpr):
    """The V - middle columns on either side of the middle, in a block of one column a thread."""
    columns = tl.arange(0, THREADS)
    return columns + tl.where(columns < head, 0, middle)


@triton.jit
def inner_columns(V, VECTOR: tl.constexpr):
    """So many first columns, in whole vectors, that the vector of each lies in front of V wherever
    the row starts. Together with those before the row's own middle they are the same for any row.
    """
    return tl.maximum(V - (VECTOR - 1), 0) // VECTOR * VECTOR
