"""What type checkers know of the public functions. mypy and pyright read it; nothing runs it.

A line that is an error says so: a checker that misses it reports the comment as unused.
"""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import assert_type

from grpo_fused import (
    LOSSES,
    Cispo,
    Clip,
    GRPOTrainer,
    GRPOTrainerConfig,
    LossOutput,
    gae_advantages,
    grpo_loss,
    grpo_loss_from_logps,
    linear_grpo_loss,
    linear_selective_log_softmax,
    outcome_advantages,
    selective_log_softmax,
)
from grpo_fused.integrations.transformers import fuse_lm_head
from grpo_fused.testing import check_objective

x = torch.zeros(2, 3)
advantages = assert_type(outcome_advantages(x[:, 0], 2), Tensor)
out = grpo_loss(x, x, None, advantages, loss_type="grpo", objective=Clip(0.2, 0.28), beta=0.1)
assert_type(out, LossOutput)
assert_type(out.loss, Tensor)
assert_type(linear_grpo_loss(x, x, x, None, advantages, objective=Cispo()), LossOutput)
assert_type(grpo_loss_from_logps(x, None, advantages, old_logps=x), LossOutput)
assert_type(selective_log_softmax(x, x)[0], Tensor)
assert_type(linear_selective_log_softmax(x, x, x)[0], Tensor)
assert_type(GRPOTrainerConfig(output_dir="x").max_steps, int)
names: list[str] = list(LOSSES)
used: list[Any] = [GRPOTrainer, check_objective, fuse_lm_head, gae_advantages]

grpo_loss(x, x, None, advantages, eps=0.2)  # type: ignore[call-arg]
grpo_loss(x, x, None, advantages, beta="0.1")  # type: ignore[arg-type]
grpo_loss(x, x, None)  # type: ignore[call-arg]
linear_grpo_loss(x, x, x, None, advantages, inplace=True)  # type: ignore[call-arg]
outcome_advantages(x[:, 0], 2.0)  # type: ignore[arg-type]
Clip(0.2, 0.28, 0.3, 0.4, 0.5)  # type: ignore[call-arg]
