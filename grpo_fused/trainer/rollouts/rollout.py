"""The data of a rollout: sampled completions as lists, and their padding to tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

Prompt = str | list[dict[str, str]]  # text, or a chat: messages with "role" and "content"


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
            kept at each position, and which, one position after the other; None: all.
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
