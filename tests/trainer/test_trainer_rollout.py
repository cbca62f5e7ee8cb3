"""Rollouts: prompts to completions, masks and log-probabilities; rejected prompts and outputs."""

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import MODELS, tiny
from trainer_runs import EOS, ROWS, RewardScores, partial_credit, scored, trainer_of

from grpo_fused import GRPOTrainerConfig, rollout_weights
from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.collect import collect
from grpo_fused.trainer.experience import Batch, collate
from grpo_fused.trainer.policy import Policy, prepare_model
from grpo_fused.trainer.rollouts.rollout import Rollout, pad
from grpo_fused.trainer.rollouts.sampler import Sampler

PAD = 0


def sampler_of(tokenizer=None, model=None, **options):
    tokenizer = tokenizer or make_tokenizer()
    model = model or make_model(tokenizer)
    options = {"max_completion_length": 5, "report_to": [], **options}
    return Sampler(tokenizer, model, GRPOTrainerConfig(**options)), model


def rollout_of(prompt_ids, completion_ids, **options):
    given = dict(truncated=[ids[-1:] != [EOS] for ids in completion_ids], logprobs=None)
    given |= dict(completion_mask=None, columns={})
    return Rollout(["1?2="] * len(prompt_ids), prompt_ids, completion_ids, **{**given, **options})


def test_prompts_are_padded_left_and_completions_right():
    rollout = rollout_of([[5], [6, 7, 8]], [[9, EOS], [4, 5, 6]])
    batch = collate(rollout, PAD, mask_truncated_completions=False)
    assert batch.prompt_ids.tolist() == [[PAD, PAD, 5], [6, 7, 8]]
    assert batch.prompt_mask.tolist() == [[False, False, True], [True] * 3]
    assert batch.completion_ids.tolist() == [[9, EOS, PAD], [4, 5, 6]]
    assert batch.completion_mask.tolist() == [[True, True, False], [True] * 3]
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1, 1, 0], [1] * 6]

    masked = collate(rollout, PAD, mask_truncated_completions=True)
    assert masked.completion_mask.tolist() == [[True, True, False], [False] * 3]
    assert torch.equal(masked.attention_mask, batch.attention_mask), "attended, yet not trained on"
    rollout.completion_mask = [[1, 0], [0, 1, 1]]
    partly = collate(rollout, PAD, mask_truncated_completions=False)
    assert partly.completion_mask.tolist() == [[True, False, False], [False, True, True]]


def test_empty_completions_have_a_column():
    values, mask = pad([[], []], 7)
    assert values.tolist() == [[7], [7]] and not mask.any()


def test_a_completion_ends_at_its_first_end_token():
    sampler, model = sampler_of()
    model.generation_config.eos_token_id = [3, EOS]
    sampler = sampler_of(model=model)[0]
    assert sampler.eos_ids == [EOS, 3]
    assert sampler.cut_at_eos([5, 3, EOS, 5]) == [5, 3]
    assert sampler.cut_at_eos([5, 6]) == [5, 6]
    assert [sampler.is_truncated(ids) for ids in ([5, 3], [5, EOS], [5], [])] == [0, 0, 1, 1]
    for ids in sampler.generate(model, sampler.encode(["1?2="] * 64), temperature=1.0):
        assert not {EOS, 3} & set(ids[:-1]) and 1 <= len(ids) <= 5
        assert len(ids) == 5 or ids[-1] in (EOS, 3)
    ids = sampler.encode(["1?2="] * 64)
    shorter = sampler.generate(model, ids, temperature=1.0, max_new_tokens=2)
    assert max(map(len, shorter)) == 2, "max_completion_length is 5"


def test_the_batch_size_of_sampling_changes_no_greedy_completion():
    sampler, model = sampler_of()
    ids = sampler.encode([row["prompt"] for row in ROWS[:5]])
    whole = sampler.generate(model, ids, temperature=0)
    assert sampler.generate(model, ids, temperature=0, batch_size=2) == whole
    assert model.generation_config.max_new_tokens == 2 and model.training


