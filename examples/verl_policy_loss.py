"""Compute verl's policy loss of a batch, with its own implementation and with the fused one.

    pip install ".[verl]"
    python examples/verl_policy_loss.py

A real run needs only the name: verl finds the losses by itself, and
`actor_rollout_ref.actor.policy_loss.loss_mode=grpo_fused_vanilla` selects one.
"""

import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig

B, T = 8, 32


def make_batch(generator):
    """Make the tensors that verl passes to a policy loss, (B, T) each."""
    response_mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=generator)
    log_prob = -torch.rand(B, T, generator=generator) * 3
    return {
        "log_prob": log_prob.requires_grad_(True),
        "old_log_prob": log_prob.detach() + 0.3 * torch.randn(B, T, generator=generator),
        "advantages": torch.randn(B, 1, generator=generator).expand(B, T),
        "response_mask": response_mask,
    }


def main():
    batch = make_batch(torch.Generator().manual_seed(0))
    config = ActorConfig(strategy="fsdp", rollout_n=4, use_dynamic_bsz=True, clip_ratio_high=0.28)
    # verl's worker sets the global divisors of all ranks before it calls a loss.
    config.global_batch_info.update(dp_size=1, batch_num_tokens=int(batch["response_mask"].sum()))
    for name in ("vanilla", "grpo_fused_vanilla"):
        loss, metrics = get_policy_loss_fn(name)(**batch, loss_agg_mode="token-mean", config=config)
        (gradient,) = torch.autograd.grad(loss, batch["log_prob"])
        shown = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        print(f"{name}: loss {loss.item():.6f}, gradient norm {gradient.norm():.6f}, {shown}")


if __name__ == "__main__":
    main()
