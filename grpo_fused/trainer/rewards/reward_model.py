"""Reward models: classifiers of transformers that score a completion, or each of its steps."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from grpo_fused.trainer.rewards.results import Steps
from grpo_fused.trainer.rewards.steps import split_steps
from grpo_fused.trainer.rollouts.chat import last_turn
from grpo_fused.trainer.rollouts.rollout import Prompt, pad

# How the name of an architecture in a model's config.json ends.
SEQUENCES, TOKENS = "ForSequenceClassification", "ForTokenClassification"


class RewardModel:
    """A reward function that returns the score of a sequence classifier with one label.

    Args:
        path: folder or Hub name of the model and its tokenizer.
        batch_size: number of texts scored at once.

    Attributes:
        model, tokenizer: of transformers; the model is in evaluation mode.

    Raises:
        ValueError: the model has more than one label, or no trained classifier.
    """

    def __init__(self, path: str, batch_size: int = 16):
        self.__name__ = Path(path).name
        self.batch_size = batch_size
        self.model, self.tokenizer = load_classifier(
            AutoModelForSequenceClassification, SEQUENCES, path
        )
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"reward model {path} must have one label, got {self.model.config.num_labels}"
            )

    @torch.no_grad()
    def __call__(self, prompts: list[Prompt], completions: list[Prompt], **columns) -> list[float]:
        """Returns one score for each of B prompts and completions.

        Raises:
            ValueError: prompts are chats, but the tokenizer has no chat template.
        """
        to_device(self.model)
        texts = list(map(self.text_of, prompts, completions))
        parts = (texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size))
        return [score for part in parts for score in self.score(part).tolist()]

    def text_of(self, prompt: Prompt, completion: Prompt) -> str:
        """Returns what the model reads; of a chat, by its own chat template.

        Raises:
            ValueError: it has none.
        """
        if isinstance(prompt, str):
            assert isinstance(completion, str)
            return prompt + completion
        check_chat_template(self.__name__, self.tokenizer)
        return self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)

    def score(self, texts: list[str]) -> torch.Tensor:
        """Returns the scores of B texts, (B,) float32, differentiable unless under `no_grad`."""
        inputs = self.tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=False
        ).to(self.model.device)
        return self.model(**inputs).logits[:, 0].float()


class StepRewardModel:
    """A reward function that returns the scores of steps, of a token classifier.

    A model with one label gives the score itself, one with two the probability of the second, as
    TRL's PRMTrainer trains it. As there, the model reads the prompt and every step with a
    separator behind it, the last one too, each tokenized on its own by the model's tokenizer; the
    score of a step is that of the last token of its separator. A chat ends where its template lets
    the assistant begin.

    Args:
        path: folder or Hub name of the model and its tokenizer.
        batch_size: number of completions scored at once.

    Raises:
        ValueError: the model has another number of labels, or no trained classifier.
    """

    def __init__(self, path: str, batch_size: int = 16):
        self.__name__ = Path(path).name
        self.batch_size = batch_size
        self.model, self.tokenizer = load_classifier(AutoModelForTokenClassification, TOKENS, path)
        if self.model.config.num_labels not in (1, 2):
            raise ValueError(
                f"step reward model {path} must have one or two labels, "
                f"got {self.model.config.num_labels}"
            )

    @torch.no_grad()
    def __call__(
        self, prompts: list[Prompt], completion_ids: list[list[int]], trainer_state: Any, **columns
    ) -> list[Steps | None]:
        """Returns [(end_token, score), ...] of each of B completions; None of one without tokens.

        Args:
            prompts: B strings or lists of messages.
            completion_ids: tokens of the policy.
            trainer_state: has the `tokenizer` of the policy and the `step_separator`.

        Raises:
            ValueError: there is no trainer_state; prompts are chats, but the tokenizer of the
                reward model has no chat template.
        """
        if trainer_state is None:
            raise ValueError(
                f"step reward model {self.__name__} needs the tokenizer of a trainer's policy, got "
                "None as trainer_state"
            )
        to_device(self.model)
        separator = trainer_state.step_separator
        all_steps = [split_steps(ids, trainer_state.tokenizer, separator) for ids in completion_ids]
        rows = [
            self._encode(prompt, [step.text for step in steps], separator)
            for prompt, steps in zip(prompts, all_steps, strict=True)
        ]
        scores: list[list[float]] = []
        for start in range(0, len(rows), self.batch_size):
            scores += self._score(rows[start : start + self.batch_size])
        return [
            [(step.end_token, score) for step, score in zip(steps, found, strict=True)] or None
            for steps, found in zip(all_steps, scores, strict=True)
        ]

    def _encode(self, prompt, texts, separator):
        """Returns (ids, ends): what the model reads, and the place of the last token of a step."""
        if not isinstance(prompt, str):
            check_chat_template(self.__name__, self.tokenizer)
            turn = last_turn(prompt)
            prompt = self.tokenizer.apply_chat_template(prompt, tokenize=False, **turn)

        def tokens(text):
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        ids, ends, begin = tokens(prompt), [], self.tokenizer.bos_token_id
        if begin is not None and ids[:1] != [begin]:
            ids = [begin, *ids]
        for text in texts:
            ids = [*ids, *tokens(text), *tokens(separator)]
            ends.append(len(ids) - 1)
        return ids, ends

    def _score(self, rows):
        ids, mask = pad([ids for ids, _ in rows], self.tokenizer.pad_token_id or 0)
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        device = self.model.device
        logits = self.model(**{name: x.to(device) for name, x in inputs.items()}).logits.float()
        scores = logits[..., 0] if logits.shape[-1] == 1 else logits.softmax(-1)[..., 1]
        return [row[ends].tolist() for row, (_, ends) in zip(scores.cpu(), rows, strict=True)]


def load_reward_model(folder: str) -> RewardModel | StepRewardModel:
    """Returns the reward model of a folder, of the kind that its architecture says.

    Raises:
        ValueError: the architecture is no classifier, or it has another number of labels.
    """
    is_of_tokens = check_architecture(folder, SEQUENCES, TOKENS).endswith(TOKENS)
    return StepRewardModel(folder) if is_of_tokens else RewardModel(folder)


def check_architecture(path: str, *endings: str) -> str:
    """Returns the name of a model's architecture.

    Raises:
        ValueError: it has none of the endings.
    """
    names = AutoConfig.from_pretrained(path).architectures or []
    for name in names:
        if name.endswith(endings):
            return name
    raise ValueError(
        f"reward model {path} must be a model {' or '.join(endings)}, "
        f"got {', '.join(names) or 'no architectures in its config.json'}"
    )


def load_classifier(
    auto_class: Any, ending: str, path: str
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Loads a classifier in evaluation mode, and its tokenizer, which pads on the right.

    Raises:
        ValueError: its architecture has another ending; some of its weights are missing, which
            transformers would draw at random.
    """
    check_architecture(path, ending)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
    model, info = auto_class.from_pretrained(path, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"reward model {path} must be a trained classifier, but its weights lack "
            f"{', '.join(sorted(info['missing_keys']))}"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:  # the model finds the last token with it
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def check_chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(f"reward model {name} has no chat template for chat prompts")


def to_device(model: nn.Module) -> None:
    """Moves a model to this rank's GPU, which is unknown before training starts."""
    if torch.cuda.is_available():
        model.to(torch.cuda.current_device())
