"""Rollouts: prompts as tokens, completions sampled from the policy, both as padded tensors."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from grpo_fused.trainer.errors import shorten


@dataclass
class Rollout:
    """B completions on the host, those of one prompt side by side, lists of length B.

    Attributes:
        prompts: as the data has them, str or list of messages.
        prompt_ids, completion_ids: tokens; a completion ends with its end token, if it has one.
        truncated: no end token: cut off at the length limit.
        logprobs: log-probability of each completion token under its sampler, or None.
        completion_mask: which tokens of a completion the policy wrote, or None for all.
        columns: name -> list, for rewards.
    """

    prompts: list
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    truncated: list[bool]
    logprobs: list[list[float]] | None
    completion_mask: list[list[int]] | None
    columns: dict[str, list]


class Sampler:
    """Turns prompts into tokens and completes them.

    Args:
        tokenizer: of transformers; without a padding token it pads with its end token, which
            changes nothing: a completion ends at the first.
        model: its config and generation config say where completions end and what fits.
        config: GRPOTrainerConfig.

    Raises:
        ValueError: neither tokenizer nor model has an end token; lengths that do not fit the
            model's context.
    """

    def __init__(self, tokenizer, model, config):
        self.tokenizer, self.config = tokenizer, config
        self.eos_ids = end_tokens(tokenizer, model)
        self.pad_id = self.eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        wanted = (config.max_prompt_length or 1) + config.max_completion_length
        if self.context and wanted > self.context:
            raise ValueError(
                f"max_completion_length: {wanted} tokens of prompt and completion do not fit the "
                f"model's context of {self.context}"
            )

    def encode(self, prompts: Sequence) -> list[list[int]]:
        """Tokens of prompts, str or lists of messages, cut at the left to max_prompt_length.

        Raises:
            ValueError: a prompt that is neither or has no tokens; one that leaves no room for
                max_completion_length in the model's context.
        """
        encoded = []
        for i, prompt in enumerate(prompts):  # those of a group stand side by side
            again = i > 0 and prompt == prompts[i - 1]
            encoded.append(encoded[-1] if again else self._encode(prompt))
        return encoded

    def _encode(self, prompt):
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif isinstance(prompt, list):
            ids = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        else:
            raise ValueError(f"prompt must be a str or a list of messages, got {prompt!r}")
        if self.config.max_prompt_length is not None:
            ids = ids[-self.config.max_prompt_length :]
        if not ids:
            raise ValueError(f"prompt has no tokens: {prompt!r}")
        room = (self.context or len(ids) + self.config.max_completion_length) - len(ids)
        if room < self.config.max_completion_length:
            raise ValueError(
                f"prompt of {len(ids)} tokens leaves {max(room, 0)} of the model's context of "
                f"{self.context} for max_completion_length = {self.config.max_completion_length}; "
                f"max_prompt_length would cut it: {shorten(prompt)}"
            )
        return list(ids)

    @torch.no_grad()
    def sample(self, model, prompt_ids, *, temperature, batch_size=None) -> list[list[int]]:
        """Completes tokens, `batch_size` prompts at once; temperature 0 is greedy."""
        batch_size = batch_size or len(prompt_ids)
        completions = []
        with evaluating(model), generating(model, self.generation_config(temperature)):
            for first in range(0, len(prompt_ids), batch_size):
                ids, mask = pad(prompt_ids[first : first + batch_size], self.pad_id, "left")
                ids, mask = ids.to(model.device), mask.to(model.device)
                tokens = model.generate(input_ids=ids, attention_mask=mask.long())
                completions += [self.until_end(row) for row in tokens[:, ids.shape[1] :].tolist()]
        return completions

    def generation_config(self, temperature):
        config = self.config
        sampling = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": config.top_k}
            sampling |= {"top_p": config.top_p, "min_p": config.min_p}
        return GenerationConfig(
            max_new_tokens=config.max_completion_length,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
            **sampling,
        )

    def until_end(self, ids):
        """Tokens up to and including the first end token."""
        ends = [ids.index(eos) for eos in self.eos_ids if eos in ids]
        return ids[: min(ends) + 1] if ends else ids

    def is_truncated(self, ids):
        return not ids or ids[-1] not in self.eos_ids

    def texts(self, completion_ids):
        return self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)

    def roll_out(self, model, prompts, columns, *, temperature) -> Rollout:
        """Completions of prompts that stand there as often as they are to be completed."""
        prompt_ids = self.encode(prompts)
        completion_ids = self.sample(
            model,
            prompt_ids,
            temperature=temperature,
            batch_size=self.config.generation_batch_size,
        )
        truncated = [self.is_truncated(ids) for ids in completion_ids]
        return Rollout(list(prompts), prompt_ids, completion_ids, truncated, None, None, columns)


def end_tokens(tokenizer, model) -> list[int]:
    """Tokens that end a completion: the tokenizer's, then the model's generation config's."""
    configured = getattr(model, "generation_config", None)
    configured = None if configured is None else configured.eos_token_id
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    ids = [i for i in dict.fromkeys(ids) if i is not None]
    if not ids:
        raise ValueError(
            "tokenizer has no eos_token, and the model's generation config none: nothing would "
            "end a completion; set tokenizer.eos_token"
        )
    return ids


def pad(rows, value, side="right", dtype=torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, mask): (B, T) of lists, at least one wide; mask bool, True where there is one."""
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    filler = torch.zeros(1, dtype=dtype)  # a batch of empty completions still has a column
    values = pad_sequence([*tensors, filler], True, value, side)[:-1]
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    columns = torch.arange(values.shape[1])
    if side == "left":
        columns = columns.flip(0)
    return values, columns < lengths


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def generating(model, generation_config):
    """The model's own sampling defaults (a top_k, a repetition penalty) are out of the way.

    `generate(generation_config=...)` would fill in what that leaves at None from the model's own,
    and the policy that sampled would not be the one of the loss.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.generation_config
    base.generation_config = generation_config
    try:
        yield
    finally:
        base.generation_config = before
