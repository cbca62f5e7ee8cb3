"""Rows that start anywhere in memory: odd vocabularies, views; head, middle and tail apart."""

import pytest
import torch
import triton
import triton.language as tl
from batches import relative_error

import grpo_fused.kernels.launch as launch
from grpo_fused import Clip, reference, selective_log_softmax
from grpo_fused.kernels import launchers, tiling
from grpo_fused.kernels.columns import find_middle, inner_columns
from grpo_fused.kernels.launch import store_width, vector_width

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
# In the interpreter a line is 128 columns of float32 or 256 of 16 bits, a block four lines.
SIZES = [1, 7, 8, 9, 21, 127, 129, 262, 263, 512, 1023, 1025, 1030, 1031, 2047, 2049, 4101]
ROWS = 16  # an odd stride takes 8 of them through every distance from a multiple of 16 bytes


class Rows:
    """(1, ROWS, V) values in memory that is `fill` between the rows, before and after them.

    NaN shows what is read of it, a number what is written that came of NaN.
    """

    def __init__(self, values, device, offset=3, stride=None, fill=torch.nan):
        V = values.shape[-1]
        stride = stride or (V + 3) // 2 * 2 + 1
        self.memory = torch.full((ROWS * stride + 40,), fill, dtype=values.dtype).to(device)
        self.values = self.memory.as_strided((1, ROWS, V), (ROWS * stride, stride, 1), offset)
        self.values.copy_(values)
        self.outside = torch.ones_like(self.memory, dtype=torch.bool)
        self.outside.as_strided((1, ROWS, V), (ROWS * stride, stride, 1), offset).fill_(False)

        self.before = self.memory[self.outside]

    def check_outside(self):
        bits = torch.int32 if self.memory.dtype == torch.float32 else torch.int16
        assert torch.equal(self.memory[self.outside].view(bits), self.before.view(bits))


