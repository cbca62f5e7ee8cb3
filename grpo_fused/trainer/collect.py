"""Collecting experience: rollout, rewards, advantages, old and reference log-probabilities."""

import functools
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from grpo_fused.trainer.critic import judge, token_rewards
from grpo_fused.trainer.dynamic_sampling import Round, draw_rounds, take_rows
from grpo_fused.trainer.experience import (
    Batch,
    Experience,
    collate,
    correction_weights,
    group_advantages,
    rollout_ratios,
    rollout_sums,
    step_advantages,
)
from grpo_fused.trainer.order import next_rows
from grpo_fused.trainer.rewards import RewardScores
from grpo_fused.trainer.rewards.overlong import punish_overlong
from grpo_fused.trainer.rollouts.rollout import Prompt, Rollout
from grpo_fused.trainer.rollouts.rollout_fn import convert_output
from grpo_fused.trainer.run.data import split_columns
from grpo_fused.trainer.run.errors import any_rank, together
from grpo_fused.trainer.run.metrics import completions_table, rollout_metrics
from grpo_fused.trainer.run.state import share_random_states

MISMATCH = 0.1  # mean difference of log-probabilities; bfloat16 servers are below 0.03


def collect(trainer) -> Experience:
    """Samples a rollout, scores it, and computes everything that the loss needs besides logits."""
    config, ranks, started = trainer.config, trainer.ranks, time.perf_counter()
    device = trainer.accelerator.device
    trainer.source.sync(trainer.step)
    synced = time.perf_counter() - started
    rounds, groups, drawing = draw_rounds(trainer, draw)
    punishment = config.max_completion_length, config.soft_punish_cache
    rounds = [Round(r, punish_overlong(s, r.completion_ids, *punishment)) for r, s in rounds]
    metrics, rewards, each = rollout_metrics(ranks, rounds, config.num_generations)
    batch_round = rounds[0]
    if drawing:
        size = config.num_generations
        rows = [row for group in groups for row in range(group * size, (group + 1) * size)]
        batch_round = take_rows(ranks, rounds, rows)
        rewards, each = rewards[rows], each[rows]
        metrics |= drawing | {"dynamic_sampling/reward": float(rewards.nanmean())}
    rollout, scores = batch_round
    if trainer.reward_training is not None:
        completions = completions_of(trainer, rollout)
        metrics |= trainer.reward_training.add_rollout(rollout, completions, scores)

    batch = collate(rollout, trainer.sampler.pad_id, config.mask_truncated_completions)
    if config.algorithm == "ppo":  # advantages need values, below
        batch.completion_mask = batch.completion_mask & ~scores.total.cpu().isnan()[:, None]
    else:
        batch.advantages = advantages_of(trainer, batch, batch_round, rewards, each)
    counts = batch.completion_mask.sum(1).view(config.minibatches, -1).sum(1).float()
    lengths = zip(map(len, rollout.prompt_ids), map(len, rollout.completion_ids), strict=True)
    num_items = ranks.sum(counts.to(device)).tolist()
    experience = Experience(batch.to(device), list(lengths), num_items, metrics)
    metrics |= add_logps(trainer, experience, synced)
    if config.algorithm == "ppo":
        metrics |= add_values(trainer, experience, batch_round)
    trainer.rollouts += 1
    every = config.completions_steps
    due = every and (trainer.rollouts % every == 0 or trainer.rollouts == 1)  # 1: the baseline
    if due and trainer.accelerator.is_main_process:
        texts = trainer.sampler.decode(rollout.completion_ids[: config.completions_rows])
        trainer.run_log.completions(trainer.step + 1, completions_table(rollout, texts, scores))
    metrics["seconds/rollout"] = time.perf_counter() - started
    return experience


