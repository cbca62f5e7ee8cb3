"""Sources of rollouts: who samples completions, and how it gets the weights of the policy."""

from typing import Protocol

from grpo_fused.trainer.rollouts.rollout import Samples
from grpo_fused.trainer.run.errors import together


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
        trainer = self.trainer

        def sample():
            with trainer.accelerator.autocast():
                return trainer.sampler.sample(
                    trainer.unwrapped,
                    prompt_ids,
                    temperature=trainer.config.temperature,
                    with_notes=True,
                )

        return together(trainer.accelerator, sample)

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
        if stops := trainer.sampler.stops.strings:
            raise ValueError(
                "stop_strings of the model's generation config must be none with rollout_source "
                f"vllm, which does not pass them on to the servers, got {stops}"
            )
        from grpo_fused.trainer.rollouts.vllm import VLLMSource

        return VLLMSource(trainer)
    return GenerateSource(trainer)
