"""Experience: a rollout with its advantages as tensors, split into micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from grpo_fused import (
    mask_truncated,
    multi_reward_advantages,
    outcome_advantages,
    pass_at_k_advantages,
    process_advantages,
    rollout_weights,
)
from grpo_fused.trainer.rollouts.rollout import Rollout, expand_support, pad
from grpo_fused.trainer.run.config import GRPOTrainerConfig


@dataclass
class Batch:
    """B sequences of P prompt tokens and T completion tokens. Optional tensors are None.

    Attributes:
        prompt_ids: (B, P) int64, padded on the left.
        prompt_mask: (B, P) bool.
        completion_ids: (B, T) int64, padded on the right.
        attended: (B, T) bool, tokens of the completion, which the model attends to.
        completion_mask: (B, T) bool, tokens that enter the loss.
        versions: (B, T) int32, optimizer steps of the policy that sampled the token.
        advantages: (B,) or (B, T) float32.
        support_counts: (B, T) int64, how many tokens the sampler kept; -1 - n: all but n.
        support_ids: (B, S) int32, those of all positions one after the other, padded on the right.
        sampling_logps, old_logps, ref_logps: (B, T) float32; the first two over what was kept.
        values, returns: (B, T) float32, PPO's: predictions of the critic, and what they should be.
        importance_sampling_ratio: (B, T) or (B, 1) float32.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    attended: torch.Tensor
    completion_mask: torch.Tensor
    support_counts: torch.Tensor | None = None
    support_ids: torch.Tensor | None = None
    versions: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    sampling_logps: torch.Tensor | None = None
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    importance_sampling_ratio: torch.Tensor | None = None

    @property
    def input_ids(self) -> torch.Tensor:
        """(B, P + T) int64."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> torch.Tensor:
        """(B, P + T) int64."""
        return torch.cat([self.prompt_mask, self.attended], dim=1).long()

    def support(self, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(offsets, ids), the keyword of the losses, or None: nothing was left out."""
        if self.support_counts is None or self.support_ids is None:
            return None
        counts, ids = self.support_counts, self.support_ids
        if bool((counts[self.completion_mask] == -1).all()):
            return None
        columns = torch.arange(ids.shape[1], device=ids.device)
        lengths = torch.where(counts < 0, -1 - counts, counts).sum(1)
        return expand_support(counts.flatten(), ids[columns < lengths[:, None]], vocabulary)

    def select(self, rows: slice, prompt_length: int, completion_length: int) -> "Batch":
        """Returns some rows, trimmed to the given lengths."""
        start = self.prompt_ids.shape[1] - prompt_length

        def trim(field):
            tensor = getattr(self, field.name)
            if tensor is None or tensor.dim() == 1 or field.name == "support_ids":
                return tensor if tensor is None else tensor[rows]
            if field.name.startswith("prompt"):
                return tensor[rows, start:]
            return tensor[rows, :completion_length]

        return Batch(*map(trim, fields(self)))

    @classmethod
    def concatenate(cls, batches: "list[Batch]", pad_id: int) -> "Batch":
        """Joins batches whose prompts and completions are padded to different lengths."""
        P = max(batch.prompt_ids.shape[1] for batch in batches)
        T = max(batch.completion_ids.shape[1] for batch in batches)
        kept = [batch.support_ids for batch in batches]
        S = max(0 if ids is None else ids.shape[1] for ids in kept)

        weights = [batch.importance_sampling_ratio for batch in batches]
        whole = all(weight is None or weight.shape[1] == 1 for weight in weights)  # (B, 1)

        def widen(name, batch):
            tensor = getattr(batch, name)
            if tensor is None or tensor.dim() == 1 or name == "importance_sampling_ratio" and whole:
                return tensor
            value = pad_id if name.endswith("_ids") else 0
            width = S if name == "support_ids" else T
            left, right = P - tensor.shape[1], width - tensor.shape[1]
            widths = (left, 0) if name.startswith("prompt") else (0, right)
            return F.pad(tensor, widths, value=value)

        found = []
        for field in fields(cls):
            parts = [widen(field.name, batch) for batch in batches]
            found.append(None if parts[0] is None else torch.cat(parts))
        return cls(*found)

    def to(self, device: torch.device) -> "Batch":
        values = (getattr(self, field.name) for field in fields(self))
        return Batch(*(None if value is None else value.to(device) for value in values))


