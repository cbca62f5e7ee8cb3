"""Reward models: sequence classifiers of transformers with one label."""

from pathlib import Path

import torch

from grpo_fused.trainer.rollouts.rollout import Prompt


class RewardModel:
    """A reward function that returns the score of a sequence classifier.

    Args:
        path: folder or Hub name of the model and its tokenizer.
        batch_size: number of texts scored at once.

    Raises:
        ValueError: the model has more than one label.
    """

    def __init__(self, path: str, batch_size: int = 16):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.__name__ = Path(path).name
        self.batch_size = batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
        self.model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"reward model {path} must have one label, got {self.model.config.num_labels}"
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.model.config.pad_token_id is None:  # the model finds the last token with it
            self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, prompts: list[Prompt], completions: list[Prompt], **columns) -> list[float]:
        """Returns one score for each of B prompts and completions.

        Raises:
            ValueError: prompts are chats, but the tokenizer has no chat template.
        """
        if torch.cuda.is_available():  # the device of a rank is unknown before training starts
            self.model.to(torch.cuda.current_device())
        texts, scores = list(map(self._text, prompts, completions)), []
        for start in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(
                texts[start : start + self.batch_size],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            ).to(self.model.device)
            scores += self.model(**inputs).logits[:, 0].float().tolist()
        return scores

    def _text(self, prompt, completion):
        if isinstance(prompt, str):
            return prompt + completion
        if self.tokenizer.chat_template is None:
            raise ValueError(f"reward model {self.__name__} has no chat template for chat prompts")
        return self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
