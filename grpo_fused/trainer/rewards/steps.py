"""The steps of a completion: where a separator ends them, in text and in tokens."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a tokenizer decodes a part of a character to
CHARACTER_LENGTH = 4  # bytes, and so tokens, of the longest character in UTF-8


class Step(NamedTuple):
    """A step of a completion.

    Attributes:
        end_token: index of its last token in the completion.
        text: of the step, without separator.
    """

    end_token: int
    text: str


def split_steps(
    completion_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, separator: str
) -> list[Step]:
    """Splits a completion into steps that end with a separator.

    A step ends at the token with the last character of its separator, which may also be the first
    of the next step. Steps without text are none: "a\\n\\nb\\n" has two steps. The last step ends
    with the completion, whatever follows its text; a completion without any text is one step.

    Args:
        completion_ids: tokens of the policy, its end token included.
        tokenizer: of the policy.
        separator: text, or the name of a special token; other special tokens have no text.

    Returns:
        At least one step, unless the completion has no tokens.
    """
    if not completion_ids:
        return []
    texts = list(token_texts(completion_ids, tokenizer, separator))
    lengths = list(accumulate(map(len, texts)))  # of the text up to each token, in characters
    steps, stop = [], 0
    for text in "".join(texts).split(separator):
        stop += len(text) + len(separator)
        if text.strip():
            steps.append(Step(bisect_left(lengths, stop), text))
    last_text = steps.pop().text if steps else ""
    return [*steps, Step(len(completion_ids) - 1, last_text)]


def token_texts(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, separator: str
) -> Iterator[str]:
    """Yields the text that each token adds, "" for special tokens other than the separator.

    The token that completes a character has all of it. Tokens are decoded behind the one before,
    because some tokenizers drop the space in front of a first token.
    """
    is_special = separator in tokenizer.all_special_tokens
    separator_id = tokenizer.convert_tokens_to_ids(separator) if is_special else None
    start = done = 0  # the first token to decode, and the first whose text is not known
    known = ""  # text of the tokens between
    for i, token in enumerate(ids):
        text = tokenizer.decode(ids[start : i + 1], skip_special_tokens=True)
        if text.endswith(UNFINISHED) and i + 1 - done < CHARACTER_LENGTH:
            yield ""
            continue
        yield separator if token == separator_id else text[len(known) :]
        start, done = done, i + 1
        known = tokenizer.decode(ids[start:done], skip_special_tokens=True)
