"""The ranks of a run: which of them share a batch, and what they exchange."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from grpo_fused import agreement
from grpo_fused.trainer.run.errors import OtherRankError, RolloutError, TrainingError, together

if TYPE_CHECKING:
    from peft import PeftConfig

R = TypeVar("R")


class Ranks:
    """Ranks of data parallelism, each of which may be several ranks of tensor parallelism.

    Ranks of tensor parallelism are neighbours and share a batch: rewards, sampled tokens and
    random states come from the first of them, because rounding must not make them differ.

    Args:
        accelerator: of the run.
        model: the policy, before it is wrapped.

    Attributes:
        index, size: of data parallelism: which part of a batch this rank has, and of how many.
        tensor_size: ranks that share a batch.
        tensor_group: those ranks, or None: only one.
        distributed: whether transformers has distributed the model (`DistributedConfig`), so that
            Accelerate must not wrap it.
        accelerator: of the run.

    Raises:
        ValueError: the model is sharded by something else, or for another number of ranks.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module):
        self.accelerator = accelerator
        config = getattr(getattr(model, "config", None), "distributed_config", None)
        sharded = [n for n, p in model.named_parameters() if isinstance(p, DTensor)]
        self.distributed = bool(sharded) and config is not None
        if sharded and not self.distributed:
            raise ValueError(
                f"model must not be sharded, got {sharded[0]} as a DTensor; load it with a "
                "DistributedConfig of transformers, or let the accelerator shard it with FSDP2"
            )
        world = accelerator.num_processes
        self.tensor_size = config.tp_size if self.distributed else 1
        if self.distributed and world != self.tensor_size * config.dp_size:
            raise ValueError(
                f"model is distributed over {config.dp_size} x {self.tensor_size} ranks (data, "
                f"tensor parallel), the run has {world}"
            )
        self.size = world // self.tensor_size
        self.index = accelerator.process_index // self.tensor_size
        self.tensor_group = None
        if self.tensor_size > 1:
            self.tensor_group, _ = dist.new_subgroups(self.tensor_size)

    def check_options(self, config, peft_config: "PeftConfig | None") -> None:
        """Checks what a model that transformers has distributed does not support.

        Raises:
            ValueError: adapters, or mixed_precision fp16.
        """
        if self.distributed and peft_config is not None:
            raise ValueError(
                "peft_config must be None for a model that transformers has distributed: shard a "
                "model with adapters by FSDP2 through Accelerate"
            )
        sharded = self.distributed or self.accelerator.distributed_type == DistributedType.FSDP
        if sharded and config.algorithm == "ppo":
            raise ValueError(
                "algorithm must be grpo for sharded models, got 'ppo': PPO runs on DDP"
            )
        if self.distributed and config.mixed_precision == "fp16":
            raise ValueError(
                "mixed_precision must be no or bf16 for a model that transformers has distributed: "
                "torch does not scale gradients of DTensors and tensors together"
            )

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a distributed model's forward; Accelerate wraps that of others itself."""
        return self.accelerator.autocast() if self.distributed else contextlib.nullcontext()

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenates a tensor (n, ...) of all data-parallel ranks, on all ranks."""
        rows = self.accelerator.gather(tensor.contiguous())
        if self.tensor_size == 1:
            return rows
        return rows.view(-1, *tensor.shape)[:: self.tensor_size].flatten(0, 1)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the data-parallel ranks, on all ranks."""
        return self.gather(tensor[None]).sum(0)

    def gather_objects(self, value: Any) -> list:
        """Lists an object of every data-parallel rank, on all ranks."""
        return gather_object([value])[:: self.tensor_size]

    def share(self, action: Callable[[], R]) -> R:
        """Returns what an action returns on the first of the ranks that share a batch.

        Raises:
            TrainingError: the action raised on another rank.
            Exception: what the action raised on this one.
        """
        return self.broadcast(together(self.accelerator, action if self.is_first else lambda: None))

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of those that share a batch."""
        return self.tensor_group is None or self.tensor_group.rank() == 0

    def broadcast(self, value: R) -> R:
        """Returns the value that the first of the ranks that share a batch has."""
        if self.tensor_group is None:
            return value
        objects = [value]
        dist.broadcast_object_list(objects, group=self.tensor_group, group_src=0)
        return objects[0]

    def from_main(self, action: Callable[[], R]) -> R:
        """Returns what an action returns on the main process, on every rank.

        Raises:
            RolloutError: the action raised it.
            OtherRankError: the action raised something else, on the other ranks.
            Exception: what the action raised on this one.
        """
        outcome: list[Any] = [None, None]
        own: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                outcome[0] = action()
            except Exception as error:
                own = error
                outcome[1] = isinstance(error, RolloutError), str(error)
        result, failure = broadcast_object_list(outcome)
        if own is not None:
            raise own
        if failure is not None:
            lost, message = failure
            if lost:
                raise RolloutError(message)
            raise OtherRankError("another rank failed; see its message")
        return result

    @contextlib.contextmanager
    def accumulation(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """A context for the forward and backward of one of several micro-batches.

        FSDP2 reduces gradients in the last one only. Under tensor parallelism, transformers 5.24
        sums the gradients of some norms in a hook that each backward calls, over all that has
        accumulated so far, so that earlier gradients stay out of its sight.
        """
        if not self.distributed:
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                yield
            return
        earlier: list[tuple[nn.Parameter, torch.Tensor]] = []
        if self.tensor_size == 1:
            assert isinstance(model, FSDPModule)
            model.set_requires_gradient_sync(is_last)
        elif not isinstance(model, FSDPModule):
            for parameter in model.parameters():
                if parameter.grad is not None and not isinstance(parameter, DTensor):
                    earlier.append((parameter, parameter.grad))
                    parameter.grad = None
        yield
        for parameter, gradient in earlier:
            new = parameter.grad
            parameter.grad = gradient if new is None else new.add_(gradient)

    def check_agreement(self, values: dict[str, Any]) -> None:
        """Checks that every rank was given the same.

        Raises:
            ValueError: on every rank, naming what differs.
        """
        agreement.compare(gather_object([values]))


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> torch.Tensor:
    """Scales gradients to a norm of at most `limit`; returns their norm before.

    Unlike torch's function it takes parameters on different meshes, or on none.
    """
    groups: dict[Any, list[torch.Tensor]] = {}
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
            groups.setdefault(mesh, []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(gradients) for gradients in groups.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.stack(norms).norm()
    factor = (limit / (total + 1e-6)).clamp(max=1.0)
    for gradient in (gradient for gradients in groups.values() for gradient in gradients):
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(factor)
    return total


def explain_lost_rank(error: RuntimeError) -> TrainingError | None:
    """Returns a TrainingError for the error of a collective whose other ranks are gone."""
    text = str(error)
    of_gloo = "gloo/" in text and ("Connection" in text or "imed out" in text or "error" in text)
    if isinstance(error, dist.DistError) or (of_gloo and not isinstance(error, TrainingError)):
        reason = text.strip().splitlines()[0]
        return TrainingError(f"a collective failed, as if another rank had stopped: {reason}")
    return None
