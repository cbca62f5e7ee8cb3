"""Bad input of the functions over a head is refused by a ValueError that names the argument."""

import pytest
import torch
from heads import make_head_batch

from grpo_fused import linear_grpo_loss, linear_selective_log_softmax

H, V = 16, 53
BAD = {
    "list": ({"hidden": [[1.0]]}, "hidden must be a tensor"),
    "integers": ({"hidden": lambda a: a["hidden"].long()}, "hidden must be float32"),
    "float64": ({"hidden": lambda a: a["hidden"].double()}, "hidden must be float32"),
    "packed": ({"hidden": lambda a: a["hidden"][0]}, "cu_seqlens is required|hidden must be"),
    "positions": ({"hidden": lambda a: a["hidden"][:, :-2]}, r"hidden must be \(B, T, H\) or"),
    "batch": ({"hidden": lambda a: a["hidden"][:1]}, r"hidden must be \(B, T, H\) or"),
    "weight list": ({"weight": 3}, "weight must be a tensor"),
    "weight 1-D": ({"weight": torch.ones(H)}, r"weight must be \(V, 16\)"),
    "weight H": ({"weight": torch.ones(V, H + 1)}, r"weight must be \(V, 16\) .* got \(53, 17\)"),
    "weight V": ({"weight": torch.ones(0, H)}, r"weight is empty, got shape \(0, 16\)"),
    "weight ZeRO-3": ({"weight": torch.ones(0)}, "weight is empty.*ZeRO-3.*within the forward"),
    "weight dtype": ({"weight": torch.ones(V, H).bfloat16()}, "weight is .*bfloat16.*upcast=True"),
    "weight device": ({"weight": torch.ones(V, H, device="meta")}, "weight is on meta"),
    "bias": ({"bias": torch.ones(V + 1)}, r"bias must be \(53,\), got \(54,\)"),
    "bias dtype": ({"bias": torch.ones(V).half()}, "bias is .*float16"),
    "main_grad": ({"main_grad": torch.ones(V)}, r"main_grad must be \(53, 16\)"),
    "main_grad dtype": ({"main_grad": torch.ones(V, H).half()}, "main_grad must be float32"),
    "main_grad graph": (
        {"main_grad": torch.ones(V, H, requires_grad=True)},
        "main_grad must be float32 and not require a gradient",
    ),
    "main_grad frozen": (
        {"main_grad": torch.ones(V, H), "weight": torch.ones(V, H)},
        "main_grad requires a weight with requires_grad=True",
    ),
    "chunk": ({"chunk_bytes": 0}, "chunk_bytes must be a positive integer or None, got 0"),
    "logits dtype": (
        {"logits_dtype": torch.bfloat16},
        r"logits_dtype must be torch.float32, torch.float32 or None, got torch.bfloat16",
    ),
    "logits text": ({"logits_dtype": "float32"}, "logits_dtype must be torch.float32, .* got 'f"),
    "chunk text": ({"chunk_bytes": "1G"}, "chunk_bytes must be"),
    "ids": (
        {"ids": lambda a: a["ids"].masked_fill(a["mask"] != 0, V)},
        r"ids must lie in \[0, 53\) where the mask is nonzero, got 53",
    ),
    "temperature": ({"temperature": 0.0}, "temperature must be a finite number > 0"),
    "implementation": ({"implementation": "gpu"}, "implementation must be one of"),
}


def arguments(changes):
    head = make_head_batch()
    hidden, weight, bias = head.leaves()
    given = {
        "hidden": hidden.detach(),
        "weight": weight,
        "ids": head.batch.ids,
        "mask": head.batch.mask,
        "bias": bias,
    }
    return given | {k: v(given) if callable(v) else v for k, v in changes.items()}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, message = BAD[case]
    given = arguments(changes)
    with pytest.raises(ValueError, match=message):
        linear_selective_log_softmax(**given)
    given["completion_ids"], given["completion_mask"] = given.pop("ids"), given.pop("mask")
    with pytest.raises(ValueError, match=message.replace("ids must", "completion_ids must")):
        linear_grpo_loss(**given, advantages=torch.ones(4))


def test_options_of_the_loss_are_checked_as_over_logits():
    head = make_head_batch()
    b = head.batch
    inputs = (head.hidden, head.weight, b.ids, b.mask)
    with pytest.raises(ValueError, match="ref_logps is needed unless beta is 0"):
        linear_grpo_loss(*inputs, b.advantages, beta=0.1)
    with pytest.raises(ValueError, match="loss_type must be one of"):
        linear_grpo_loss(*inputs, b.advantages, loss_type="grop")
    with pytest.raises(TypeError, match="inplace"):
        linear_grpo_loss(*inputs, b.advantages, inplace=True)


@pytest.fixture
def mesh(tmp_path):
    """A process group of this process alone, and its mesh."""
    from torch.distributed.device_mesh import init_device_mesh

    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_weight_is_refused_with_a_remedy(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    head = make_head_batch()
    weight = distribute_tensor(head.weight, mesh, [Shard(0)])
    b = head.batch
    for call in (
        lambda: linear_grpo_loss(head.hidden, weight, b.ids, b.mask, b.advantages),
        lambda: linear_selective_log_softmax(head.hidden, weight, b.ids, b.mask),
    ):
        with pytest.raises(ValueError, match="weight is a DTensor.*full_tensor"):
            call()
