"""Sources of rollouts: who samples completions, and how it gets the weights of the policy."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from grpo_fused.trainer.run.errors import together


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


class RolloutSource(Protocol):
    """What the trainer asks of a source. Every rank calls each of its methods.

    An error of one rank is an error on all of them, so that none waits for another.
    """

    def start(self) -> None:
        """Checks, before a run begins, that the source can serve it.

        Raises:
            ValueError: it cannot, because of a setting of the run or of the source.
        """

    def sync(self, version: int) -> None:
        """Gives the source the weights of the policy, unless it has those of this version.

        Raises:
            RolloutError: the source did not take them.
        """

    def sample(self, prompt_ids: list[list[int]]) -> Samples:
        """Samples one completion for each of this rank's prompts; a group repeats its prompt.

        Raises:
            RolloutError: the source failed.
        """

    def close(self) -> None:
        """Releases what the source holds for the run."""


class GenerateSource:
    """`generate` of the policy itself, on every rank for its own prompts."""

    def __init__(self, trainer):
        self.trainer = trainer

    def start(self) -> None:
        """There is nothing to check."""

    def sync(self, version: int) -> None:
        """The policy has its weights."""

    def sample(self, prompt_ids: list[list[int]]) -> Samples:
        """Samples completions with the settings of the config, and notes what filters kept."""
        return together(self.trainer.accelerator, lambda: self._sample(prompt_ids))

    def _sample(self, prompt_ids):
        trainer, config = self.trainer, self.trainer.config
        supports: list | None = [] if config.has_filters else None
        with trainer.accelerator.autocast():
            completion_ids = trainer.sampler.generate(
                trainer.unwrapped,
                prompt_ids,
                temperature=config.temperature,
                batch_size=config.generation_batch_size,
                supports=supports,
            )
        truncated = [trainer.sampler.is_truncated(ids) for ids in completion_ids]
        return Samples(completion_ids, truncated, support=supports)

    def close(self) -> None:
        """There is nothing to release."""


def make_source(trainer) -> RolloutSource:
    """Returns the source that the config of a trainer names.

    Raises:
        ValueError: the trainer has a rollout_fn as well; the policy does not fit the source.
    """
    if trainer.rollout_fn is not None and trainer.config.rollout_source != "generate":
        raise ValueError(
            "rollout_fn must be None with rollout_source "
            f"{trainer.config.rollout_source}, got {trainer.rollout_fn!r}"
        )
    if trainer.config.rollout_source == "vllm":
        from grpo_fused.trainer.rollouts.vllm import VLLMSource

        return VLLMSource(trainer)
    return GenerateSource(trainer)
