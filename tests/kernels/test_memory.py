"""The torch implementation holds no second copy of the logits, whatever their size."""

import mmap
import sys
from pathlib import Path

import pytest
import torch
from batches import make_batch
from storages import NewStorages

import grpo_fused.torch_backend.pages as pages
import grpo_fused.torch_backend.rows as rows
from grpo_fused import grpo_loss, linear_grpo_loss, selective_log_softmax

BLOCK = 1 << 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("function", ["loss", "log-probabilities"])
def test_temporaries_are_blocks(function, inplace, dtype, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_BYTES", BLOCK)
    batch = make_batch(B=8, T=16, V=2000, dtype=dtype)
    logits = batch.leaf() * 1
    with NewStorages(logits) as storages:
        if function == "loss":
            out = grpo_loss(
                logits,
                batch.ids,
                batch.mask,
                batch.advantages,
                old_logps=batch.old_logps,
                compute_entropy=True,
                inplace=inplace,
                implementation="torch",
            )
            torch.autograd.grad(out.loss, logits)
        else:
            logps, entropies = selective_log_softmax(
                logits,
                batch.ids,
                batch.mask,
                compute_entropy=True,
                inplace=inplace,
                implementation="torch",
            )
            torch.autograd.grad((logps + entropies).sum(), logits)
    gradient = [] if inplace else [logits.nbytes]
    assert storages.larger_than(BLOCK) == gradient


@pytest.mark.parametrize("as_tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_no_value_is_read_or_sent_off_the_cpu(dtype, as_tensors, monkeypatch):
    """On the meta device there are no values to read; a tensor made of a number would be a copy
    from the host, and a wait."""
    scales = {"beta": 0.1, "temperature": 0.9, "grad_scale": 1.0}
    if as_tensors:
        scales = {name: torch.tensor(value, device="meta") for name, value in scales.items()}
    tokens = torch.zeros(2, 3, device="meta")
    logits = torch.zeros(2, 4, 11, dtype=dtype, device="meta", requires_grad=True)

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was made from a host value")

    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, refuse)
    for inplace in (False, True):
        out = grpo_loss(
            logits * 1,
            tokens.long(),
            tokens,
            tokens,
            old_logps=tokens,
            ref_logps=tokens,
            compute_entropy=True,
            inplace=inplace,
            num_items_in_batch=tokens.sum(),
            **scales,
        )
        out.loss.backward()
        logps, entropies = selective_log_softmax(
            logits, tokens.long(), tokens, compute_entropy=True
        )
        (logps.sum() + entropies.sum()).backward()
    assert logits.grad.shape == logits.shape and out.logps.shape == (2, 3)


def resident_bytes(tensor):
    """Memory that the pages of a tensor take, as /proc/self/pagemap has it."""
    first, size = tensor.data_ptr() // mmap.PAGESIZE, -(-tensor.nbytes // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(8 * first)
        entries = torch.frombuffer(bytearray(pagemap.read(8 * size)), dtype=torch.int64)
    return mmap.PAGESIZE * (entries < 0).sum().item()  # the top bit: the page exists


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("function", ["loss", "log-probabilities"])
def test_gradient_of_masked_rows_takes_no_memory(function):
    mask = torch.tensor([1, 0])[:, None].expand(2, 300)
    batch = make_batch(B=2, T=300, V=16384, extra=0, mask=mask)
    logits = batch.leaf()
    ids, advantages = batch.ids, batch.advantages
    if function == "loss":
        loss = grpo_loss(logits, ids, mask, advantages, implementation="torch").loss
    else:
        loss = selective_log_softmax(logits, ids, mask, implementation="torch")[0].sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    huge_page = 2 << 20
    assert gradient[0].nbytes <= resident_bytes(gradient) <= gradient[0].nbytes + huge_page
    assert gradient[0].any() and not gradient[1].any()


def mapping_flags(tensor):
    """What the kernel knows of the mapping that a tensor lies in: two letters each."""
    smaps, inside = Path("/proc/self/smaps"), False
    for line in smaps.read_text().splitlines() if smaps.exists() else []:
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, stop = (int(address, 16) for address in first.split("-"))
            inside = start <= tensor.data_ptr() < stop
        elif inside and first == "VmFlags:":
            return rest
    return pytest.skip("the kernel tells no flags of mappings")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("reported", "large"),
    [
        (None, True),
        ("-1", True),
        ("0", False),
        ("9", False),
        ("10", False),
        ("11", True),
        ("?", True),
    ],
)
def test_pages_are_large_unless_a_host_takes_them_back(reported, large, tmp_path, monkeypatch):
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("a kernel without large pages")
    monkeypatch.setattr(pages, "REPORTING", tmp_path / "page_reporting_order")
    if reported is not None:
        pages.REPORTING.write_text(f"{reported}\n")
    memory = pages.allocate((8, 1 << 20), torch.float32, torch.device("cpu"))
    assert pages.is_unwritten(memory) and not memory.any() and memory.is_contiguous()
    assert ("hg" in mapping_flags(memory)) == large


def test_small_memory_is_the_c_librarys():
    for length, fresh in ((7, False), (8, True)):
        memory = pages.allocate((length, 1 << 21), torch.bfloat16, torch.device("cpu"))
        assert memory.shape == (length, 1 << 21) and memory.dtype == torch.bfloat16
        assert pages.is_unwritten(memory) == fresh


def test_missing_memory_is_torchs_error():
    with pytest.raises(RuntimeError, match="allocate"):
        pages.allocate((1 << 45,), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_in_fresh_pages(dtype, monkeypatch):
    """Of a head, in two chunks, some of whose tokens are masked; the same as in other memory."""
    batch = make_batch(B=2, T=5, V=53, extra=0)
    hidden, weight = torch.randn(2, 5, 16).to(dtype), torch.randn(53, 16).to(dtype)

    def gradients():
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        budget = 4 * 56 * (4 if dtype == torch.float32 else 6)  # and the gradient of the logits
        arguments = (batch.ids, batch.mask, batch.advantages)
        linear_grpo_loss(*leaves, *arguments, chunk_bytes=budget).loss.backward()
        return [leaf.grad for leaf in leaves]

    want = gradients()
    allocated = []

    def note(shape, *args):
        allocated.append(tuple(shape))
        return allocate(shape, *args)

    allocate = pages.allocate
    for module in ("grpo_fused.autograd.head", "grpo_fused.head.chunks"):
        monkeypatch.setattr(f"{module}.allocate", note)
    monkeypatch.setattr(pages, "LARGE_BYTES", 1)
    for got, wanted in zip(gradients(), want, strict=True):
        assert torch.equal(got, wanted)
    of_weight = 1 if dtype == torch.float32 else 2  # added up in float32
    of_logits = 1 if dtype == torch.float32 else 2  # and their gradient
    want = [(2, 5, 16), *[(53, 16)] * of_weight, *[(4, 56)] * of_logits]
    assert sorted(allocated) == sorted(want)
