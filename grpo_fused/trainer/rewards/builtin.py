"""Built-in reward functions, which a config refers to by name."""

import os
import re

from grpo_fused.trainer.rewards.math_process import math_process


def text_of(completion) -> str:
    """Returns the text of a completion; of a chat, the content of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact_match(completions, answer, **columns) -> list[float]:
    """Returns 1 where a completion equals the column `answer` up to surrounding space, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(text_of(text).strip() == str(right).strip()) for text, right in pairs]


def math_verify(completions, answer, **columns) -> list[float | None]:
    r"""Returns 1 where the final answer of a completion equals the column `answer`, else 0.

    The package math-verify parses both: `1/2`, `0.5` and `\boxed{\frac{1}{2}}` are equal. In a
    GSM8K answer only the part after `####` counts. The reward is None where the column cannot be
    parsed. A process of its own does it, with a limit of time for each answer, so that it works in
    any thread, and no answer stops a run.

    Raises:
        ImportError: math-verify cannot be imported.
    """
    process = math_process(os.getpid())
    golds = [_gold(right) for right in answer]
    known = {gold: bool(gold) and process.ask(gold) for gold in dict.fromkeys(golds)}
    pairs = list(zip(golds, map(text_of, completions), strict=True))
    tasks = [pair for pair in dict.fromkeys(pairs) if known[pair[0]]]  # each once
    scores = {task: float(process.ask(*task)) for task in tasks}
    return [scores.get(pair) for pair in pairs]


def _gold(answer):
    gold = str(answer).rpartition("####")[2].strip()
    # Without dollars only a part of LaTeX is parsed; with them, prose becomes a product.
    return f"${gold}$" if re.search(r"[\\^_(]", gold) else gold


def reasoning_gym(completions, entry, **columns) -> list[float]:
    """Returns the scores that a reasoning-gym task gives; `load_rows` made the column `entry`."""
    from reasoning_gym import get_score_answer_fn

    scores = []
    for completion, one in zip(completions, entry, strict=True):
        score = get_score_answer_fn(one["metadata"]["source_dataset"])
        scores.append(float(score(text_of(completion).strip(), one)))
    return scores


for function in (exact_match, math_verify, reasoning_gym):
    function.pure = True  # type: ignore[attr-defined]
BUILTIN = {function.__name__: function for function in (exact_match, math_verify, reasoning_gym)}
PACKAGES = {"math_verify": "math-verify", "reasoning_gym": "reasoning-gym"}  # to install, by name