@pytest.mark.parametrize("adapted", [False, True])
def test_sampling_uses_the_settings_of_the_config_not_the_model(adapted):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.generation_config.update(top_k=1, repetition_penalty=9.0, temperature=0.01)
    sampler, _ = sampler_of(tokenizer, model)
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    prompts = sampler.encode(["1?2="] * 32)
    assert len({ids[0] for ids in sampler.generate(model, prompts, temperature=1.0)}) > 5
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        narrow, _ = sampler_of(tokenizer, make_model(tokenizer), **options)
        completions = narrow.generate(model, prompts, temperature=1.0)
        assert completions == sampler.generate(model, prompts, temperature=0)
    assert model.generation_config.repetition_penalty == 9.0


def test_prompts_as_text_and_as_messages():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "".join(
        [
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "{% if add_generation_prompt %}={% endif %}",
        ]
    )
    sampler, _ = sampler_of(tokenizer)
    message = [{"role": "user", "content": "1?"}, {"role": "user", "content": "2"}]
    assert sampler.encode([message]) == sampler.encode(["1?2="])
    begun = [{"role": "user", "content": "1?2"}, {"role": "assistant", "content": "=1"}]
    assert sampler.encode([begun]) == sampler.encode(["1?2=1"]), "goes on with its last turn"

    seen = {}

    def rewards(prompts, completions, completion_ids, columns):
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return RewardScores(torch.arange(16.0), {})

    rows = [{"prompt": message, "level": i} for i in range(4)]
    rows[2]["answer"] = "2"  # the others have none
    trainer, _ = trainer_of("unused", rewards=rewards, data=rows, tokenizer=tokenizer)
    collect(trainer)
    assert seen["prompts"] == [message] * 16
    assert all(c[0]["role"] == "assistant" and len(c) == 1 for c in seen["completions"])
    levels, answers = seen["columns"]["level"], seen["columns"]["answer"]
    assert answers == ["2" if level == 2 else None for level in levels]
    assert [levels[i : i + 4] for i in range(0, 16, 4)] == [[i] * 4 for i in levels[::4]]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loss_input", ["hidden", "logits"])
