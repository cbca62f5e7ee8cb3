"""What is checked on the first row before training, and what is said of prompts."""

import pytest
from trainer_runs import ROWS, stream_of, trainer_of

from grpo_fused.demo import make_tokenizer
from grpo_fused.trainer.rewards import Rewards

CHAT = [{"prompt": [{"role": "user", "content": "3?4="}], "answer": "4"}] * 4


def right(completions, solution):
    return [float(text == one) for text, one in zip(completions, solution, strict=True)]


def test_a_column_that_a_reward_requires(tmp_path):
    """It is missed when the trainer is made; a rollout_fn or a stream may still bring it."""
    message = "reward right requires solution, which is not a column of the data; available are ans"
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, rewards=Rewards(right))
    rows = [row | {"solution": row["answer"]} for row in ROWS]
    mixed = [*ROWS[:1], *rows]  # a column of other rows than the first
    for options in (
        {"data": rows},
        {"data": mixed},
        {"rollout_fn": lambda *_: {}},
        {"data": stream_of(ROWS)},
    ):
        trainer_of(tmp_path, rewards=Rewards(right), **options)


def test_a_default_is_no_requirement(tmp_path):
    trainer_of(tmp_path, rewards=Rewards(lambda completions, solution=None: [1.0] * 4))


def test_a_chat_without_a_template(tmp_path):
    message = "prompt must be text, because the tokenizer has no chat template"
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, data=CHAT)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    trainer_of(tmp_path, data=CHAT, tokenizer=tokenizer)


def test_text_that_the_tokenizer_does_not_know(tmp_path, recwarn):
    """Said once, with the first such prompt."""
    trainer, _ = trainer_of(tmp_path)
    assert not [one for one in recwarn if "does not know" in str(one.message)]
    with pytest.warns(UserWarning, match=r"does not know .* reads them as <pad>: .*3\+4="):
        trainer.sampler.encode(["3?4=", "3+4=", "hello"])
    recwarn.clear()
    trainer.sampler.encode(["3-4="])
    assert not recwarn.list
