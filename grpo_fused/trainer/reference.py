"""The reference model of the KL penalty, and refreshing it from the policy."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Reference:
    """The model that the KL penalty compares the policy to: an earlier version of the policy.

    It is a frozen copy of the model. Otherwise the policy itself serves, with other values in its
    parameters for a while: a model that transformers has distributed cannot be copied, and of one
    with adapters these are switched off, as long as they are fresh, or set to earlier values: those
    of the last refresh or, of adapters that may have been trained before, of the beginning, when
    the trainer calls `refresh`.

    Args:
        model: the policy, before it is prepared or wrapped.
        mix: weight of the policy in a refreshed reference, in (0, 1].
        distributed: whether transformers has distributed the model.

    Attributes:
        model: the copy, or None where the policy serves.
        values: of the policy's parameters where it serves, those of this rank: of all of them, or
            of adapters at the last refresh; None before that.

    Raises:
        ValueError: mix is below 1 for a model with adapters: the average of two adapters is not
            the adapter of the average model.
    """

    def __init__(self, model: nn.Module, mix: float = 1.0, distributed: bool = False):
        self.mix = mix
        self.model: nn.Module | None = None
        self.values: list[torch.Tensor] | None = None
        if distributed:
            self.values = [p.detach().clone() for p in trainable_parameters(model)]
        elif not is_peft_model(model):
            self.model = copy.deepcopy(model).eval().requires_grad_(False)
        elif mix != 1.0:
            raise ValueError(f"reference_mix must be 1 for a model with adapters, got {mix}")

    @contextlib.contextmanager
    def activate(self, model: nn.Module, policy: nn.Module) -> Iterator[nn.Module]:
        """Yields the module to call for the reference's outputs.

        Args:
            model: the policy as it is wrapped for training.
            policy: the same, unwrapped.
        """
        if self.model is not None:
            yield self.model
        elif self.values is None:
            with policy.disable_adapter():
                yield model
        else:
            with swapped_values(policy, self.values):
                yield model

    @torch.no_grad()
    def refresh(self, policy: nn.Module) -> None:
        """Sets the reference to the policy, or moves it towards the policy by `mix`."""
        reshard(policy)
        if self.model is None:
            new = trainable_parameters(policy)
            if self.values is None or self.mix == 1:
                self.values = [parameter.detach().clone() for parameter in new]
                return
            for mine, parameter in zip(self.values, new, strict=True):
                local_tensor(mine).lerp_(local_tensor(parameter.detach()), self.mix)
            return
        for mine, new in zip(self.model.parameters(), policy.parameters(), strict=True):
            new = full_tensor(new).to(mine.dtype)
            mine.copy_(new) if self.mix == 1 else mine.lerp_(new, self.mix)
        for mine, new in zip(self.model.buffers(), policy.buffers(), strict=True):
            mine.copy_(new)

    def state_dict(self) -> Any:
        """Returns the weights of the copy, equal on all ranks, or this rank's values."""
        if self.model is not None:
            return self.model.state_dict()
        return None if self.values is None else list(map(local_tensor, self.values))

    @torch.no_grad()
    def load_state_dict(self, state: Any, policy: nn.Module) -> None:
        """Restores what `state_dict` returned."""
        if self.model is not None:
            self.model.load_state_dict(state)
        elif state is not None:
            self.refresh(policy)  # allocates values with the policy's sharding
            for tensor, saved in zip(self.values, state, strict=True):
                local_tensor(tensor).copy_(saved)


def is_peft_model(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gathers a sharded tensor from all ranks; returns any other tensor detached."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's shard of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Frees the weights that FSDP2 keeps gathered after a forward, which may be out of date."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def swapped_values(model: nn.Module, values: Sequence[torch.Tensor]) -> Iterator[None]:
    """Gives trainable parameters other values for a while, in place: wrappers keep their memory."""
    reshard(model)
    parameters = trainable_parameters(model)

    @torch.no_grad()
    def assign(new_values):
        reshard(model)
        for parameter, value in zip(parameters, new_values, strict=True):
            local_tensor(parameter).copy_(local_tensor(value))

    own = [parameter.detach().clone() for parameter in parameters]
    assign(values)
    try:
        yield
    finally:
        assign(own)