def test_log_probabilities_do_not_depend_on_padding(name, loss_input):
    """Also where positions are absolute (gpt2) and logits scaled or capped."""
    config = GRPOTrainerConfig(loss_input=loss_input, temperature=0.7, report_to=[])
    model = tiny(name)
    prompts, completions = [[5, 6, 7], [8]], [[9, 10, 2], [11, 2]]
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion])
        logps = (model(ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        expected.append(logps.gather(1, ids[0, len(prompt) :, None])[:, 0])
    prepare_model(model, config)
    batch = collate(rollout_of(prompts, completions), PAD, False)
    logps = Policy(config, model).logps(model, batch)
    assert logps[1, 2] == 0
    torch.testing.assert_close(logps[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logps[1, :2], expected[1], rtol=1e-4, atol=1e-5)


def test_selected_rows_are_trimmed():
    ids, mask = torch.arange(12).view(3, 4), torch.ones(3, 4, dtype=torch.bool)
    batch = Batch(ids, mask, ids, mask, mask, advantages=torch.arange(3.0), old_logps=ids.float())
    part = batch.select(slice(1, 3), 2, 3)
    assert part.prompt_ids.tolist() == [[6, 7], [10, 11]]
    assert part.completion_ids.tolist() == part.old_logps.tolist() == [[4, 5, 6], [8, 9, 10]]
    assert part.advantages.tolist() == [1, 2] and part.ref_logps is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rollout_correction": "mask", "rollout_correction_cap": 1.5},
        {"rollout_correction_level": "sequence", "rollout_correction_floor": 0.1},
        {"rollout_correction": None},
    ],
)
def test_a_sampler_s_log_probabilities_become_weights(options):
    columns = {}

    def rewards(prompts, completions, completion_ids, given):
        columns.update(given)
        return partial_credit(prompts, completions, completion_ids, given)

    trainer, _ = trainer_of(
        "unused", rewards=rewards, rollout_fn=scored, max_completion_length=3, **options
    )
    batch = collect(trainer).batch
    assert columns["spent"] == [1.5] * 16 and "logprobs" not in columns
    if trainer.config.rollout_correction is None:
        assert batch.importance_sampling_ratio is None
        return
    expected = rollout_weights(
        trainer.policy.logps(trainer.model, batch),
        pad(scored([0] * 16, None)["logprobs"], 0.0, dtype=torch.float32)[0],
        batch.completion_mask,
        level=options.get("rollout_correction_level", "token"),
        mode=options.get("rollout_correction", "truncate"),
        cap=options.get("rollout_correction_cap", 3.0),
        floor=options.get("rollout_correction_floor"),
    )
    torch.testing.assert_close(batch.importance_sampling_ratio, expected, rtol=1e-5, atol=1e-6)
    assert expected.unique().numel() > 3


@pytest.mark.parametrize(
    "output, message",
    [
        ([[4]], r"rollout_fn must return a dict with completion_ids, .* got list \[\[4\]\]"),
        (None, "rollout_fn must return a dict with completion_ids, .* got None"),
        ({}, "rollout_fn must return a dict with completion_ids, .* got nothing"),
        ({"completion_ids": None}, "return a dict with completion_ids, .* got nothing"),
        ({"logprobs": []}, "rollout_fn must return a dict with completion_ids, .* got logprobs"),
        ({"completions_ids": []}, r"got completions_ids \(did you"),
        (
            dict.fromkeys(["completion_ids", "env_mask", "completion_mask"], [[1]] * 16),
            "either env_mask or completion_mask, got both",
        ),
        ({"completion_ids": [[4]]}, "completion_ids must have one entry per prompt, 16, got 1"),
        ({"completion_ids": 4}, "completion_ids must have one entry per prompt, 16, got 4"),
        ({"completion_ids": "2" * 16}, "completion_ids must have one entry per prompt, 16, got '2"),
        ({"completion_ids": {4: 4}}, "completion_ids must have one entry per prompt, .* got dict"),
        ({"completion_ids": torch.tensor(4)}, "completion_ids must have one entry per prompt"),
        (
            {"completion_ids": [[4]] * 16, "spent": 1.5},
            "rollout_fn: spent must have one entry per prompt, 16, got 1.5",
        ),
        *(
            (
                {"completion_ids": [[4]] * 15 + [ids]},
                rf"completion_ids of completion 15 must be token ids, .* \[0, 14\), got {got}",
            )
            for ids, got in (
                (None, "None"),
                (4, "4"),
                ("4", "'4'"),
                ([4, 1.0], "1.0 for token 1"),
                ([True], "True for token 0"),
                (["4"], "'4' for token 0"),
                ([None], "None for token 0"),
                ([[4]], r"list \[4\] for token 0"),
                ([4, 14], "14 for token 1"),
                ([-1], "-1 for token 0"),
                (numpy.array([0.5]), "0.5 for token 0"),
                (torch.tensor([4, 99]), "99 for token 1"),
            )
        ),
        (
            {"completion_ids": [[4]] * 16, "prompt_ids": [[4, 77]] * 16},
            r"prompt_ids of prompt 0 must be token ids, integers in \[0, 14\), got 77 for token 1",
        ),
        (
            {"completion_ids": [[4]] * 16, "logprobs": [[-1.0]] * 15 + [[None]]},
            "logprobs of completion 15 must be numbers, got None for token 0",
        ),
        (
            {"completion_ids": [[4]] * 16, "logprobs": [0.5] * 16},
            "logprobs of completion 0 must have one entry per token, 1, got 0.5",
        ),
        (
            {"completion_ids": [[4]] * 16, "env_mask": [[2]] * 16},
            r"completion_mask of completion 0 must be 0 or 1 for each token, got \[2\]",
        ),
        (
            {"completion_ids": [[4]] * 16, "truncated": ["False"] * 16},
            "truncated must be True or False, got",
        ),
        ({"completion_ids": [[4]] * 16, "prompt_ids": [[]] * 16}, "prompt_ids must not be empty"),
        (
            {"completion_ids": [[4, 4, 4]] * 16},
            "completion 0 must have at most .* = 2 tokens, got 3",
        ),
        (
            {"completion_ids": [[4]] * 16, "logprobs": [[0.0]] * 15 + [[]]},
            "logprobs of completion 15 must have one entry per token, 1, got 0",
        ),
    ],
)
def test_the_output_of_a_rollout_fn_is_checked(output, message):
    trainer, _ = trainer_of("unused", rollout_fn=lambda prompts, trainer: output)
    with pytest.raises(ValueError, match=message):
        collect(trainer)


def test_the_output_of_a_rollout_fn_must_fit_the_context():
    tokenizer = make_tokenizer()
    rows = {"prompt_ids": [[5] * 7] * 16, "completion_ids": [[5, 1]] * 16}
    trainer, _ = trainer_of(
        "unused", model=small_context(tokenizer), rollout_fn=lambda prompts, trainer: rows
    )
    with pytest.raises(ValueError, match="rollout_fn: .* context of 8, got 9 tokens"):
        collect(trainer)
    rows["prompt_ids"] = [[5] * 6] * 16
    assert collect(trainer).lengths == [(6, 2)] * 16


def small_context(tokenizer):
    model = make_model(tokenizer)
    model.config.max_position_embeddings = 8
    return model


def test_prompts_must_fit_the_context():
    tokenizer = make_tokenizer()
    model = small_context(tokenizer)
    sampler, _ = sampler_of(tokenizer, model)
    with pytest.raises(ValueError, match="prompt of 4 tokens leaves 4 of the model's context of 8"):
        sampler.encode(["1?2="])
    cut, _ = sampler_of(tokenizer, model, max_prompt_length=3)
    assert cut.encode(["1?2="]) == [make_tokenizer()("?2=")["input_ids"]]
    with pytest.raises(
        ValueError, match="max_completion_length: 9 tokens .* exceed the model's context of 8"
    ):
        sampler_of(tokenizer, model, max_prompt_length=4)
    with pytest.raises(ValueError, match="prompt must have at least one token, got ''"):
        cut.encode([""])
    with pytest.raises(ValueError, match="prompt must be a str or a list of messages, got 7"):
        cut.encode([7])


def test_a_tokenizer_without_padding_pads_with_its_end():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    trainer, _ = trainer_of("unused", tokenizer=tokenizer)
    batch = collect(trainer).batch
    assert trainer.sampler.pad_id == EOS
    ends = (batch.completion_ids == EOS) & batch.completion_mask
    assert (ends.sum(1) <= 1).all()


def test_a_tokenizer_without_an_end_is_an_error_unless_the_model_has_one():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    assert sampler_of(tokenizer, make_model(make_tokenizer()))[0].eos_ids == [EOS]
    with pytest.raises(ValueError, match="tokenizer has no eos_token"):
        sampler_of(tokenizer, make_model(tokenizer))


def test_optional_output_of_a_rollout_fn():
    """An entry may be None, and an array instead of a list."""
    output = {"completion_ids": [[4], [4, 1]] * 8, "logprobs": None, "prompt_ids": None}
    trainer, _ = trainer_of("unused", rollout_fn=lambda prompts, trainer: output)
    batch = collect(trainer).batch
    assert batch.sampling_logps is None and batch.completion_mask.sum() == 24
    output["env_mask"] = [[1], [1, 0]] * 8  # as TRL calls completion_mask
    assert collect(trainer).batch.completion_mask.sum() == 16
    del output["env_mask"]
    output["truncated"] = numpy.array([True, False] * 8)
    options = {"rollout_fn": lambda prompts, trainer: output, "mask_truncated_completions": True}
    assert collect(trainer_of("unused", **options)[0]).batch.completion_mask.sum() == 16


@pytest.mark.parametrize("kind", [torch.tensor, numpy.array, tuple])
def test_a_rollout_fn_may_return_tensors_and_arrays(kind):
    output = {"completion_ids": kind([[4, 1]] * 16), "logprobs": kind([[-1.0, -2.0]] * 16)}
    output |= {"prompt_ids": [kind([5, 6])] * 16, "completion_mask": kind([[True, False]] * 16)}
    trainer, _ = trainer_of("unused", rollout_fn=lambda prompts, trainer: output)
    batch = collect(trainer).batch
    assert batch.prompt_ids.tolist() == [[5, 6]] * 16
    assert batch.completion_ids.tolist() == [[4, 1]] * 16
    assert batch.sampling_logps.tolist() == [[-1, -2]] * 16
    assert batch.completion_mask.tolist() == [[True, False]] * 16
