"""Few rows: programs share each of them, and nothing but time depends on it, bit for bit."""

import math

import pytest
import torch
import triton
import triton.language as tl
from batches import make_batch
from launch_counter import Counter, options_of, traffic_of
from test_unaligned import Rows, loss_and_gradient

import grpo_fused.kernels.launch as launch
from grpo_fused import grpo_loss, selective_log_softmax
from grpo_fused.kernels import launchers, tiling
from grpo_fused.kernels.partials import partials
from grpo_fused.kernels.row_gradient import _owns, write_row_zeros

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
KERNELS = ("_partials_kernel", "_fused_loss_kernel", "_logprob_fwd_kernel", "_logprob_bwd_kernel")


def share(monkeypatch, always):
    """Let programs share every row of more than one segment, or none."""
    cost = -math.inf if always else tiling.NEVER
    choices = [choice._replace(sharing=cost) for choice in tiling.CHOICES]
    monkeypatch.setattr(tiling, "CHOICES", choices)


def segment_columns(dtype, device):
    tile = tiling.tiling(20_000, dtype.itemsize, launch.device_of(None))
    threads = tile.warps * launch.device_of(None).warp_size
    return tile.segment * tile.unroll * threads * 16 // dtype.itemsize


def both_ways(monkeypatch, run):
    """[results of one program a row, of several]."""
    results = []
    for always in (False, True):
        share(monkeypatch, always)
        results.append(run())
    return results


def assert_same(alone, shared):
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a, b)
        assert not a.isnan().any()


OPTIONS = {
    "plain": {},
    "full": {
        "ref_logps": True,
        "beta": 0.1,
        "entropy_coef": 0.01,
        "temperature": 0.7,
        "logit_softcap": 9.0,
    },
    "entropy": {"compute_entropy": True, "logit_scale": 0.8},
    "coupled": {"loss_type": "gspo", "entropy_coef": 0.01},
}


@DTYPES
@pytest.mark.parametrize("extra", [0, 64, 515], ids=["whole", "even", "odd"])
@pytest.mark.parametrize(
    ("inplace", "options"),
    [(False, "plain"), (True, "full"), (True, "entropy"), (False, "coupled"), (True, "coupled")],
)
def test_losses(inplace, extra, options, dtype, device, monkeypatch):
    """Masked rows, a last position that is ignored, an advantage of 0; V whole segments or not."""
    V = 2 * segment_columns(dtype, device) + extra
    batch = make_batch(B=2, T=2, V=V, dtype=dtype, device=device)
    options = dict(OPTIONS[options])
    if options.pop("ref_logps", False):
        options["ref_logps"] = batch.ref_logps
        options["logit_softcap"] = torch.tensor(options["logit_softcap"], device=device)

    def run():
        leaf = batch.leaf()
        out = grpo_loss(
            *(leaf * 1.0, batch.ids, batch.mask, batch.advantages),
            old_logps=batch.old_logps,
            inplace=inplace,
            implementation="triton",
            **options,
        )
        out.loss.backward()
        entropies = [out.entropies] if out.entropies is not None else []
        return [leaf.grad, out.logps, out.sums, out.loss.detach(), *entropies]

    assert_same(*both_ways(monkeypatch, run))


@DTYPES
@pytest.mark.parametrize("extra", [0, 515], ids=["even", "odd"])
def test_log_probabilities_of_strided_rows(extra, dtype, device, monkeypatch):
    V = 2 * segment_columns(dtype, device) + extra
    batch = make_batch(B=2, T=3, V=V + 24, dtype=dtype, extra=0, device=device)
    ids = batch.ids.clamp(max=V - 1)

    def run():
        leaf = batch.leaf()
        outputs = selective_log_softmax(
            leaf[..., 8 : 8 + V], ids, batch.mask, compute_entropy=True, implementation="triton"
        )
        (outputs[0] * 2 - outputs[1]).sum().backward()
        return [leaf.grad, *(output.detach() for output in outputs)]

    assert_same(*both_ways(monkeypatch, run))


