"""Where rewards come from: functions by path, ready ones, reward models."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from grpo_fused.checks import nearest


def text_of(completion) -> str:
    """The text of a completion: itself, or the content of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact_match(completions, answer, **columns) -> list[float]:
    """1 where the completion is the column `answer`, but for space around them, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(text_of(text).strip() == str(right).strip()) for text, right in pairs]


def math_verify(completions, answer, **columns) -> list[float | None]:
    r"""1 where the completion's final answer equals the column `answer`, as math-verify reads both.

    `1/2`, `0.5` and `\boxed{\frac{1}{2}}` are equal. Of a GSM8K answer only what stands behind
    `####` counts. None where the answer cannot be read. Needs the package math-verify.
    """
    from math_verify import parse, verify

    scores = []
    for completion, right in zip(completions, answer, strict=True):
        gold = str(right).rpartition("####")[2].strip()
        # Only between dollars is LaTeX read whole, and without them prose is no product.
        gold = parse(f"${gold}$" if re.search(r"[\\^_(]", gold) else gold)
        scores.append(float(verify(gold, parse(text_of(completion)))) if gold else None)
    return scores


def reasoning_gym(completions, entry, **columns) -> list[float]:
    """What the task of reasoning-gym, whose rows `load_rows` made, gives a completion."""
    from reasoning_gym import get_score_answer_fn

    scores = []
    for completion, one in zip(completions, entry, strict=True):
        score = get_score_answer_fn(one["metadata"]["source_dataset"])
        scores.append(float(score(text_of(completion).strip(), one)))
    return scores


READY = {one.__name__: one for one in (exact_match, math_verify, reasoning_gym)}
NEEDS = {"math_verify": "math-verify", "reasoning_gym": "reasoning-gym"}  # module, package


class RewardModel:
    """The score that a sequence classifier of transformers with one label gives.

    Args:
        path: folder or Hub name; its tokenizer lies there too.
        batch_size: texts scored at once.

    Raises:
        ValueError: more labels than one; a chat prompt, but no chat template.
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
        if self.model.config.pad_token_id is None:  # it finds the last token by it
            self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, prompts, completions, **columns) -> list[float]:
        """One score per prompt and completion, B of each."""
        if torch.cuda.is_available():  # which device is a rank's is not known before training
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


def find_reward(name: str) -> Callable:
    """The reward that a config names.

    Args:
        name: "path.py:function", "package.module:function", a name of READY, or the folder of a
            reward model.

    Raises:
        ValueError: nothing of that name, with what is there; a file that cannot be imported.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon:
        if name in READY:
            if name in NEEDS and importlib.util.find_spec(name) is None:
                package = NEEDS[name]
                raise ValueError(f"rewards: {name} needs {package}: pip install {package}")
            return READY[name]
        if (Path(name) / "config.json").is_file():
            return RewardModel(name)
        raise ValueError(
            f"rewards: {name!r} is neither path.py:function, package.module:function, a folder "
            f"of a reward model, nor one of {', '.join(READY)}{nearest(name, READY)}"
        )
    module = _import_file(source) if source.endswith(".py") else _import_module(source)
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(
            f"rewards: {source} has no function {attribute}{nearest(attribute, names)}"
        )
    return function


def _import_file(path):
    if not Path(path).is_file():
        raise ValueError(f"rewards: there is no file {path}")
    resolved = Path(path).resolve()
    name = f"rewards_of_{resolved.stem}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(
            f"rewards: {path} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    return module


def _import_module(name):
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"rewards: module {name} cannot be imported ({type(error).__name__}: {error})"
        ) from error
