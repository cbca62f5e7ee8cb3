"""Evaluation: held-out rows completed once each."""

import torch

from grpo_fused.trainer.collect import judge
from grpo_fused.trainer.setup import split_columns
from grpo_fused.trainer.state import random_states, set_random_states


def evaluate(trainer):
    """Mean rewards and length over `trainer.eval_data`, all ranks: a dict of `eval/...`.

    Every rank completes as many rows as any other, the last ones perhaps for nothing. Samples and
    rewards of the training stay what they would be.
    """
    config, accelerator = trainer.config, trainer.accelerator
    ranks, number = accelerator.num_processes, len(trainer.eval_data)
    places = range(accelerator.process_index, -(-number // ranks) * ranks, ranks)
    device = accelerator.device
    sums = counts = 0.0
    states = random_states(device)
    try:
        for start in range(0, len(places), config.eval_batch_size):
            part = places[start : start + config.eval_batch_size]
            prompts, columns = split_columns([trainer.eval_data[i % number] for i in part])
            with accelerator.autocast():
                rollout = trainer.sampler.roll_out(
                    trainer.unwrapped, prompts, columns, temperature=config.eval_temperature
                )
            scores = judge(trainer, rollout)
            each = {f"rewards/{name}": values for name, values in (scores.each or {}).items()}
            lengths = torch.tensor([float(len(ids)) for ids in rollout.completion_ids])
            values = {"reward": scores.total, "completions/mean_length": lengths} | each
            matrix = torch.stack([v.detach().float().cpu() for v in values.values()])
            counted = torch.tensor([i < number for i in part]) & ~matrix.isnan()
            sums = sums + matrix.where(counted, 0.0).sum(1)
            counts = counts + counted.sum(1)
    finally:
        set_random_states(states, device)
    sums, counts = accelerator.reduce(torch.stack([sums, counts]).to(device)).cpu()
    means = (sums / counts).tolist()  # NaN where nobody judged
    return {f"eval/{name}": mean for name, mean in zip(values, means, strict=True)}
