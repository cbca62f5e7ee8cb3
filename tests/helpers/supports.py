"""Supports of random columns, and a loss with everything on over them."""

import torch

from grpo_fused import grpo_loss

EVERYWHERE = {"policy_over": "support", "kl_over": "support", "entropy_over": "support"}


def kept_mask(batch, share=0.2, seed=3):
    """(B, T, V) bool: random columns, and the target."""
    generator = torch.Generator().manual_seed(seed)
    B, T = batch.ids.shape
    kept = torch.rand(B, T, batch.logits.shape[-1], generator=generator) < share
    return kept.scatter(2, batch.ids.cpu().clamp(min=0)[..., None], True)


def loss_of(batch, implementation, upstream=1.0, **options):
    """(LossOutput, gradient) of `grpo_loss` with everything on, the gradient times upstream."""
    leaf = batch.leaf()
    defaults = {
        **{"loss_type": "grpo", "old_logps": batch.old_logps, "ref_logps": batch.ref_logps},
        **{"beta": 0.1, "entropy_coef": 0.01, "compute_entropy": True},
    }
    out = grpo_loss(
        *(leaf * 1.0, batch.ids, batch.mask, batch.advantages),
        implementation=implementation,
        grad_scale=upstream,
        **defaults | options,
    )
    (out.loss * upstream).backward()
    return out, leaf.grad
