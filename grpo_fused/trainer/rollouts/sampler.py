"""Sampling completions of prompts with the `generate` method of a transformers model."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList

from grpo_fused.integrations.transformers import base_model
from grpo_fused.trainer.rollouts.chat import (
    COLUMN,
    check_template,
    encode_chat,
    merge_template_kwargs,
)
from grpo_fused.trainer.rollouts.generation import FOR_SAMPLES
from grpo_fused.trainer.rollouts.recording import (
    Filters,
    Notes,
    StopAtStrings,
    StopStrings,
    check_values,
)
from grpo_fused.trainer.rollouts.rollout import Prompt, Rollout, Samples, pad
from grpo_fused.trainer.run.config import GRPOTrainerConfig
from grpo_fused.trainer.run.errors import shorten


class Sampler:
    """Tokenizes prompts and samples completions.

    Args:
        tokenizer: tokenizer of the model. Without a padding token its end token is used, which is
            safe: a completion ends at the first end token.
        model: its config and generation config define the end tokens, the context length and
            stop strings in addition to those of `config`.
        config: GRPOTrainerConfig.

    Raises:
        ValueError: neither tokenizer nor model has an end token; prompts and completions can
            exceed the context length of the model; the tokenizer cannot write a stop string; the
            chat template does not read an argument; transformers rejects a setting.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: nn.Module, config: GRPOTrainerConfig
    ):
        self.tokenizer, self.config, self.told_unknown = tokenizer, config, False
        self.vocabulary = model.config.get_text_config().vocab_size
        self.eos_ids = find_eos_ids(tokenizer, model)
        self.pad_id = self.eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = (config.max_prompt_length or 1) + config.max_completion_length
        if self.context and longest > self.context:
            raise ValueError(
                f"max_completion_length: {longest} tokens of prompt and completion exceed the "
                f"model's context of {self.context}"
            )
        StopStrings(tokenizer, config.stop_strings).check()
        self.stops = StopStrings(tokenizer, [*config.stop_strings, *find_stop_strings(model)])
        if config.chat_template_kwargs:
            check_template(tokenizer, config.chat_template_kwargs)
        check_values(model, config, self.generation_config(1.0), self.vocabulary)

    def encode(
        self, prompts: Sequence[Prompt], columns: dict[str, list[Any]] | None = None
    ) -> list[list[int]]:
        """Tokenizes prompts and keeps the last max_prompt_length tokens of each.

        Args:
            prompts: B prompts.
            columns: of the data; a column `chat_template_kwargs` has arguments for chats.

        Raises:
            ValueError: a prompt is neither text nor a list of messages, has no tokens, or does
                not leave max_completion_length tokens of the model's context; the chat template
                does not read an argument.
        """
        rows = (columns or {}).get(COLUMN) or [None] * len(prompts)
        pairs = list(zip(prompts, rows, strict=True))
        encoded: list[list[int]] = []
        for i, pair in enumerate(pairs):  # a group repeats its prompt
            is_repeated = i > 0 and pair == pairs[i - 1]
            encoded.append(encoded[-1] if is_repeated else self._encode(*pair))
        return encoded

    def _encode(self, prompt, template_kwargs):
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif isinstance(prompt, list):
            arguments = merge_template_kwargs(self.config.chat_template_kwargs, template_kwargs)
            ids = encode_chat(self.tokenizer, prompt, arguments)
        else:
            raise ValueError(f"prompt must be a str or a list of messages, got {prompt!r}")
        if self.config.max_prompt_length is not None:
            ids = ids[-self.config.max_prompt_length :]
        if not ids:
            raise ValueError(f"prompt must have at least one token, got {prompt!r}")
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids and not self.told_unknown:
            self.told_unknown = True
            warnings.warn(
                "the tokenizer does not know some characters of the prompts, and reads them as "
                f"{self.tokenizer.unk_token}: {shorten(prompt)}",
                stacklevel=2,
            )
        max_completion_length = self.config.max_completion_length
        if self.context and len(ids) + max_completion_length > self.context:
            raise ValueError(
                f"prompt of {len(ids)} tokens leaves {max(self.context - len(ids), 0)} of the "
                f"model's context of {self.context} for max_completion_length = "
                f"{max_completion_length}; set max_prompt_length to truncate it: {shorten(prompt)}"
            )
        return list(ids)

    @torch.no_grad()
    def generate(
        self,
        model: Any,
        prompt_ids: Sequence[Sequence[int]],
        *,
        temperature: float,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        notes: Notes | None = None,
    ) -> list[list[int]]:
        """Samples a completion for each prompt, `batch_size` at once; temperature 0 is greedy.

        Args:
            model: to sample from.
            prompt_ids: B prompts.
            temperature: of the sampler.
            batch_size: None = all.
            max_new_tokens: length limit; None: max_completion_length.
            notes: collects what the sampler kept, and its log-probabilities; needs a temperature.
        """
        batch_size = batch_size or len(prompt_ids)
        completions = []
        generation_config = self.generation_config(temperature, max_new_tokens)
        with eval_mode(model), generation_defaults(model, generation_config):
            for first in range(0, len(prompt_ids), batch_size):
                ids, mask = pad(prompt_ids[first : first + batch_size], self.pad_id, "left")
                ids, mask = ids.to(model.device), mask.to(model.device)
                filters = self._filters(temperature, model.device, notes is not None)
                stop = StopAtStrings(self.stops, ids.shape[1])
                tokens = model.generate(
                    input_ids=ids,
                    attention_mask=mask.long(),
                    logits_processor=LogitsProcessorList(filters),
                    stopping_criteria=[stop] if self.stops.strings else None,
                )
                found = [
                    self.cut_at_eos(row[: stop.lengths.get(number)])
                    for number, row in enumerate(tokens[:, ids.shape[1] :].tolist())
                ]
                if notes is not None:
                    filters[0].note(tokens, found, notes)
                completions += found
        return completions

    def _filters(self, temperature, device, records):
        """[Filters] of samples, [] of greedy completions."""
        given = (self.config, temperature, self.vocabulary, device, records)
        return [Filters(*given)] if temperature else []

    def generation_config(
        self, temperature: float, max_new_tokens: int | None = None
    ) -> GenerationConfig:
        """Returns a generation config for sampling from what `Filters` leave."""
        config = self.config
        settings = {k: v for k, v in config.generation_kwargs.items() if k not in FOR_SAMPLES}
        if temperature:
            settings.pop("watermarking_config", None)  # comes last, in `Filters`
            settings |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            max_new_tokens=max_new_tokens or config.max_completion_length,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
            repetition_penalty=float(config.repetition_penalty),
            do_sample=bool(temperature),
            **settings,
        )

    def cut_at_eos(self, ids: list[int]) -> list[int]:
        """Returns the tokens up to and including the first end token."""
        ends = [ids.index(eos) for eos in self.eos_ids if eos in ids]
        return ids[: min(ends) + 1] if ends else ids

    def is_truncated(self, ids: Sequence[int]) -> bool:
        """Returns whether a completion ends neither with an end token nor with a stop string."""
        return not ids or not (ids[-1] in self.eos_ids or self.stops.end([ids])[0])

    def decode(self, completion_ids: Sequence[Sequence[int]]) -> list[str]:
        """Returns the text of completions; without special tokens if skip_special_tokens."""
        skips = self.config.skip_special_tokens
        return self.tokenizer.batch_decode(completion_ids, skip_special_tokens=skips)

    def sample(
        self,
        model: nn.Module,
        prompt_ids: list[list[int]],
        *,
        temperature: float,
        with_notes: bool = False,
    ) -> Samples:
        """Samples one completion per prompt.

        Args:
            model: to sample from.
            prompt_ids: B prompts.
            temperature: of the sampler; 0 is greedy.
            with_notes: whether to note the tokens that were kept, and log-probabilities, as far as
                the config lets them differ from the policy's.
        """
        config = self.config
        differs = with_notes and temperature and (config.has_filters or config.has_penalties)
        notes = Notes() if differs else None
        completion_ids = self.generate(
            model,
            prompt_ids,
            temperature=temperature,
            batch_size=config.generation_batch_size,
            notes=notes,
        )
        return Samples(
            completion_ids,
            [self.is_truncated(ids) for ids in completion_ids],
            logprobs=notes.logprobs if notes and config.has_penalties else None,
            support=notes.supports if notes else None,
        )

    def rollout(
        self,
        model: nn.Module,
        prompts: Sequence[Prompt],
        columns: dict[str, list],
        *,
        temperature: float,
    ) -> Rollout:
        """Encodes prompts and samples one completion each, without notes."""
        prompt_ids = self.encode(prompts, columns)
        found = self.sample(model, prompt_ids, temperature=temperature)
        return Rollout.of(found, prompts, prompt_ids, columns)


def find_eos_ids(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> list[int]:
    """Returns the end token of the tokenizer, then those of the model's generation config.

    Raises:
        ValueError: neither has one.
    """
    configured = getattr(model, "generation_config", None)
    configured = None if configured is None else configured.eos_token_id
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    ids = [i for i in dict.fromkeys(ids) if i is not None]
    if not ids:
        raise ValueError(
            "tokenizer has no eos_token and the model's generation config has none either, so no "
            "completion would end; set tokenizer.eos_token"
        )
    return ids


def find_stop_strings(model: nn.Module) -> list[str]:
    """Returns the stop strings of a model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "stop_strings", None) or []
    return [configured] if isinstance(configured, str) else list(configured)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode within the context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def generation_defaults(model: Any, generation_config: GenerationConfig) -> Iterator[None]:
    """Replaces the generation config of a model within the context.

    `generate(generation_config=...)` fills values that are None from the model's own generation
    config. A top_k or repetition penalty in it would sample from another distribution than the
    policy of the loss.
    """
    base = base_model(model)
    before = base.generation_config
    base.generation_config = generation_config
    try:
        yield
    finally:
        base.generation_config = before
