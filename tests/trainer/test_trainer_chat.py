"""Arguments of the chat template, of the config and of rows."""

import pytest
import torch
from trainer_runs import RewardScores, trainer_of

from grpo_fused import GRPOTrainerConfig
from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.collect import collect
from grpo_fused.trainer.rollouts.sampler import Sampler
from grpo_fused.trainer.run.options import load_options


def sampler_of(tokenizer=None, **options):
    tokenizer = tokenizer or make_tokenizer()
    options = {"max_completion_length": 5, "report_to": [], **options}
    return Sampler(tokenizer, make_model(tokenizer), GRPOTrainerConfig(**options))


THINKING = "".join(
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% if enable_thinking is defined and enable_thinking is false %}0{% endif %}",
        "{% if level is defined %}{{ level + 1 }}{% endif %}",
        "{% if add_generation_prompt %}={% endif %}",
    ]
)


def thinking_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = THINKING
    return tokenizer


def test_arguments_of_the_chat_template():
    """Booleans and numbers arrive as such; those of a row take precedence, one by one."""
    chat, tokenizer = [{"role": "user", "content": "1"}], thinking_tokenizer()
    rows = [
        None,
        {},
        {"enable_thinking": True},
        {"level": 4},
        {"level": 5, "enable_thinking": None},
    ]

    def texts(**options):
        sampler = sampler_of(tokenizer, **options)
        ids = sampler.encode([chat] * 5, {"chat_template_kwargs": rows})
        assert sampler.encode([chat]) == [ids[0]], "without the column"
        return tokenizer.batch_decode(ids)

    assert texts() == ["1=", "1=", "1=", "15=", "16="]
    both = {"enable_thinking": False, "level": 1}
    assert texts(chat_template_kwargs=both) == ["102=", "102=", "12=", "105=", "106="]
    given = {"chat_template": "{{ messages[0].content }}{{ level }}"}
    sampler = sampler_of(make_tokenizer(), chat_template_kwargs=given)
    ids = sampler.encode([chat], {"chat_template_kwargs": [{"level": 7}]})
    assert tokenizer.batch_decode(ids) == ["17"]


def test_rows_with_arguments_of_the_chat_template(tmp_path):
    """From the data to a rollout, an evaluation, and a rollout_fn without prompt_ids."""
    chat = [{"role": "user", "content": "1"}]
    rows = [{"prompt": chat, "answer": "1", "chat_template_kwargs": {"level": 3}}] * 4
    options = {
        "data": rows,
        "tokenizer": thinking_tokenizer(),
        "chat_template_kwargs": {"level": 1},
    }
    options |= {"eval_data": rows[:1], "eval_steps": 1, "max_steps": 1}
    trainer, _ = trainer_of(tmp_path, rewards=constant, **options)
    encoded = []
    encode = trainer.sampler.encode
    trainer.sampler.encode = lambda *given: encoded.append(encode(*given)) or encoded[-1]
    trainer.train()
    expected = make_tokenizer()("14=")["input_ids"]
    assert encoded == [[expected], [expected] * 16, [expected]]
    options["rollout_fn"] = lambda prompts, trainer: {"completion_ids": [[4]] * 16}
    batch = collect(trainer_of(tmp_path, rewards=constant, **options)[0]).batch
    assert batch.prompt_ids.tolist() == [expected] * 16


def constant(prompts, completions, completion_ids, columns):
    return RewardScores(torch.zeros(len(prompts)), {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenize": False}, "chat_template_kwargs: tokenize is set by the trainer"),
        ({"add_generation_prompt": False}, "add_generation_prompt is set by the trainer"),
        ({"enable_thinkng": True}, r"read enable_thinkng \(did you mean enable_thinking\?\)"),
        ("{level: 1}", "chat_template_kwargs must be a mapping"),
        (1, "chat_template_kwargs must be a mapping"),
    ],
)
def test_arguments_of_a_chat_template_are_checked(arguments, message):
    chat, tokenizer = [{"role": "user", "content": "1"}], thinking_tokenizer()
    with pytest.raises(ValueError, match=message):
        sampler_of(tokenizer).encode([chat], {"chat_template_kwargs": [arguments]})
    with pytest.raises(ValueError, match=message if isinstance(arguments, dict) else "mapping"):
        sampler_of(tokenizer, chat_template_kwargs=arguments)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        sampler_of(chat_template_kwargs={"level": 1})


def test_values_of_a_mapping_are_typed_by_yaml(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "chat_template_kwargs: {enable_thinking: false, level: 3}\n"
        "generation_kwargs: {min_new_tokens: 4, typical_p: 0.9, suppress_tokens: [1, 2]}\n"
        "stop_strings: [</answer>, no]\n"
    )
    given = ["--generation_kwargs.use_cache", "false", "--chat_template_kwargs.level", "4"]
    config = load_options(GRPOTrainerConfig, tmp_path / "config.yaml", given)
    assert config.chat_template_kwargs == {"enable_thinking": False, "level": 4}
    wanted = {"min_new_tokens": 4, "typical_p": 0.9, "suppress_tokens": [1, 2], "use_cache": False}
    assert config.generation_kwargs == wanted
    assert config.stop_strings == ["</answer>", "no"]
