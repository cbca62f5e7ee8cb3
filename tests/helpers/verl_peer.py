"""Run policy losses of verl, and ours, through verl's registry on one batch."""

from typing import NamedTuple

import pytest
import torch
from peers import require

pytest.importorskip("verl", reason="verl 0.9.1 is installed by `make` for Python below 3.13")
require("verl", "0.9.1")

from verl.trainer.ppo.core_algos import get_policy_loss_fn  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402

LENGTHS = (6, 4, 0, 3, 5, 1, 6, 2)
# Mean log-ratios: some sequences are outside of each bound of verl's defaults, on both sides.
DRIFTS = (-0.6, 0.1, 0.0, 0.5, -0.9, 1.4, -0.1, 0.05)


class VerlBatch(NamedTuple):
    """Tensors that verl passes to a policy loss, (B, T) float64; 0 under the mask."""

    old_log_prob: torch.Tensor
    log_prob: torch.Tensor
    advantages: torch.Tensor
    response_mask: torch.Tensor
    rollout_is_weights: torch.Tensor | None = None

    def rows(self, rows):
        return VerlBatch(*(None if t is None else t[rows] for t in self))


def make_verl_batch(seed=0, *, lengths=LENGTHS, rollout=False, per_token=True, scale=0.4):
    """Make a batch that reaches every branch; advantages per token or per sequence."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, T = len(lengths), 6
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    log_prob = -normal(B, T).abs() - 0.1
    drifts = torch.tensor(DRIFTS, dtype=torch.float64)[:B, None]
    advantages = normal(B, T) if per_token else normal(B, 1).expand(B, T)
    weights = (0.4 * normal(B, T)).exp() if rollout else None
    tensors = (log_prob - drifts - scale * normal(B, T), log_prob, advantages, mask, weights)
    # Values that float32 represents exactly: both sides start from the same numbers.
    return VerlBatch(
        *(
            t if t is None or t.dtype == torch.bool else t.float().double().masked_fill(~mask, 0.0)
            for t in tensors
        )
    )


def actor_config(global_batch_info=None, **options):
    """Make verl's configuration of an actor, with its defaults."""
    return ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        use_dynamic_bsz=True,
        global_batch_info=global_batch_info or {},
        **options,
    )


class Result(NamedTuple):
    loss: torch.Tensor
    gradient: torch.Tensor
    metrics: dict


def run(name, batch, config, mode="token-mean", *, under_mask=0.0):
    """Call a registered loss as verl's ppo_loss does: verl's in float64, ours in float32."""
    dtype = torch.float32 if name.startswith("grpo_fused_") else torch.float64
    values = {
        key: t if t is None or key == "response_mask" else poisoned(t, batch, dtype, under_mask)
        for key, t in batch._asdict().items()
    }
    values["log_prob"].requires_grad_(True)
    loss, metrics = get_policy_loss_fn(name)(**values, loss_agg_mode=mode, config=config)
    (gradient,) = torch.autograd.grad(loss, values["log_prob"])
    return Result(loss.detach(), gradient, metrics)


def poisoned(tensor, batch, dtype, under_mask):
    return tensor.to(dtype).masked_fill(~batch.response_mask, under_mask)
