"""GRPO_FUSED_CHECK=1: ranks compare their arguments before they exchange anything else.

Ranks that disagree would wait for each other, or compute a loss that no one asked for. Comparing
costs two exchanges and a wait for the device, so that it is off unless the variable is 1.
"""

import os
import zlib

import torch

from grpo_fused.collectives import check_group
from grpo_fused.parallel import dtensor_group, is_dtensor, is_vocab_parallel

ENABLED = os.environ.get("GRPO_FUSED_CHECK") == "1"
# Arguments that hold a shard, or hidden states: ranks have values of their own.
SHARDED = ("logits", "weight", "bias", "main_grad", "vocab_start")
OWN_VALUES = (*SHARDED, "hidden")
PER_TOKEN: tuple[str, ...] = ("logits", "hidden", "completion_ids", "completion_mask")
PER_TOKEN += ("ids", "mask")
PER_TOKEN += ("old_logps", "ref_logps", "sampling_logps", "logps", "kl_logps", "entropies")
OF_TOKENS = ("support", "support ids")  # tensors of a size of their own on every rank
# One value a token, or one a sequence: so if there are as many tokens as sequences.
EITHER = ("advantages", "importance_sampling_ratio", "policy_mask", "temperature")
GROUPS = ("vocab_parallel_group", "sequence_group")


def check_agreement(function: str, arguments: dict) -> None:
    """Compare the arguments of a public function over the ranks of its groups.

    Args:
        function: its name.
        arguments: {name: value} of all of its arguments.

    Raises:
        ValueError: on every rank, if two of them disagree, or if shards leave columns out or have
            some twice.
    """
    for name in GROUPS:
        check_group(name, arguments.get(name))
    support = arguments.get("support")
    if isinstance(support, tuple | list) and len(support) == 2:
        names = ("support", "support ids")
        arguments = arguments | dict(zip(names, support, strict=True))
    shard = arguments.get("weight", arguments.get("logits"))
    vocabulary = arguments.get("vocab_parallel_group")
    if vocabulary is None and is_dtensor(shard):
        if "weight" not in arguments or is_vocab_parallel(shard):
            vocabulary = dtensor_group(shard)
    if vocabulary is not None:
        ranks = _gather({"function": function} | _of_vocabulary(arguments), vocabulary)
        shards = [rank.pop("shard") for rank in ranks]
        compare(ranks)
        _check_shards(shards)
    if arguments.get("sequence_group") is not None:
        mine = {"function": function} | _of_sequences(arguments)
        compare(_gather(mine, arguments["sequence_group"]))


def _gather(mine, group):
    found = [None] * group.size()
    torch.distributed.all_gather_object(found, mine, group=group)
    return found


def compare(ranks: list[dict]) -> None:
    """Check that all ranks of a group have the same values, by name.

    Raises:
        ValueError: naming the first that differs.
    """
    first = ranks[0]
    for number, other in enumerate(ranks):
        for name in first:
            if other.get(name) != first[name]:
                raise ValueError(
                    f"the ranks disagree on {name}: {first[name]} on rank 0 of the group, "
                    f"{other.get(name)} on rank {number}"
                )


def _of_vocabulary(arguments):
    """What ranks that share rows must agree on; "shard": (start or None, columns of this rank)."""
    found = {}
    for name, value in arguments.items():
        if name in GROUPS:
            continue
        if not isinstance(value, torch.Tensor):
            found[name] = repr(value) if name != "vocab_start" else value is not None
        else:
            columns = {"logits": -1, "weight": 0, "bias": 0, "main_grad": 0}.get(name)
            shape = list(value.shape)
            if columns is not None and shape:
                shape[columns] = "V"
            found[name] = _describe(value, shape, name not in OWN_VALUES)
    logits = arguments.get("logits")
    shard, dimension = (arguments["weight"], 0) if logits is None else (logits, -1)
    size = shard.shape[dimension] if isinstance(shard, torch.Tensor) and shard.dim() else None
    return found | {"shard": (arguments.get("vocab_start"), size)}


def _of_sequences(arguments):
    """What ranks that share sequences must agree on: all but the tokens."""
    names = [name for name in ("completion_ids", "ids", "logps") if name in arguments]
    tokens = arguments[names[0]]
    layout = list(tokens.shape) if isinstance(tokens, torch.Tensor) else []
    cu_seqlens = arguments.get("cu_seqlens")
    number = [len(cu_seqlens) - 1] if isinstance(cu_seqlens, torch.Tensor) else layout[:1]
    found = {}
    for name, value in arguments.items():
        if name in GROUPS:
            continue
        if name in OF_TOKENS and isinstance(value, torch.Tensor):
            found["support"] = "given"
            continue
        if not isinstance(value, torch.Tensor):
            found[name] = repr(value)
            continue
        shape = list(value.shape)
        of_tokens = name in PER_TOKEN or (name in EITHER and shape not in (number, [*number, 1]))
        for extra, label in enumerate(("T", "T + 1")):
            if of_tokens and layout and shape[: len(layout)] == [*layout[:-1], layout[-1] + extra]:
                shape[len(layout) - 1] = label
        own = of_tokens or name in (*OWN_VALUES, "cu_seqlens")
        found[name] = _describe(value, shape, not own)
    return found


def _describe(tensor, shape, with_values):
    shape = f"({', '.join(map(str, shape))})"
    if not with_values:
        return f"{tensor.dtype} {shape}"
    values = tensor.detach().cpu().contiguous()
    if values.numel() == 1:
        return f"{tensor.dtype} {shape} {values.item()}"
    checksum = zlib.crc32(values.flatten().view(torch.uint8).numpy().tobytes())
    return f"{tensor.dtype} {shape} with checksum {checksum:08x}"


def _check_shards(shards):
    start = 0
    for number, (given, size) in enumerate(shards):
        if given is not None and given != start:
            raise ValueError(
                f"vocab_start is {given} on rank {number} of the group, whose columns start at "
                f"{start}: the shards are {shards}, as (vocab_start, columns)"
            )
        start += size