def advantages_of(
    trainer, batch: Batch, own: Round, rewards: torch.Tensor, each: torch.Tensor
) -> torch.Tensor:
    """Returns advantages from groups, of outcomes (B,) or, if steps have scores, of tokens (B, T).

    Args:
        trainer: of the run.
        batch: of this rank.
        own: the same as lists, with its scores.
        rewards: total rewards of the batch over all ranks.
        each: those of the K functions, (..., K).

    Raises:
        ValueError: outcomes of groups of one, whose advantages are 0.
    """
    config, ranks, (rollout, scores) = trainer.config, trainer.ranks, own
    device, first = trainer.accelerator.device, ranks.index * trainer.rows_per_rank
    mine = slice(first, first + trainer.rows_per_rank)
    if any_rank(trainer.accelerator, scores.steps is not None):
        steps_and_width = scores.as_steps(rollout.completion_ids), batch.completion_ids.shape[1]
        steps, widths = zip(*ranks.gather_objects(steps_and_width), strict=True)
        advantages = step_advantages(sum(steps, []), max(widths), config)
        return advantages[mine, : steps_and_width[1]]
    if config.num_generations == 1:
        raise ValueError(
            "num_generations must be at least 2 for rewards of whole completions, whose advantage "
            "in a group of one is 0, got 1; rewards of steps train with 1"
        )
    lengths = None
    if config.baseline == "length":
        counts = batch.completion_mask.sum(1).float()
        lengths = ranks.gather(counts.to(device)).cpu()
    weights = scores.weights
    return group_advantages(rewards, config, lengths=lengths, each=each, weights=weights)[mine]


def add_logps(trainer, experience: Experience, synced: float) -> dict[str, float]:
    """Adds old and reference log-probabilities and the weights that correct for the sampler.

    Args:
        trainer: of the run.
        experience: of this rank, changed in place.
        synced: seconds of the weight sync.

    Returns:
        metrics of the sampler against the policy.
    """
    config, ranks, batch = trainer.config, trainer.ranks, experience.batch
    metrics: dict[str, float] = {}
    if config.is_off_policy or batch.sampling_logps is not None:
        batch.old_logps = logps(trainer, trainer.model, experience, over_support=True)
        batch.importance_sampling_ratio = correction_weights(batch, config)
        if batch.sampling_logps is not None:
            metrics |= rollout_ratios(ranks.gather(rollout_sums(batch, config)[None]))
    if batch.versions is not None:
        metrics["seconds/sync"] = synced
        metrics["rollout/policy_version"] = mean_version(ranks, batch)
        if metrics["rollout/logp_difference"] > MISMATCH:
            warnings.warn(
                "log-probabilities of the servers are far from those of the policy (see the "
                "metric rollout/logp_difference): they do not have its weights, or other numerics",
                stacklevel=2,
            )
    if trainer.reference is not None:
        with trainer.reference.activate(trainer.model, trainer.unwrapped) as reference:
            batch.ref_logps = logps(trainer, reference, experience, over_support=False)
    return metrics


def add_values(trainer, experience: Experience, own: Round) -> dict[str, float]:
    """Adds the critic's values, and the returns and advantages that follow from them."""
    config, batch, (rollout, scores) = trainer.config, experience.batch, own
    of_policy = batch.old_logps if batch.support_ids is None else None
    if trainer.reference is not None and of_policy is None:
        of_policy = logps(trainer, trainer.model, experience, over_support=False)
    batch.values = values(trainer, experience)
    has_steps = any_rank(trainer.accelerator, scores.steps is not None)
    rewards = token_rewards(scores, rollout.completion_ids, batch.values.shape[1], has_steps)
    rewards = rewards.to(trainer.accelerator.device)
    return judge(experience, rewards, of_policy, config, trainer.ranks)


def mean_version(ranks, batch: Batch) -> float:
    """Returns the mean of `Batch.versions` over the tokens of all ranks."""
    assert batch.versions is not None
    versions = batch.versions[batch.attended].double()
    parts = torch.stack([versions.sum(), versions.new_tensor(versions.numel())])
    total, number = ranks.sum(parts).tolist()
    return total / max(number, 1)


def draw(trainer) -> Round:
    """Samples and scores the next prompts_per_rollout prompts, this rank's share of them."""
    accelerator, ranks = trainer.accelerator, trainer.ranks
    share_random_states(ranks, accelerator.device)
    rollout = ranks.broadcast(sample(trainer))
    ranks.check_agreement(
        {
            f"whether a rollout has {name}": getattr(rollout, name) is not None
            for name in ("logprobs", "support")
        }
    )
    scores = ranks.share(lambda: score(trainer, rollout))
    trainer.data_position += trainer.config.prompts_per_rollout
    return Round(rollout, scores)


