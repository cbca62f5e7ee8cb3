"""Exchanges between the ranks of a torch.distributed group: every one of the package is here."""

from typing import NamedTuple

import torch
from torch import Tensor


class Pending(NamedTuple):
    """An exchange under way."""

    gathered: Tensor
    work: "torch.distributed.Work | None"

    def wait(self) -> Tensor:
        """The result, for the current stream of the device; the host does not wait for a GPU."""
        if self.work is not None:
            self.work.wait()
        return self.gathered


def check_group(name: str, group) -> None:
    """Raise unless a group is None or a process group of this rank.

    Raises:
        ValueError: it is anything else.
    """
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(f"{name} must be a ProcessGroup or None, got {group!r}")


def start_gather(tensor: Tensor, group: "torch.distributed.ProcessGroup") -> Pending:
    """Start to collect the tensors of all ranks, one behind the other in the first dimension."""
    dist = torch.distributed
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch < 2.13
    gathered = tensor.new_empty(group.size() * len(tensor), *tensor.shape[1:])
    is_async = not torch.compiler.is_compiling()  # Dynamo traces no other
    return Pending(gathered, gather(gathered, tensor, group=group, async_op=is_async))


def gather(tensor: Tensor, group: "torch.distributed.ProcessGroup") -> Tensor:
    """The tensors of all ranks, one behind the other in the first dimension."""
    return start_gather(tensor, group).wait()


def reduce_over_ranks(
    tensor: Tensor, group: "torch.distributed.ProcessGroup", op: str = "SUM"
) -> Tensor:
    """Replace a tensor by its sum ("MIN", "MAX": its extremum) over the ranks; return it."""
    torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, op), group=group)
    return tensor


class _Sum(torch.autograd.Function):
    """A sum over ranks. The total loss is that of all ranks: backward sums upstream gradients."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return reduce_over_ranks(tensor.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx, grad_output):
        return _Sum.apply(grad_output, ctx.group), None


def sum_over_ranks(tensor: Tensor, group: "torch.distributed.ProcessGroup") -> Tensor:
    """The sum over the ranks, differentiable: its gradient is that of the sum of their losses."""
    return _Sum.apply(tensor, group)
