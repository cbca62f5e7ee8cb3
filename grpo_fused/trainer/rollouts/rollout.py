"""The data of a rollout: sampled completions as lists, and their padding to tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

EXPANDED = 2**26  # entries of the largest mask that `expand_support` makes
Prompt = str | list[dict[str, str]]  # text, or a chat: messages with "role" and "content"


@dataclass
class Samples:
    """Completions of B prompts as lists of length B.

    Attributes:
        completion_ids: tokens, including the end token, if there is one.
        truncated: whether a completion was cut off at the length limit.
        logprobs: log-probability of each token under the source, over what it kept; None: not
            known, the source is the policy itself.
        support: as in `Rollout`, or None: nothing was left out.
        versions: for each token the version of the policy that sampled it: the number of
            optimizer steps that it had taken; None: that of the trainer.
    """

    completion_ids: list[list[int]]
    truncated: list[bool]
    logprobs: list[list[float]] | None = None
    support: list[tuple[np.ndarray, np.ndarray]] | None = None
    versions: list[list[int]] | None = None


@dataclass
class Rollout:
    """B completions as lists of length B; the completions of one prompt are adjacent.

    Attributes:
        prompts: as in the data.
        prompt_ids, completion_ids: tokens; a completion includes its end token, if it has one.
        truncated: whether a completion was cut off at the length limit.
        logprobs: log-probability of each completion token under the sampler, or None.
        completion_mask: for each completion token, 1 if the policy sampled it, else 0; None if
            the policy sampled all of them.
        support: for each completion (counts, ids), int64 and int32: how many tokens the sampler
            kept at each position, and which, one position after the other; None: all. A count of
            -1 - n says that it kept all but n, which are listed in their place.
        versions: for each completion token, the optimizer steps that the policy had taken when it
            sampled it; None: as many as at the time of the rollout.
        columns: other columns of the data, and values returned by a rollout_fn, for rewards.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    truncated: list[bool]
    logprobs: list[list[float]] | None
    completion_mask: list[list[int]] | None
    columns: dict[str, list[Any]]
    support: list[tuple[np.ndarray, np.ndarray]] | None = None
    versions: list[list[int]] | None = None

    @classmethod
    def of(
        cls,
        samples: Samples,
        prompts: Sequence[Prompt],
        prompt_ids: list[list[int]],
        columns: dict[str, list[Any]],
    ) -> "Rollout":
        """Returns samples with their prompts and the other columns of the data."""
        return cls(
            list(prompts),
            prompt_ids,
            samples.completion_ids,
            samples.truncated,
            samples.logprobs,
            None,
            columns,
            samples.support,
            samples.versions,
        )


def expand_support(
    counts: torch.Tensor, ids: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists what was kept where `Rollout.support` lists what was left out.

    Args:
        counts: (N,) int64 of N positions.
        ids: (K,) int32.
        vocabulary: number of all ids.

    Returns:
        (offsets, ids): (N + 1,) int64 and int32, the keyword `support` of the losses.
    """
    is_rest = counts < 0
    listed = torch.where(is_rest, -1 - counts, counts)
    offsets = F.pad(listed.cumsum(0), (1, 0))
    if not bool(is_rest.any()):
        return offsets, ids
    rows = torch.repeat_interleave(listed)
    every = torch.arange(vocabulary, dtype=torch.int32, device=ids.device)
    size = max(1, EXPANDED // vocabulary)
    parts = []
    for first in range(0, len(counts), size):
        kept = is_rest[first : first + size, None].repeat(1, vocabulary)
        end = offsets[min(first + size, len(counts))]
        row, token = rows[offsets[first] : end] - first, ids[offsets[first] : end].long()
        kept[row, token] = ~is_rest[first + row]
        parts.append(every.expand(len(kept), -1)[kept])
    sizes = torch.where(is_rest, vocabulary - listed, listed)
    return F.pad(sizes.cumsum(0), (1, 0)), torch.cat(parts)


def pad(
    rows: Sequence[Sequence], value: float, side: str = "right", dtype: torch.dtype = torch.int64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads B lists to the longest of them.

    Args:
        rows: B lists of numbers.
        value: padding value.
        side: "left" or "right".
        dtype: of the result.

    Returns:
        (values, mask): (B, T), T at least 1; mask is a bool tensor, False where padded.
    """
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    filler = torch.zeros(1, dtype=dtype)  # keeps T >= 1 for a batch of empty lists
    values = pad_sequence([*tensors, filler], True, value, side)[:-1]
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    columns = torch.arange(values.shape[1])
    if side == "left":
        columns = columns.flip(0)
    return values, columns < lengths