def sample(trainer) -> Rollout:
    """Samples the next rollout of this rank, with the rollout_fn or from the source."""
    if trainer.rollout_fn is not None:
        return together(trainer.accelerator, lambda: call_rollout_fn(trainer))

    def read():
        prompts, columns = next_prompts(trainer)
        return prompts, columns, trainer.sampler.encode(prompts, columns)

    prompts, columns, prompt_ids = together(trainer.accelerator, read)
    return Rollout.of(trainer.source.sample(prompt_ids), prompts, prompt_ids, columns)


def call_rollout_fn(trainer) -> Rollout:
    """Returns what the rollout_fn makes of this rank's prompts."""
    config = trainer.config
    prompts, columns = next_prompts(trainer)
    output = trainer.rollout_fn(list(prompts), trainer)
    rollout = convert_output(output, prompts, columns, trainer.sampler)
    if config.has_filters and rollout.support is None and trainer.rollouts == 0:
        warnings.warn(
            "top_k, top_p, min_p or generation_kwargs leave tokens out, but rollout_fn "
            "returned no support: the loss is over the whole vocabulary, another policy than "
            "the one that sampled, and ratios are biased (see the metric rollout/weight_mean)",
            stacklevel=2,
        )
    if config.has_penalties and rollout.logprobs is None and trainer.rollouts == 0:
        warnings.warn(
            "repetition_penalty or generation_kwargs change the probabilities of tokens, but "
            "rollout_fn returned no logprobs: nothing corrects for the sampler's distribution",
            stacklevel=2,
        )
    return rollout


def next_prompts(trainer) -> tuple[list, dict[str, list]]:
    """Returns the prompts and columns of this rank's next rows."""
    prompts, columns = split_columns(next_rows(trainer))
    return list(prompts), columns


def completions_of(trainer, rollout: Rollout) -> list[Prompt]:
    """Returns completions as text; the completion of a chat is a list of one message."""
    texts = trainer.sampler.decode(rollout.completion_ids)
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(rollout.prompts, texts, strict=True)
    ]


def score(trainer, rollout: Rollout) -> RewardScores:
    """Scores a rollout.

    Raises:
        ValueError: the total rewards have the wrong shape or are infinite.
    """
    completions, ids = completions_of(trainer, rollout), rollout.completion_ids
    scores = trainer.rewards(rollout.prompts, completions, ids, rollout.columns)
    if scores.total.shape != (len(ids),):
        raise ValueError(
            f"rewards: total must have shape ({len(ids)},), got {tuple(scores.total.shape)}"
        )
    if scores.total.isinf().any():
        raise ValueError(f"rewards: total must be finite or NaN, got {scores.total.tolist()}")
    return scores


def logps(trainer, model: nn.Module, experience: Experience, *, over_support: bool) -> torch.Tensor:
    """Returns the log-probabilities of all completions, (B, T) float32.

    Over what the sampler kept, if that is known and wanted; otherwise over the vocabulary.

    The micro-batches are those of the updates. An unchanged policy then gives bitwise the same
    values in its first update, and ratios of exactly 1.
    """
    return over_micro_batches(
        trainer,
        experience,
        lambda batch: trainer.policy.logps(model, batch, over_support=over_support),
    )


@torch.no_grad()
def values(trainer, experience: Experience) -> torch.Tensor:
    """Returns the critic's values before all completion tokens, (B, T) float32."""
    if trainer.critic is not None:
        return over_micro_batches(trainer, experience, trainer.critic.values)
    function = functools.partial(trainer.policy.values, trainer.model)
    return over_micro_batches(trainer, experience, function)


def over_micro_batches(
    trainer, experience: Experience, function: Callable[[Batch], torch.Tensor]
) -> torch.Tensor:
    """Joins what a function returns for each micro-batch of the updates, (B, T)."""
    size, minibatches = trainer.config.micro_batch_size, trainer.config.minibatches
    parts = []
    width = experience.batch.completion_ids.shape[1]
    for minibatch in range(minibatches):
        for batch in experience.micro_batches(minibatch, minibatches, size):
            with trainer.accelerator.autocast():  # Accelerate does not wrap the reference
                part = function(batch)
            parts.append(F.pad(part, (0, width - part.shape[1])))
    return torch.cat(parts)
