"""Chat prompts to tokens, with arguments of the tokenizer's chat template."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_fused.checks import nearest
from grpo_fused.trainer.run.errors import shorten

COLUMN = "chat_template_kwargs"  # of a row, and the option of this name
RESERVED = (  # arguments of `apply_chat_template` that the sampler sets, or whose result it reads
    *("add_generation_prompt", "continue_final_message", "conversation", "max_length", "padding"),
    *("return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "truncation"),
    "tokenizer_kwargs",
)
OF_TOKENIZER = ("chat_template", "documents", "sanitize_control_tokens", "tools")


def check_template_kwargs(arguments: Any) -> None:
    """Checks `chat_template_kwargs`, of the config or of a row.

    Raises:
        ValueError: no mapping; a name that the sampler needs itself.
    """
    if not isinstance(arguments, dict):
        raise ValueError(f"{COLUMN} must be a mapping, got {arguments!r}")
    for name in arguments:
        if name in RESERVED:
            raise ValueError(
                f"{COLUMN}: {name} is set by the trainer: prompts are tokenized without padding, "
                "a last turn of the assistant is continued, and any other is answered"
            )


def merge_template_kwargs(settings: dict[str, Any], row: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the arguments of the config with those of a row, which take precedence.

    An entry of None is as none: a table of Arrow has one wherever another row has an entry.

    Raises:
        ValueError: those of the row are no mapping, or have a name that the sampler needs itself.
    """
    if row is None:
        return settings
    check_template_kwargs(row)
    return settings | {name: value for name, value in row.items() if value is not None}


def check_template(tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any]) -> None:
    """Checks that a chat template reads its arguments; Jinja ignores any other.

    Raises:
        ValueError: the tokenizer has no template; the template does not mention an argument.
    """
    template = arguments.get("chat_template") or tokenizer.chat_template
    if template is None:
        raise ValueError(
            f"{COLUMN} must be empty, because the tokenizer has no chat template, got {arguments}"
        )
    if isinstance(template, dict):  # several, by name
        template = "\n".join(template.values())
    words = set(re.findall(r"\w+", template))
    for name in arguments:
        if name not in words and name not in OF_TOKENIZER:
            raise ValueError(
                f"{COLUMN}: the chat template does not read {name}{nearest(name, words)}"
            )


def last_turn(messages: list[dict[str, Any]]) -> dict[str, bool]:
    """Returns arguments of `apply_chat_template` that continue a last turn of the assistant."""
    continues = bool(messages) and messages[-1].get("role") == "assistant"
    return {"add_generation_prompt": not continues, "continue_final_message": continues}


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], arguments: dict[str, Any]
) -> list[int]:
    """Tokenizes a chat; a last turn of the assistant is continued, any other answered.

    Raises:
        ValueError: the tokenizer has no template; the template does not mention an argument.
    """
    if arguments:
        check_template(tokenizer, arguments)
    elif tokenizer.chat_template is None:
        raise ValueError(
            "prompt must be text, because the tokenizer has no chat template (system_prompt makes "
            f"a chat of a text), got {shorten(messages)}"
        )
    return tokenizer.apply_chat_template(
        messages,
        **last_turn(messages),
        tokenize=True,
        return_dict=True,
        **arguments,
    )["input_ids"]
