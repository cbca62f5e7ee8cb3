"""Evaluation on held-out rows: one completion each, scored by the reward functions."""

import torch

from grpo_fused.trainer.collect import score
from grpo_fused.trainer.run.data import split_columns
from grpo_fused.trainer.run.errors import together
from grpo_fused.trainer.run.metrics import completions_table, mean_metrics
from grpo_fused.trainer.run.state import random_states, set_random_states, share_random_states


def evaluate(trainer) -> dict[str, float]:
    """Completes every row of `trainer.eval_data` once and averages the rewards.

    Rows are divided among the ranks. Some ranks repeat a row, so that all ranks process the same
    number; repeated rows do not count. Training is not affected: random states are restored. With
    completions_steps, a table of the first rows shows what the model makes of them at this step.

    Returns:
        Means over all ranks, as "eval/...": reward, each reward function, completion length, and
        what functions gave to `log_metric`, the numbers of repeated rows included. A mean is NaN if
        no completion has a score.
    """
    config, accelerator, ranks = trainer.config, trainer.accelerator, trainer.ranks
    num_rows = len(trainer.eval_data)
    padded = -(-num_rows // ranks.size) * ranks.size
    mine = range(ranks.index, padded, ranks.size)
    device = accelerator.device
    sums, counts, table = 0.0, 0.0, []
    logged: dict[str, list[float]] = {}
    table_rows = config.completions_rows if config.completions_steps and trainer.run_log else 0
    states = random_states(device)
    try:
        for start in range(0, len(mine), config.eval_batch_size):
            part = mine[start : start + config.eval_batch_size]
            prompts, columns = split_columns([trainer.eval_data[i % num_rows] for i in part])
            share_random_states(ranks, device)

            def sample(prompts=prompts, columns=columns):
                with accelerator.autocast():
                    return trainer.sampler.rollout(
                        trainer.unwrapped, prompts, columns, temperature=config.eval_temperature
                    )

            rollout = ranks.broadcast(together(accelerator, sample))
            scores = ranks.share(lambda found=rollout: score(trainer, found))
            if accelerator.is_main_process and (missing := table_rows - len(table)) > 0:
                texts = trainer.sampler.decode(rollout.completion_ids[:missing])
                table += completions_table(rollout, texts, scores)
            lengths = torch.tensor([float(len(ids)) for ids in rollout.completion_ids])
            values = {"reward": scores.total, "completions/mean_length": lengths}
            values |= {f"rewards/{name}": each for name, each in scores.each.items()}
            matrix = torch.stack([v.detach().float().cpu() for v in values.values()])
            counted = torch.tensor([i < num_rows for i in part]) & ~matrix.isnan()
            sums = sums + matrix.where(counted, 0.0).sum(1)
            counts = counts + counted.sum(1)
            for name, numbers in scores.metrics.items():
                logged.setdefault(name, []).extend(numbers)
    finally:
        set_random_states(states, device)
    if table:
        trainer.run_log.completions(f"eval-{trainer.step}", table)
    sums, counts = ranks.sum(torch.stack([sums, counts]).to(device)).cpu()
    means = mean_metrics(ranks.gather_objects([logged]))
    means |= zip(values, (sums / counts).tolist(), strict=True)
    return {f"eval/{name}": mean for name, mean in means.items()}
