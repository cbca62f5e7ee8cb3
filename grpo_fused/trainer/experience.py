"""Experience: a rollout with its rewards as tensors, ready to be cut into minibatches."""

from dataclasses import dataclass, fields

import torch

from grpo_fused import mask_truncated, outcome_advantages, process_advantages, rollout_weights
from grpo_fused.trainer.rollout import pad


@dataclass
class Batch:
    """B sequences: P prompt tokens, T completion tokens. Optional ones are None.

    Attributes:
        prompt_ids: (B, P) int64, padded at the left.
        prompt_mask: (B, P) bool.
        completion_ids: (B, T) int64, padded at the right.
        attended: (B, T) bool: the completion's tokens.
        completion_mask: (B, T) bool: those that the loss is on.
        advantages: (B,) or (B, T) float32.
        sampling_logps, old_logps, ref_logps: (B, T) float32.
        importance_sampling_ratio: (B, T) or (B, 1) float32.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    attended: torch.Tensor
    completion_mask: torch.Tensor
    advantages: torch.Tensor | None = None
    sampling_logps: torch.Tensor | None = None
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    importance_sampling_ratio: torch.Tensor | None = None

    @property
    def input_ids(self):
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self):
        return torch.cat([self.prompt_mask, self.attended], dim=1).long()

    def rows(self, rows, prompt_length, completion_length):
        """Some rows, without the columns that none of them fills."""
        start = self.prompt_ids.shape[1] - prompt_length

        def cut(this):
            tensor = getattr(self, this.name)
            if tensor is None or tensor.dim() == 1:
                return tensor if tensor is None else tensor[rows]
            if this.name.startswith("prompt"):
                return tensor[rows, start:]
            return tensor[rows, :completion_length]

        return Batch(*map(cut, fields(self)))

    def to(self, device):
        values = (getattr(self, this.name) for this in fields(self))
        return Batch(*(None if value is None else value.to(device) for value in values))


@dataclass
class Experience:
    """The rollout that is being trained on, on this rank, and how far it has been used.

    Attributes:
        batch: Batch of all of this rank's sequences.
        lengths: (prompt, completion) tokens of each, on the host.
        num_items: active tokens of each minibatch over all ranks.
        metrics: of the rollout, over all ranks.
        position: optimizer steps already taken on it.
    """

    batch: Batch
    lengths: list[tuple[int, int]]
    num_items: list[float]
    metrics: dict[str, float]
    position: int = 0

    def micro_batches(self, minibatch, num_minibatches, size):
        """Batches of at most `size` sequences that one minibatch is cut into."""
        per_minibatch = len(self.lengths) // num_minibatches
        first, end = minibatch * per_minibatch, (minibatch + 1) * per_minibatch
        for start in range(first, end, size):
            yield self.cut(slice(start, min(start + size, end)))

    def cut(self, rows):
        prompts, completions = zip(*self.lengths[rows], strict=True)
        return self.batch.rows(rows, max(prompts), max(*completions, 1))

    def state_dict(self):
        batch = {this.name: getattr(self.batch, this.name) for this in fields(Batch)}
        mine = {this.name: getattr(self, this.name) for this in fields(self)}
        return mine | {"batch": batch}

    @classmethod
    def from_state_dict(cls, state, device):
        return cls(**state | {"batch": Batch(**state["batch"]).to(device)})


def collate(rollout, pad_id, mask_truncated_completions):
    """Batch of a rollout, on the CPU and without advantages."""
    prompt_ids, prompt_mask = pad(rollout.prompt_ids, pad_id, "left")
    completion_ids, attended = pad(rollout.completion_ids, pad_id)
    mask = attended
    if rollout.completion_mask is not None:
        mask = attended & (pad(rollout.completion_mask, 0)[0] != 0)
    if mask_truncated_completions:
        mask = mask_truncated(mask, torch.tensor(rollout.truncated))
    batch = Batch(prompt_ids, prompt_mask, completion_ids, attended, mask)
    if rollout.logprobs is not None:
        batch.sampling_logps = pad(rollout.logprobs, 0.0, dtype=torch.float32)[0]
    return batch


def advantages_of(rewards, group_size, scale):
    """(B,) float32: `outcome_advantages`, and 0 for a completion that nobody judged (NaN)."""
    judged = ~rewards.isnan()
    advantages = torch.zeros_like(rewards)
    groups = torch.arange(len(rewards), device=rewards.device) // group_size
    if judged.any():
        advantages[judged] = outcome_advantages(
            rewards[judged], group_ids=groups[judged], scale=scale
        )
    return advantages


def step_advantages(steps, completion_length, group_size, scale):
    """(B, T) float32: `process_advantages` of [(end_token, score), ...] per completion."""
    if scale == "batch":
        raise ValueError('scale_rewards must be group or none for rewards of steps, got "batch"')
    ends, _ = pad([[end for end, _ in row] for row in steps], -1)
    scores, _ = pad([[score for _, score in row] for row in steps], 0.0, dtype=torch.float32)
    return process_advantages(scores, ends, completion_length, group_size, scale=scale)


def correction_of(batch, config):
    """Weights that correct for a sampler that is not the policy, or None."""
    if batch.sampling_logps is None or config.rollout_correction is None:
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
