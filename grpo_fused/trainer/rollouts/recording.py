"""What a sampler does with the policy's logits: filters, the tokens they keep, stop strings."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    WatermarkingConfig,
)
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from grpo_fused import support_from_mask
from grpo_fused.integrations.transformers import base_model
from grpo_fused.trainer.rollouts.generation import FOR_SAMPLES, LEAVES_OUT, OF_TOKENS, REWEIGHTS
from grpo_fused.trainer.run.config import GRPOTrainerConfig


@dataclass
class Notes:
    """What a sampler notes of completions: `Rollout.support` and `Rollout.logprobs`."""

    supports: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)


class Filters(LogitsProcessor):
    """The temperature and the filters of a sampler, which remember what they keep of a batch.

    `generate` would apply its own behind any other processor, where nobody sees what is left. Here
    they are the last, behind the penalties and prohibitions that `generate` applies. The order is
    that of transformers.

    Args:
        config: of the run.
        temperature: above 0.
        vocabulary: size of the logits.
        device: of the logits.
        records: whether to remember.
    """

    def __init__(
        self,
        config: GRPOTrainerConfig,
        temperature: float,
        vocabulary: int,
        device: torch.device,
        records: bool = False,
    ):
        given = config.generation_kwargs
        self.processors = LogitsProcessorList()
        if temperature != 1:
            self.processors.append(TemperatureLogitsWarper(float(temperature)))
        if "top_h" in given:
            self.processors.append(TopHLogitsWarper(given["top_h"]))
        if config.top_k:
            self.processors.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self.processors.append(TopPLogitsWarper(config.top_p))
        if config.min_p:
            self.processors.append(MinPLogitsWarper(config.min_p))
        if given.get("typical_p", 1.0) != 1:
            self.processors.append(TypicalLogitsWarper(given["typical_p"]))
        if given.get("epsilon_cutoff"):
            self.processors.append(EpsilonLogitsWarper(given["epsilon_cutoff"]))
        if given.get("eta_cutoff"):
            self.processors.append(EtaLogitsWarper(given["eta_cutoff"], device=str(device)))
        if "watermarking_config" in given:
            marks = WatermarkingConfig.from_dict(given["watermarking_config"])
            self.processors.append(marks.construct_processor(vocabulary, str(device)))
        self.records = records
        self.supports: list[tuple[np.ndarray, list[np.ndarray]]] = []  # of a step: of every row
        self.logps: list[torch.Tensor] = []  # of a step, (B,) float32
        self._scores: torch.Tensor | None = None  # (B, V) of the last step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns the scores (B, V) of the next token, -inf where it is left out."""
        scores = self.processors(input_ids, scores)
        if self.records:
            self._note_taken(input_ids)
            self.supports.append(_supports(scores))
            self._scores = scores
        return scores

    def _note_taken(self, input_ids):
        """Notes the log-probability of the token that was taken from the last scores."""
        if self._scores is not None:
            logps = self._scores.float().log_softmax(1).gather(1, input_ids[:, -1:])
            self.logps.append(logps[:, 0])
            self._scores = None

    def note(self, tokens: torch.Tensor, completions: list[list[int]], notes: Notes) -> None:
        """Adds what was remembered of a batch.

        Args:
            tokens: (B, P + T) that `generate` returned.
            completions: those of the T that are the completions.
            notes: to add to.
        """
        self._note_taken(tokens)
        logps = torch.stack(self.logps, 1).tolist()
        for row, completion in enumerate(completions):
            length = len(completion)
            counts = [counts[row] for counts, _ in self.supports[:length]]
            ids = [ids[row] for _, ids in self.supports[:length]]
            notes.supports.append((np.array(counts, np.int64), np.concatenate(ids)))
            notes.logprobs.append(logps[row][:length])


def _supports(scores):
    """(counts, ids of every row), as `Rollout.support` has them; the shorter list of two."""
    kept = scores > -torch.inf
    numbers = kept.sum(1)
    if not bool(numbers.all()):
        raise ValueError(
            "generation_kwargs must leave a token to sample, but all were left out after some "
            "completion; see bad_words_ids, suppress_tokens, no_repeat_ngram_size"
        )
    few = 2 * numbers <= kept.shape[1]
    offsets, ids = support_from_mask(torch.where(few[:, None], kept, ~kept))
    counts = torch.where(few, numbers, numbers - kept.shape[1] - 1)
    return counts.cpu().numpy(), np.split(ids.cpu().numpy(), offsets[1:-1].cpu().numpy())


