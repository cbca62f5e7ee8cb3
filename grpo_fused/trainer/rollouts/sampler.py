"""Sampling completions of prompts with the `generate` method of a transformers model."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grpo_fused import support_from_mask
from grpo_fused.trainer.rollouts.rollout import Prompt, Rollout, pad
from grpo_fused.trainer.run.config import GRPOTrainerConfig
from grpo_fused.trainer.run.errors import shorten


class Sampler:
    """Tokenizes prompts and samples completions.

    Args:
        tokenizer: tokenizer of the model. Without a padding token its end token is used, which is
            safe: a completion ends at the first end token.
        model: its config and generation config define the end tokens and the context length.
        config: GRPOTrainerConfig.

    Raises:
        ValueError: neither tokenizer nor model has an end token; prompts and completions can
            exceed the context length of the model.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: nn.Module, config: GRPOTrainerConfig
    ):
        self.tokenizer, self.config = tokenizer, config
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

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Tokenizes prompts and keeps the last max_prompt_length tokens of each.

        Raises:
            ValueError: a prompt is neither text nor a list of messages, has no tokens, or does
                not leave max_completion_length tokens of the model's context.
        """
        encoded: list[list[int]] = []
        for i, prompt in enumerate(prompts):  # a group repeats its prompt
            is_repeated = i > 0 and prompt == prompts[i - 1]
            encoded.append(encoded[-1] if is_repeated else self._encode(prompt))
        return encoded

    def _encode(self, prompt):
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif isinstance(prompt, list):
            # A last turn of the assistant is continued, any other answered.
            continues = bool(prompt) and prompt[-1].get("role") == "assistant"
            ids = self.tokenizer.apply_chat_template(
                prompt,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tokenize=True,
                return_dict=True,
            )["input_ids"]
        else:
            raise ValueError(f"prompt must be a str or a list of messages, got {prompt!r}")
        if self.config.max_prompt_length is not None:
            ids = ids[-self.config.max_prompt_length :]
        if not ids:
            raise ValueError(f"prompt must have at least one token, got {prompt!r}")
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
        supports: list[tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> list[list[int]]:
        """Samples a completion for each prompt, `batch_size` at once; temperature 0 is greedy.

        Args:
            max_new_tokens: length limit; None: max_completion_length.
            supports: collects `Rollout.support` of the completions.
        """
        batch_size = batch_size or len(prompt_ids)
        completions = []
        generation_config = self.generation_config(temperature, max_new_tokens)
        with eval_mode(model), generation_defaults(model, generation_config):
            for first in range(0, len(prompt_ids), batch_size):
                ids, mask = pad(prompt_ids[first : first + batch_size], self.pad_id, "left")
                ids, mask = ids.to(model.device), mask.to(model.device)
                filters = Filters(self.config, temperature, supports is not None)
                tokens = model.generate(
                    input_ids=ids,
                    attention_mask=mask.long(),
                    logits_processor=LogitsProcessorList([filters] if temperature else []),
                )
                found = [self.cut_at_eos(row) for row in tokens[:, ids.shape[1] :].tolist()]
                if supports is not None:
                    supports += filters.supports(found)
                completions += found
        return completions

    def generation_config(
        self, temperature: float, max_new_tokens: int | None = None
    ) -> GenerationConfig:
        """Returns a generation config for sampling from what `Filters` leave."""
        config = self.config
        sampling: dict[str, Any] = {"do_sample": bool(temperature)}
        if temperature:
            sampling |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            max_new_tokens=max_new_tokens or config.max_completion_length,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
            **sampling,
        )

    def cut_at_eos(self, ids: list[int]) -> list[int]:
        """Returns the tokens up to and including the first end token."""
        ends = [ids.index(eos) for eos in self.eos_ids if eos in ids]
        return ids[: min(ends) + 1] if ends else ids

    def is_truncated(self, ids: Sequence[int]) -> bool:
        """Returns whether a completion lacks an end token."""
        return not ids or ids[-1] not in self.eos_ids

    def decode(self, completion_ids: Sequence[Sequence[int]]) -> list[str]:
        """Returns the text of completions, without special tokens."""
        return self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)

    def rollout(
        self,
        model: nn.Module,
        prompts: Sequence[Prompt],
        columns: dict[str, list],
        *,
        temperature: float,
        with_support: bool = False,
    ) -> Rollout:
        """Samples one completion per prompt; a group repeats its prompt num_generations times.

        Args:
            model: to sample from.
            prompts: B prompts.
            columns: of the data, B values each.
            temperature: of the sampler; 0 is greedy.
            with_support: whether to note which tokens the filters kept, if there are any.
        """
        prompt_ids = self.encode(prompts)
        notes = with_support and temperature and self.config.has_filters
        supports: list | None = [] if notes else None
        completion_ids = self.generate(
            model,
            prompt_ids,
            temperature=temperature,
            batch_size=self.config.generation_batch_size,
            supports=supports,
        )
        truncated = [self.is_truncated(ids) for ids in completion_ids]
        given = (list(prompts), prompt_ids, completion_ids, truncated, None, None, columns)
        return Rollout(*given, supports)


class Filters(LogitsProcessor):
    """The temperature and the filters of a sampler, which remember the tokens that they keep.

    `generate` would apply its own behind any other processor, where nobody sees what is left.
    """

    def __init__(self, config: GRPOTrainerConfig, temperature: float, records: bool = False):
        self.processors = LogitsProcessorList()
        if temperature not in (0, 1):
            self.processors.append(TemperatureLogitsWarper(float(temperature)))
        if config.top_k:
            self.processors.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self.processors.append(TopPLogitsWarper(config.top_p))
        if config.min_p:
            self.processors.append(MinPLogitsWarper(config.min_p))
        self.records = records
        self.steps: list[list[np.ndarray]] = []  # ids of every row

    def __call__(self, input_ids, scores):
        scores = self.processors(input_ids, scores)
        if self.records:
            offsets, ids = (t.cpu().numpy() for t in support_from_mask(scores > -torch.inf))
            self.steps.append(np.split(ids, offsets[1:-1]))
        return scores

    def supports(self, completions: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns `Rollout.support` of the completions of a batch."""
        found = []
        for row, completion in enumerate(completions):
            kept = [step[row] for step in self.steps[: len(completion)]]
            found.append((np.array([len(ids) for ids in kept], np.int64), np.concatenate(kept)))
        return found


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
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.generation_config
    base.generation_config = generation_config
    try:
        yield
    finally:
        base.generation_config = before