@DTYPES
@pytest.mark.parametrize("extra", [0, 8, 13], ids=str)
def test_targets_at_the_ends_of_segments(extra, dtype, device, monkeypatch):
    """One program writes a target's column, and knows its logit though others have overwritten it.

    Rows of an odd vocabulary start anywhere, so the ends are moved by up to a vector of columns.
    """
    columns = segment_columns(dtype, device)
    V = 2 * columns + extra
    ends = [0, *range(columns - 6, columns + 8), V - 1]
    ids = torch.tensor([ends], device=device)
    values = torch.randn(V, generator=torch.Generator().manual_seed(V)).to(dtype)

    def run():
        stride = None if extra == 13 else -(-V // 8) * 8
        rows = Rows(values.expand(1, 16, V), device, offset=0, stride=stride)
        outputs = loss_and_gradient(launchers, rows.values, ids, rows.values, softcap=20.0)
        rows.check_outside()
        return [*outputs, rows.values]

    assert_same(*both_ways(monkeypatch, run))


@triton.jit
def _owners_kernel(written_ptr, stride, V, owned_ptr, ENDS: tl.constexpr):
    part = tl.program_id(0)
    row_ptr = written_ptr + part * stride
    write_row_zeros(row_ptr, V, part, 1, 4, 4, 1, 2, ENDS)  # segments of 2 lines of 4 x 4 columns
    for column in range(V):
        owned = _owns(part, row_ptr, V, column, 32, 4, ENDS)
        tl.store(owned_ptr + part * V + column, tl.where(owned, 1.0, 0.0))


@pytest.mark.parametrize("V", [64, 75, 79, 96])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_who_writes_a_column_owns_it(V, start, device):
    """Another program's store of the target would race with that of its column."""
    memory = torch.ones(4 * 100 + start, device=device)[start:].view(4, 100)
    owned = torch.zeros(4, V, device=device)
    _owners_kernel[(4,)](memory, 100, V, owned, ENDS=start > 0)
    written = memory[:, :V] == 0
    assert (written.sum(0) == 1).all() and (memory[:, V:] == 1).all()
    assert torch.equal(owned == 1, written)


def test_merged_statistics_are_those_of_float64(device, monkeypatch):
    """The greatest logit in every segment in turn, segments of nothing but -inf."""
    share(monkeypatch, True)
    columns = segment_columns(torch.float32, device)
    V = 3 * columns + 21
    logits = torch.randn(1, 5, V, generator=torch.Generator().manual_seed(0))
    for row, column in enumerate([3, columns + 3, 2 * columns + 3, V - 1]):
        logits[0, row, column] += 40.0
    logits[0, 4, : 2 * columns + 40] = -torch.inf
    ids = torch.tensor([[3, 5, V - 1, V - 1, V - 2]])
    want = logits.double().log_softmax(-1)
    entropy = -torch.where(want.isinf(), 0.0, want.exp() * want).sum(-1)
    logps, entropies = selective_log_softmax(
        logits.to(device), ids.to(device), compute_entropy=True, implementation="triton"
    )
    want = want.gather(-1, ids[..., None])[..., 0]
    assert (logps.cpu() - want).abs().max() < 1e-5
    assert (entropies.cpu() - entropy).abs().max() < 1e-5


def test_what_programs_leave_for_each_other(device, monkeypatch):
    """Nothing of a position that is ignored, of an id that is none, of a segment too many."""
    share(monkeypatch, True)
    V = 2 * segment_columns(torch.float32, device) + 3  # aligned, a third segment would have them
    logits = torch.randn(2, 3, V).to(device)
    ids = torch.tensor([[0, V - 1], [V, -1]], device=device)
    found, slots, targets, parts = partials(logits, ids, None, 1.0, 1.0, None, True)
    assert (slots, parts) == (4, 3) and len(targets) == 6
    empty = found.view(2, 3, slots, -1).isnan().all(3)  # conftest: it was NaN before
    assert empty.tolist() == [[[False, False, True, False]] * 2 + [[True] * 4]] * 2
    assert torch.equal(targets[:2], logits[0, [0, 1], [0, V - 1]])
    assert targets[2:].isnan().all()


@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
def test_launches_and_bytes(loss_type, device, monkeypatch):
    """One launch more, and what the first has read the second finds in the caches."""
    share(monkeypatch, True)
    V = 2 * segment_columns(torch.float32, device)
    batch = make_batch(B=2, T=3, V=V, device=device)
    logits = batch.leaf()
    with Counter(monkeypatch) as counter:
        out = grpo_loss(
            *(logits, batch.ids, batch.mask, batch.advantages),
            loss_type=loss_type,
            implementation="triton",
            **options_of(batch, "old_logps"),
        )
        out.loss.backward()
    coupled = loss_type == "gspo"
    launches = [name for name in counter.launches if name in KERNELS]
    fused = ["_partials_kernel", "_fused_loss_kernel"]
    assert launches == (["_partials_kernel", *KERNELS[2:]] if coupled else fused)
    assert traffic_of(counter, *KERNELS) == ((1 + coupled) * logits.nbytes, logits.nbytes)


def test_without_gradient_one_program_merges_a_row(device, monkeypatch):
    share(monkeypatch, True)
    V = 2 * segment_columns(torch.float32, device)
    batch = make_batch(B=2, T=3, V=V, extra=0, device=device)
    grids = []
    start = launch.launch

    def counted(function, programs, *args, **options):
        grids.append((function.__name__, programs))
        start(function, programs, *args, **options)

    monkeypatch.setattr(launch, "launch", counted)
    multiprocessors = launch.Device("interpreter", 32, 100) if launch.INTERPRETED else None
    if multiprocessors:
        monkeypatch.setattr(launch, "device_of", lambda index: multiprocessors)
    arguments = (batch.ids, batch.mask, batch.advantages)
    grpo_loss(batch.leaf(), *arguments, implementation="triton")
    grpo_loss(batch.logits, *arguments, implementation="triton")
    rows = [grid for grid in grids if grid[0] in KERNELS]
    assert rows == [
        ("_partials_kernel", 12),
        ("_fused_loss_kernel", 12),
        ("_partials_kernel", 12),
        ("_fused_loss_kernel", 6),
    ]


def test_who_shares():
    """Whole rounds of rows are left alone; what fills less than three quarters of one is not."""
    device = launch.Device("sm_90", warp_size=32, multiprocessors=132)

    def programs(rows, V, itemsize=2):
        tile = tiling.tiling(V, itemsize, device)
        block = tile.unroll * tile.warps * 32 * 16 // itemsize
        return tiling.programs_per_row(rows, -(-V // (tile.segment * block)), device, tile)

    assert [programs(rows, 151_936) for rows in (1, 26, 66, 79)] == [5, 5, 5, 5]
    assert [programs(rows, 151_936) for rows in (120, 132, 256, 264, 8192)] == [1] * 5
    assert programs(140, 151_936) == 5
    assert [programs(8, V) for V in (128_256, 262_144)] == [4, 8]
    assert programs(8, 32_000) == 1 and programs(8, 32_000, 4) == 2
    alone = launch.Device("interpreter", warp_size=32, multiprocessors=1)
    assert tiling.programs_per_row(1, 10, alone, tiling.tiling(10**6, 4, alone)) == 1