@dataclass
class Experience:
    """This rank's part of a rollout, and how many optimizer steps have used it.

    Attributes:
        batch: all sequences of this rank.
        lengths: (prompt, completion) tokens of each sequence, as Python numbers.
        num_items: active tokens of each minibatch over all ranks.
        metrics: metrics of the rollout over all ranks.
        position: optimizer steps taken on it.
    """

    batch: Batch
    lengths: list[tuple[int, int]]
    num_items: list[float]
    metrics: dict[str, float]
    position: int = 0

    def micro_batches(self, minibatch: int, num_minibatches: int, size: int) -> Iterator[Batch]:
        """Splits one minibatch into batches of at most `size` sequences, trimmed to the longest."""
        per_minibatch = len(self.lengths) // num_minibatches
        first, end = minibatch * per_minibatch, (minibatch + 1) * per_minibatch
        for start in range(first, end, size):
            rows = slice(start, min(start + size, end))
            prompts, completions = zip(*self.lengths[rows], strict=True)
            yield self.batch.select(rows, max(prompts), max(*completions, 1))

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors and numbers for a checkpoint, by attribute name."""
        batch = {field.name: getattr(self.batch, field.name) for field in fields(Batch)}
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        return state | {"batch": batch}

    @classmethod
    def deal(
        cls, parts: "list[Experience]", minibatches: int, index: int, size: int, pad_id: int
    ) -> "Experience":
        """Deals the experience of all ranks out to another number of ranks.

        Every minibatch keeps its sequences, so that the steps on it have the same gradients.

        Args:
            parts: of all ranks that collected it.
            minibatches: of the run.
            index, size: which of how many ranks the result is for.
            pad_id: of prompts and completions.

        Raises:
            ValueError: the sequences of a minibatch cannot be divided among the ranks.
        """
        batches = Batch.concatenate([part.batch for part in parts], pad_id)
        lengths = [pair for part in parts for pair in part.lengths]
        own, first = [], 0
        rows: list[list[int]] = [[] for _ in range(minibatches)]
        for part in parts:
            share = len(part.lengths) // minibatches
            for minibatch in rows:
                minibatch += range(first, first + share)
                first += share
        for minibatch in rows:
            share, rest = divmod(len(minibatch), size)
            if rest:
                raise ValueError(
                    f"resume: a minibatch of {len(minibatch)} sequences cannot be divided among "
                    f"{size} ranks"
                )
            own += minibatch[index * share : (index + 1) * share]
        values = (getattr(batches, field.name) for field in fields(Batch))
        batch = Batch(*(None if value is None else value[own] for value in values))
        lengths = [lengths[row] for row in own]
        return replace(parts[0], batch=batch, lengths=lengths)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> "Experience":
        """Restores what `state_dict` returned."""
        return cls(**state | {"batch": Batch(**state["batch"]).to(device)})


def collate(rollout: Rollout, pad_id: int, mask_truncated_completions: bool) -> Batch:
    """Pads a rollout to a Batch on the CPU, without advantages and log-probabilities."""
    prompt_ids, prompt_mask = pad(rollout.prompt_ids, pad_id, "left")
    completion_ids, attended = pad(rollout.completion_ids, pad_id)
    mask = attended
    if rollout.completion_mask is not None:
        mask = attended & (pad(rollout.completion_mask, 0)[0] != 0)
    if mask_truncated_completions:
        mask = mask_truncated(mask, torch.tensor(rollout.truncated))
    batch = Batch(prompt_ids, prompt_mask, completion_ids, attended, mask)
    if rollout.support is not None:
        counts, ids = zip(*rollout.support, strict=True)
        batch.support_counts, _ = pad(counts, 0)
        batch.support_ids, _ = pad(ids, 0, dtype=torch.int32)
    if rollout.versions is not None:
        batch.versions = pad(rollout.versions, 0, dtype=torch.int32)[0]
    if rollout.logprobs is not None:
        batch.sampling_logps = pad(rollout.logprobs, 0.0, dtype=torch.float32)[0]
    return batch


def group_advantages(
    rewards: torch.Tensor,
    config: GRPOTrainerConfig,
    *,
    lengths: torch.Tensor | None = None,
    each: torch.Tensor | None = None,
    weights: Sequence[float] = (),
) -> torch.Tensor:
    """Returns the advantages that a config asks for, (B,) float32; 0 where the reward is NaN.

    Args:
        rewards: (B,) float32 of all ranks, NaN = none.
        config: of the run.
        lengths: (B,) numbers of active tokens, for baseline "length".
        each: (B, K) float32, the rewards by function, for "normalize_then_sum"; NaN = none.
        weights: K numbers, weights of `each`.

    Raises:
        ValueError: the functions have no weights, for "normalize_then_sum".
    """
    if config.multi_objective_aggregation == "normalize_then_sum":
        if not weights:
            raise ValueError(
                "multi_objective_aggregation must be sum_then_normalize for rewards without "
                f"weights, got {config.multi_objective_aggregation!r}"
            )
        return multi_reward_advantages(each, config.num_generations, weights=torch.tensor(weights))
    kept = ~rewards.isnan()
    advantages = torch.zeros_like(rewards)
    if not kept.any():
        return advantages
    groups = torch.arange(len(rewards), device=rewards.device) // config.num_generations
    if config.baseline == "batch":
        groups = torch.zeros_like(groups)
    if config.pass_at_k is not None:
        found = pass_at_k_advantages(rewards[kept], config.pass_at_k, group_ids=groups[kept])
    else:
        found = outcome_advantages(
            rewards[kept],
            group_ids=groups[kept],
            scale=config.scale_rewards,
            leave_one_out=config.baseline == "leave_one_out",
            lengths=lengths[kept] if config.baseline == "length" else None,
        )
    advantages[kept] = found
    return advantages


def step_advantages(
    steps: list[list[tuple[int, float]]], completion_length: int, config: GRPOTrainerConfig
) -> torch.Tensor:
    """Returns `process_advantages`, (B, T) float32, of [(end_token, score), ...] per completion.

    Raises:
        ValueError: the config asks for advantages that process rewards do not have.
    """
    only = {
        "scale_rewards": ("group", "none"),
        "baseline": ("group",),
        "multi_objective_aggregation": ("sum_then_normalize",),
        "pass_at_k": (None,),
    }
    for name, values in only.items():
        if getattr(config, name) not in values:
            wanted = " or ".join(map(str, values)).lower()
            raise ValueError(
                f"{name} must be {wanted} for process rewards, got {getattr(config, name)!r}"
            )
    ends, _ = pad([[end for end, _ in row] for row in steps], -1)
    scores, _ = pad([[score for _, score in row] for row in steps], 0.0, dtype=torch.float32)
    size, scale = config.num_generations, config.scale_rewards
    return process_advantages(scores, ends, completion_length, size, scale=scale)


def rollout_sums(batch: Batch, config: GRPOTrainerConfig) -> torch.Tensor:
    """Returns (7,) float64 for `rollout_ratios`, of the tokens of this rank.

    Weights are those of `rollout_weights` without bounds; of an exact sampler they are 1.
    """
    assert batch.old_logps is not None and batch.sampling_logps is not None
    mask, inputs = batch.completion_mask, (batch.old_logps, batch.sampling_logps)
    weights = rollout_weights(*inputs, mask, cap=None)[mask].double()
    level = config.rollout_correction_level
    of_level = weights
    if level != "token":
        of_level = rollout_weights(*inputs, mask, level=level, cap=None)[mask.any(1)].double()
    low, high = config.rollout_correction_floor or 0.0, config.rollout_correction_cap
    cut = (of_level < low) | (of_level > high)
    if config.rollout_correction is None:
        cut = torch.zeros_like(cut)
    lowest = weights.min() if weights.numel() else weights.new_tensor(float("inf"))
    tokens, number = (weights.new_tensor(t.numel()) for t in (weights, cut))
    difference = weights.log()
    parts = (tokens, weights.sum(), lowest, -difference.sum(), cut.sum().double(), number)
    parts += (difference.abs().sum(),)
    return torch.stack(parts)


def rollout_ratios(sums: torch.Tensor) -> dict[str, float]:
    """Returns metrics of a sampler against the policy from `rollout_sums` of all ranks, (R, 7)."""
    tokens, total, _, difference, cut, number, distance = sums.sum(0).tolist()
    return {
        "rollout/weight_mean": total / max(tokens, 1),
        "rollout/weight_min": float(sums[:, 2].min()) if tokens else 0.0,
        "rollout/kl": difference / max(tokens, 1),
        "rollout/logp_difference": distance / max(tokens, 1),
        "rollout/cut_ratio": cut / max(number, 1),
    }


def correction_weights(batch: Batch, config: GRPOTrainerConfig) -> torch.Tensor | None:
    """Returns the weights that correct for a sampler other than the policy.

    None without one, or if the loss contains such a weight.
    """
    if batch.sampling_logps is None or config.rollout_correction is None:
        return None
    if config.objective_or_default.weighs_sampling:
        return None
    return rollout_weights(
        batch.old_logps,
        batch.sampling_logps,
        batch.completion_mask,
        level=config.rollout_correction_level,
        mode=config.rollout_correction,
        cap=config.rollout_correction_cap,
        floor=config.rollout_correction_floor,
    )