def check_values(
    model: Any, config: GRPOTrainerConfig, generation_config: GenerationConfig, vocabulary: int
) -> None:
    """Checks the values of generation_kwargs; transformers does it in the middle of a rollout.

    Args:
        model: to sample from.
        config: of the run.
        generation_config: that `generate` gets.
        vocabulary: size of the logits.

    Raises:
        ValueError: transformers rejects or ignores a value; it has an id out of the vocabulary.
    """
    base = base_model(model)
    for name, value in config.generation_kwargs.items():
        where = f"generation_kwargs: {name} = {value!r}"
        for token in _flat(value) if name in OF_TOKENS else ():
            if type(token) is not int or not 0 <= token < vocabulary:
                raise ValueError(f"{where} must hold ids in [0, {vocabulary}), got {token!r}")
        if name not in (*LEAVES_OUT, *REWEIGHTS):
            continue
        neutral = GenerationConfig(
            max_length=2, do_sample=True, top_k=0, eos_token_id=generation_config.eos_token_id
        )
        try:
            if name not in FOR_SAMPLES:
                neutral.update(**{name: value})
            base._prepare_special_tokens(neutral, True, device=torch.device("cpu"))
            ids = torch.zeros(1, 1, dtype=torch.int64)
            found = list(base._get_logits_processor(neutral, 1, ids, device="cpu"))
            alone = replace(config, generation_kwargs={name: value}, top_k=0, top_p=1.0, min_p=None)
            found += Filters(alone, 1.0, vocabulary, torch.device("cpu")).processors
            LogitsProcessorList(found)(ids, torch.zeros(1, vocabulary))
        except Exception as error:
            raise ValueError(f"{where} is not valid ({error})") from error
        if not found and value not in (0, 1):
            raise ValueError(f"{where} has no effect in transformers {transformers.__version__}")


def _flat(value):
    return [token for one in value for token in _flat(one)] if isinstance(value, list) else [value]


class StopStrings:
    """Texts that end a completion, wherever the tokenizer puts the limits between tokens.

    Args:
        tokenizer: writes the text, with its special tokens.
        strings: the texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]):
        self.tokenizer, self.strings = tokenizer, list(dict.fromkeys(strings))
        # A token is a byte of the text at least; one more, because some drop a space in front.
        self.window = 1 + max((len(text.encode()) for text in self.strings), default=0)

    def check(self) -> None:
        """Checks that the tokenizer can write every string.

        Raises:
            ValueError: naming the string.
        """
        for text in self.strings:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if (text.strip() or text) not in self._decode([ids])[0]:
                raise ValueError(
                    f"stop_strings: the tokenizer cannot write {text!r}, only "
                    f"{self._decode([ids])[0]!r}"
                )

    def end(self, completions: Sequence[Sequence[int]]) -> list[bool]:
        """Returns whether the last token of each completion completes one of the strings."""
        if not self.strings:
            return [False] * len(completions)
        windows = [list(ids[-self.window :]) for ids in completions]
        texts = self._decode([*windows, *(ids[:-1] for ids in windows)])
        size = len(windows)
        return list(map(self._is_new, texts[:size], texts[size:]))

    def _is_new(self, text, before):
        """Whether a string ends in what the last token added to the text."""
        length = len(before.rstrip("\ufffd"))  # a character may have bytes in several tokens
        return any(text.find(one, max(0, length + 1 - len(one))) >= 0 for one in self.strings)

    def _decode(self, rows):
        return self.tokenizer.batch_decode(
            rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


class StopAtStrings(StoppingCriteria):
    """Stops the completions of a batch at the first of some strings, and remembers where.

    The text of the prompt is no part of it.

    Args:
        stops: the strings.
        prompt_length: tokens of the padded prompts.

    Attributes:
        lengths: tokens of the completions that were stopped, by row.
    """

    def __init__(self, stops: StopStrings, prompt_length: int):
        self.stops, self.prompt_length = stops, prompt_length
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """Returns (B,) bool, whether a completion was stopped, now or before."""
        rows = [row for row in range(len(input_ids)) if row not in self.lengths]
        length = input_ids.shape[1] - self.prompt_length
        recent = input_ids[:, -min(length, self.stops.window) :].tolist()
        found = self.stops.end([recent[row] for row in rows])
        self.lengths |= {row: length for row, ends in zip(rows, found, strict=True) if ends}
        done = [row in self.lengths for row in range(len(input_ids))]
        return torch.tensor(done, device=input_ids.device)
