"""AdamW whose weights are float32, also where the model's are bfloat16 or float16."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from transformers import get_scheduler

from grpo_fused.trainer.reference import local_tensor, trainable_parameters
from grpo_fused.trainer.run.config import GRPOTrainerConfig


def make_optimizer(
    model: nn.Module, config: GRPOTrainerConfig, learning_rate: float | None = None
) -> torch.optim.Optimizer:
    """Returns AdamW over the trainable parameters, without weight decay for norms and biases.

    With DTensors `foreach` is off, because torch cannot mix them with tensors in it.

    Args:
        model: with the parameters.
        config: of the run.
        learning_rate: None = that of the config.

    Raises:
        ValueError: nothing is trainable.
    """
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError(
            "model must have a parameter that requires a gradient, got none; an adapter is loaded "
            "for training with PeftModel.from_pretrained(..., is_trainable=True)"
        )
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    learning_rate = config.learning_rate if learning_rate is None else learning_rate
    kind = torch.optim.AdamW
    if any(map(is_half, parameters)):
        if config.master_weights:
            kind = MasterAdamW
        else:
            warn_of_lost_updates(parameters, learning_rate)
    return kind(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=tuple(config.adam_betas),
        foreach=False if any(isinstance(p, DTensor) for p in parameters) else None,
    )


def make_scheduler(optimizer: Any, config: GRPOTrainerConfig) -> Any:
    """Returns the learning rate schedule of an optimizer that Accelerate may have wrapped."""
    return get_scheduler(
        config.lr_scheduler_type,
        getattr(optimizer, "optimizer", optimizer),
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.max_steps,
    )


class MasterAdamW(torch.optim.AdamW):
    """AdamW that keeps a float32 copy, the master, of every parameter in half precision.

    A bfloat16 weight has 8 significant bits: a step of 1e-6, which is what AdamW takes at a
    learning rate of 1e-6, is lost on weights above 5e-4, in every step anew. Masters add the steps
    up, and the parameters are their rounding. Masters and moments take 12 bytes a weight instead of
    the 4 of moments in half precision. Parameters in float32 are their own masters.

    Micikevicius et al., Mixed Precision Training, https://arxiv.org/abs/1710.03740, section 3.1.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Takes a step on the masters and rounds them to the parameters."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in parameters]
            masters = [state.get("master", p) for state, p in zip(states, parameters, strict=True)]
            beta1, beta2 = group["betas"]
            adamw(
                masters,
                [p.grad.to(m.dtype) for p, m in zip(parameters, masters, strict=True)],
                *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")),
                [],
                [state["step"] for state in states],
                foreach=group["foreach"],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                **{name: group[name] for name in ("lr", "weight_decay", "eps", "maximize")},
            )
            for parameter, master in zip(parameters, masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            if is_half(parameter):
                state["master"] = parameter.detach().float()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state; torch alone would round it to the dtype of the parameters."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name != "step":
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


def is_half(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def warn_of_lost_updates(parameters: list[nn.Parameter], learning_rate: float) -> None:
    """Warns of weights that are too large for their dtype to change by one learning rate."""
    lost = count = 0
    for parameter in parameters:
        weight = local_tensor(parameter.detach())
        count += weight.numel()
        if is_half(weight):
            lost += int((weight.abs() - learning_rate == weight.abs()).sum())
    if lost and learning_rate:
        warnings.warn(
            f"{lost / count:.0%} of the weights are too large for their dtype to change by a step "
            f"of learning_rate = {learning_rate}, and stay as they are; master_weights=True keeps "
            "float32 copies that add the steps up",
            stacklevel=2,
        )
