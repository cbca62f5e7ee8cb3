"""Collecting experience: samples, rewards, advantages, old and reference log-probabilities."""

import functools
import random
import time

import torch
import torch.nn.functional as F

from grpo_fused.trainer.checkpoint import any_rank
from grpo_fused.trainer.experience import (
    Experience,
    advantages_of,
    collate,
    correction_of,
    step_advantages,
)
from grpo_fused.trainer.figures import rollout_figures, table
from grpo_fused.trainer.rollout_fn import checked
from grpo_fused.trainer.setup import split_columns


def collect(trainer) -> Experience:
    """One rollout: samples, judges and compares them; old and reference log-probabilities."""
    config, accelerator, started = trainer.config, trainer.accelerator, time.perf_counter()
    rows = [trainer.data[i] for i in next_rows(trainer) for _ in range(config.num_generations)]
    prompts, columns = split_columns(rows)
    if trainer.rollout_fn is not None:
        output = trainer.rollout_fn(list(prompts), trainer)
        rollout = checked(output, prompts, columns, trainer.sampler)
    else:
        with accelerator.autocast():
            rollout = trainer.sampler.roll_out(
                trainer.unwrapped, prompts, columns, temperature=config.temperature
            )
    scores = judge(trainer, rollout)
    batch = collate(rollout, trainer.sampler.pad_id, config.mask_truncated_completions)

    figures, rewards = rollout_figures(accelerator, rollout, scores, config.num_generations)
    if not any_rank(accelerator, scores.steps is not None):
        advantages = advantages_of(rewards, config.num_generations, config.scale_rewards)
        mine = accelerator.process_index * trainer.rows_per_rank
        batch.advantages = advantages[mine : mine + trainer.rows_per_rank]
    else:
        batch.advantages = step_advantages(
            scores.as_steps(rollout.completion_ids),
            batch.completion_ids.shape[1],
            config.num_generations,
            config.scale_rewards,
        )
    counts = batch.completion_mask.sum(1).view(config.minibatches, -1).sum(1).float()
    lengths = zip(map(len, rollout.prompt_ids), map(len, rollout.completion_ids), strict=True)
    experience = Experience(
        batch.to(accelerator.device),
        list(lengths),
        accelerator.reduce(counts.to(accelerator.device)).tolist(),
        figures,
    )
    if config.is_off_policy or batch.sampling_logps is not None:
        experience.batch.old_logps = logps(trainer, trainer.model, experience)
        experience.batch.importance_sampling_ratio = correction_of(experience.batch, config)
    if trainer.reference is not None:
        with trainer.reference.instead_of(trainer.model, trainer.unwrapped) as reference:
            experience.batch.ref_logps = logps(trainer, reference, experience)
    trainer.rollouts += 1
    every = config.completions_steps
    if every and trainer.rollouts % every == 0 and accelerator.is_main_process:
        shown = table(rollout, scores, trainer.sampler, config.completions_rows)
        trainer.run_log.completions(trainer.step, shown)
    figures["seconds/rollout"] = time.perf_counter() - started
    return experience


def next_rows(trainer) -> list[int]:
    """Indices of this rank's prompts: every epoch has an order that its number decides."""
    config, accelerator, size = trainer.config, trainer.accelerator, len(trainer.data)
    share = config.prompts_per_rollout // accelerator.num_processes
    first = trainer.rollouts * config.prompts_per_rollout + accelerator.process_index * share
    places = range(first, first + share)
    return [epoch_order(config.seed, place // size, size)[place % size] for place in places]


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, size) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(size), size)


def judge(trainer, rollout):
    """Scores of a rollout; a completion of a chat is a message."""
    texts = trainer.sampler.texts(rollout.completion_ids)
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(rollout.prompts, texts, strict=True)
    ]
    ids = rollout.completion_ids
    scores = trainer.rewards(rollout.prompts, completions, ids, rollout.columns)
    if scores.total.shape != (len(ids),):
        raise ValueError(
            f"rewards: total must have shape ({len(ids)},), got {tuple(scores.total.shape)}"
        )
    if scores.total.isinf().any():
        raise ValueError(f"rewards: total must be finite or NaN, got {scores.total.tolist()}")
    return scores


def logps(trainer, model, experience):
    """(B, T) float32 of all completions, in the micro-batches of the updates.

    Of the same policy they are then the same bits as in its first update: a ratio of 1.
    """
    size, minibatches = trainer.config.micro_batch_size, trainer.config.minibatches
    parts = []
    width = experience.batch.completion_ids.shape[1]
    for minibatch in range(minibatches):
        for batch in experience.micro_batches(minibatch, minibatches, size):
            with trainer.accelerator.autocast():  # which the reference is not prepared for
                logps = trainer.policy.logps(model, batch)
            parts.append(F.pad(logps, (0, width - logps.shape[1])))
    return torch.cat(parts)