def same_row(V, dtype, device):
    """One row of logits, ROWS times; the target of 8 is in its head, of 8 in its tail."""
    generator = torch.Generator().manual_seed(V)
    logits = (2.5 * torch.randn(V, generator=generator)).to(dtype)
    ids = torch.tensor([min(1, V - 1), V - 1]).repeat_interleave(ROWS // 2)
    return logits.expand(1, ROWS, V), ids[None].to(device)


@triton.jit
def _find_middle_kernel(x_ptr, V, out_ptr, VECTOR: tl.constexpr):
    head, middle = find_middle(x_ptr, V, VECTOR)
    tl.store(out_ptr, head)
    tl.store(out_ptr + 1, middle)
    tl.store(out_ptr + 2, inner_columns(V, VECTOR))


@DTYPES
def test_the_middle_is_aligned_and_the_ends_are_short(dtype, device):
    memory = torch.zeros(64, dtype=dtype, device=device)
    vector = 16 // dtype.itemsize
    for start in range(10):
        for V in (1, 3, 7, 8, 9, 21, 50):
            out = torch.zeros(3, dtype=torch.int32, device=device)
            _find_middle_kernel[(1,)](memory[start:], V, out, VECTOR=vector)
            head, middle, inner = out.tolist()
            assert memory[start:][head:].data_ptr() % 16 == 0 and 0 <= head < vector
            assert middle % vector == 0 and 0 <= V - middle <= 2 * (vector - 1)
            assert middle == 0 or 0 <= V - head - middle < vector
            assert inner % vector == 0 and (inner == 0 or inner + vector - 1 <= V)
            assert inner + 2 * vector - 1 > V  # one more vector would not fit everywhere


def loss_and_gradient(of, logits, ids, dlogits, softcap=None, advantage=1.0, bonus=0.1):
    """What `fused_loss` of an implementation writes besides dlogits, with an entropy bonus."""
    terms, logps, entropies = (
        torch.empty(*n, *ids.shape, device=ids.device) for n in ((4,), (), ())
    )
    old_logps, advantages = torch.full_like(logps, -3.0), torch.full_like(logps[:, 0], advantage)
    of.fused_loss(
        *(logits, ids, None, advantages, old_logps, None, None, None, 1.0, 1.0, None, None),
        *(1.0, bonus, 0.9, 1.0, softcap, 0.0, 1.0, Clip(0.2).name(), Clip(0.2).knobs()),
        *("k3", False, terms, logps, entropies, dlogits),
    )
    return terms[0], logps, entropies


def assert_equal_rows_agree(*tensors):
    """Bit for bit, though they start at different distances from whole vectors."""
    for tensor in tensors:
        for rows in tensor[0].split(8):
            assert torch.equal(rows, rows[:1].expand_as(rows))


@DTYPES
@pytest.mark.parametrize(
    ("V", "into"),
    [(V, "in place") for V in SIZES]
    + [(V, into) for into in ("alike", "unlike", "aligned") for V in (1, 9, 263, 1031)],
)
def test_loss_and_gradient(V, into, dtype, device):
    values, ids = same_row(V, dtype, device)
    rows = Rows(values, device)
    places = {"alike": (3 + 8, None), "unlike": (4, None), "aligned": (0, (V + 8) // 8 * 8)}
    out = rows
    if into != "in place":
        out = Rows(torch.zeros_like(values), device, *places[into], fill=7.0)
    assert vector_width(rows.values) < 16 // dtype.itemsize
    wide = store_width(rows.values, out.values) == 16 // dtype.itemsize
    assert wide == (into in ("in place", "alike"))
    want = torch.empty(values.shape, device=device)
    wanted = loss_and_gradient(reference, values.to(device).float(), ids, want)
    got = loss_and_gradient(launchers, rows.values, ids, out.values)
    for a, b in zip(got, wanted, strict=True):
        assert relative_error(a, b) < 2e-6
    assert relative_error(out.values, want) < {torch.float32: 3e-6}.get(dtype, 8e-3)
    assert_equal_rows_agree(*got, out.values)
    rows.check_outside()
    out.check_outside()


@DTYPES
def test_one_column_behind_whole_blocks(dtype, device):
    """Of rows that start at whole vectors, which need no ends; their gradient may be 0."""
    here = launch.device_of(None)
    tile = tiling.tiling(1, dtype.itemsize, here)
    V = tile.unroll * tile.warps * here.warp_size * 16 // dtype.itemsize + 1
    values, ids = same_row(V, dtype, device)
    for terms in ((1.0, 0.1), (0.0, None)):
        want = torch.empty(values.shape, device=device)
        rows = Rows(values, device, offset=0, stride=(V + 8) // 8 * 8, fill=7.0)
        assert vector_width(rows.values) == 16 // dtype.itemsize
        options = dict(zip(("advantage", "bonus"), terms, strict=True))
        wanted = loss_and_gradient(reference, values.to(device).float(), ids, want, **options)
        got = loss_and_gradient(launchers, rows.values, ids, rows.values, **options)
        for a, b in zip(got, wanted, strict=True):
            assert relative_error(a, b) < 2e-6
        assert relative_error(rows.values, want) < {torch.float32: 3e-6}.get(dtype, 8e-3)
        rows.check_outside()
    rows.values.copy_(values)
    launchers.rescale(rows.values, 3.0, 1.5)
    assert torch.equal(rows.values, 2 * values.to(device))
    rows.check_outside()


@DTYPES
@pytest.mark.parametrize("V", [9, 1031])
def test_a_row_has_one_result_wherever_it_starts(V, dtype, device):
    """Statistics and gradient are those of any other place, bit for bit, also with a softcap."""
    values, ids = same_row(V, dtype, device)
    for softcap in (None, 20.0):
        results = []
        for offset, stride in ((3, None), (0, None), (2, (V + 8) // 8 * 8)):
            rows = Rows(values, device, offset, stride)
            outputs = loss_and_gradient(launchers, rows.values, ids, rows.values, softcap=softcap)
            results.append((*outputs, rows.values))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@DTYPES
@pytest.mark.parametrize("V", [1, 9, 263, 1031])
def test_rows_of_zero_gradient(V, dtype, device):
    values, ids = same_row(V, dtype, device)
    rows = Rows(values, device)
    active = torch.zeros(ids.shape, device=device)
    nothing = torch.zeros(ids.shape, device=device)
    launchers.logprob_bwd(
        *(rows.values, ids, active, 1.0, 1.0, None, nothing, nothing, nothing, nothing),
        *(nothing, nothing, rows.values),
    )
    assert (rows.values == 0).all()
    rows.check_outside()


@DTYPES
@pytest.mark.parametrize("V", [1, 9, 263, 1031])
def test_rescale(V, dtype, device):
    values, _ = same_row(V, dtype, device)
    rows = Rows(values, device)
    launchers.rescale(rows.values, 3.0, 1.5)
    assert torch.equal(rows.values.cpu(), values * 2)
    rows.check_outside()


@pytest.mark.parametrize("column", [0, 6, 7, 8, 127, 128, 134, 1023, 1024, 1025, 1036])
def test_every_column_counts_once(column, device):
    """A row with one finite logit: its probability is 1, and NaN anywhere is not lost."""
    V = 1037
    row = torch.full((V,), -torch.inf)
    row[column] = 2.0
    ids = torch.full((1, ROWS), column, device=device)
    rows = Rows(row.expand(1, ROWS, V), device)
    logps, entropies = selective_log_softmax(
        rows.values, ids, compute_entropy=True, implementation="triton"
    )
    assert (logps == 0).all() and (entropies == 0).all()
    rows.values[0, :, column] = torch.nan
    logps, _ = selective_log_softmax(rows.values, ids * 0, implementation="triton")
    assert logps.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("V", [32_001, 50_257])
@pytest.mark.skipif(not launch.INTERPRETED, reason="on a device these sizes are used anyway")
def test_block_sizes_of_a_real_device(V, dtype, monkeypatch):
    h100 = launch.Device("sm_90", warp_size=32, multiprocessors=2)
    monkeypatch.setattr(launch, "device_of", lambda index: h100)
    test_loss_and_gradient(V, "in place", dtype, "cpu")
