"""The torch implementation holds no second copy of the logits, whatever their size."""

import pytest
import torch
from batches import make_batch
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_fused.reference as reference
from grpo_fused import grpo_loss, selective_log_softmax

BLOCK = 1 << 16


class NewStorages(TorchDispatchMode):
    """Bytes of every storage that the operations inside allocate."""

    def __init__(self, *known):
        super().__init__()
        self.sizes = {tensor.untyped_storage().data_ptr(): 0 for tensor in known}
        self.kept = []  # so that no address is used twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if self.sizes.setdefault(storage.data_ptr(), storage.nbytes()):
                    self.kept.append(tensor)
        return result

    def larger_than(self, size):
        return sorted(n for n in self.sizes.values() if n > size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("function", ["loss", "log-probabilities"])
def test_temporaries_are_blocks(function, inplace, dtype, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_BYTES", BLOCK)
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
