"""Reward models: scores of completions and of steps, and folders that hold none."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trainer_runs import trainer_of
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

from grpo_fused import GRPOTrainerConfig
from grpo_fused.trainer.collect import collect
from grpo_fused.trainer.rewards import Rewards
from grpo_fused.trainer.rewards.lookup import find_reward
from grpo_fused.trainer.rewards.reward_model import RewardModel, StepRewardModel
from grpo_fused.trainer.rewards.steps import split_steps

TEMPLATE = "{% for m in messages %}[{{ m.role[0] }}:{{ m.content }}]{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[a:{% endif %}"


def character_tokenizer(extra=(), merges=(), **special):
    """One token per character of the tests' texts, after the special tokens and `extra`.

    Of the pairs of characters in `merges`, which `extra` has joined, it makes one token.
    """
    names = ["<pad>", "<eos>", *special.get("additional_special_tokens", ()), *extra]
    characters = [c for c in "\n 0123456789?=abcdexyz.,[]u:" if c not in names]
    vocab = {token: i for i, token in enumerate([*names, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if merges:
        tokenizer = Tokenizer(models.BPE(vocab, list(merges)))
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


# Tokens of the policy, some of which reach over the end of a step.
PIECES = ["a\n", "\nb", "\n\n", "c\n\nd", "e.", "1=2"]
POLICY = character_tokenizer(PIECES)


def ids_of(*tokens, tokenizer=POLICY):
    found = tokenizer.convert_tokens_to_ids(list(tokens))
    assert tokenizer.unk_token_id not in found
    return found


@pytest.mark.parametrize(
    "tokens, expected",
    [
        (["a", "\n", "b", "<eos>"], [(1, "a"), (3, "b")]),
        (["a\n", "b", "\n", "<eos>"], [(0, "a"), (3, "b")]),
        (["a", "\nb", "\n", "c"], [(1, "a"), (2, "b"), (3, "c")]),  # cut off in its last step
        (["c\n\nd", "\n", "e."], [(0, "c"), (1, "d"), (2, "e.")]),
        (["a", "\n\n", "b", "\n\n"], [(1, "a"), (3, "b")]),  # empty steps
        (["\n", "\n", "a", "\n", " ", "\n", "b"], [(3, "a"), (6, "b")]),
        (["a", "\n", "\n", " ", "<eos>"], [(4, "a")]),  # the last one has all that follows
        (["c\n\nd"], [(0, "c"), (0, "d")]),
        (["<eos>"], [(0, "")]),
        (["\n", "\n"], [(1, "")]),
        ([], []),
    ],
)
def test_steps_end_at_separators(tokens, expected):
    assert split_steps(ids_of(*tokens), POLICY, "\n") == expected


def test_separators_of_several_characters_and_of_several_tokens():
    ids = ids_of("a", "\n", "\n", "b", "\n\n", "\nb", "e.")
    assert split_steps(ids, POLICY, "\n\n") == [(2, "a"), (4, "b"), (6, "\nbe.")]
    assert split_steps(ids, POLICY, "b") == [(3, "a\n\n"), (6, "e.")]  # the blank one is none


def test_a_separator_that_is_a_special_token():
    tokenizer = character_tokenizer(additional_special_tokens=["<step>", "<think>"])
    ids = ids_of("a", "<think>", "<step>", "<step>", "b", "<step>", "<eos>", tokenizer=tokenizer)
    assert split_steps(ids, tokenizer, "<step>") == [(2, "a"), (6, "b")]


def test_characters_of_several_tokens():
    """Byte-level tokens: a step ends with the byte that completes its last character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = tokenizer("\u00e9\u20acb\u20ac x")["input_ids"]
    assert split_steps(ids, tokenizer, "\u20ac") == [(4, "\u00e9"), (8, "b"), (10, " x")]
    broken = [*tokenizer("a\n")["input_ids"], *ids[:1] * 6]  # never completed
    assert [step.end_token for step in split_steps(broken, tokenizer, "\n")] == [1, 7]


def test_the_space_that_a_tokenizer_drops_in_front():
    vocab = {token: i for i, token in enumerate(["\u2581a", "\u2581b", "\n", "<pad>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert tokenizer.decode([0, 1, 2, 1]) == "a b\n b"
    assert split_steps([0, 1, 2, 1, 1], tokenizer, "\n") == [(2, "a b"), (4, " b b")]


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "pad_token_id": 0}


def save_model(folder, kind, tokenizer, **options):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), **options)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # scores of 1, not of the usual 0.02
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


class State:
    """A `trainer_state` of the policy."""

    tokenizer, step_separator = POLICY, "\n"


PROMPTS = ["1=", "2?3="]
IDS = [ids_of("c\n\nd", "\n", "e.", "<eos>"), ids_of("1=2", "\nb")]
TEXTS = [["c", "d", "e."], ["1=2", "b"]]
ENDS = [[0, 1, 3], [1, 1]]  # the first step of "1=2\nb" ends within the last token


@pytest.mark.parametrize("num_labels", [1, 2])
def test_scores_of_steps(tmp_path, num_labels):
    """Read from the model one prefix at a time, in its own tokens, as TRL prepares them."""
    own = character_tokenizer(
        ["c\n", ".\n"],
        [("c", "\n"), (".", "\n")],  # only where a step is not tokenized on its own
        additional_special_tokens=["<s>"],
        bos_token="<s>",
    )
    assert own.tokenize("c\nd") == ["c\n", "d"]
    model = save_model(tmp_path / "prm", LlamaForTokenClassification, own, num_labels=num_labels)
    reward = find_reward(str(tmp_path / "prm"))
    assert isinstance(reward, StepRewardModel)
    reward.batch_size = 1 + num_labels  # a batch of one and a rest; a padded batch
    found = reward(PROMPTS, IDS, State)
    for prompt, texts, ends, steps in zip(PROMPTS, TEXTS, ENDS, found, strict=True):
        assert [end for end, _ in steps] == ends
        read = "<s>" + prompt
        for text, (_, score) in zip(texts, steps, strict=True):
            read += text + "\n"
            ids = own.convert_tokens_to_ids(["<s>", *read.removeprefix("<s>")])
            logits = model(torch.tensor([ids])).logits[0, -1].tolist()
            wanted = logits[0]
            if num_labels == 2:
                wanted = 1 / (1 + math.exp(logits[0] - logits[1]))
            assert score == pytest.approx(wanted, abs=1e-5)
    assert len({score for steps in found for _, score in steps}) == 5
    assert reward(PROMPTS[:1], [[]], State) == [None]


def test_steps_of_chats(tmp_path):
    """The reward model's template, up to where the assistant begins, or goes on."""
    own = character_tokenizer()
    own.chat_template = TEMPLATE
    model = save_model(tmp_path / "prm", LlamaForTokenClassification, own, num_labels=1)
    reward = StepRewardModel(str(tmp_path / "prm"))
    user = [{"role": "user", "content": "1=?"}]
    prompts = [user, [*user, {"role": "assistant", "content": "2,"}]]
    for prompt, text in zip(prompts, ("[u:1=?][a:", "[u:1=?][a:2,"), strict=True):
        ids = own(f"{text}b\nc\n")["input_ids"]
        logits = model(torch.tensor([ids])).logits[0, :, 0]
        (found,) = reward([prompt], [ids_of("b", "\n", "c")], State)
        assert found == [(1, pytest.approx(logits[-3].item(), abs=1e-5)),
                         (2, pytest.approx(logits[-1].item(), abs=1e-5))]  # fmt: skip
    own.chat_template = None
    own.save_pretrained(tmp_path / "prm")
    (tmp_path / "prm" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="prm has no chat template for chat prompts"):
        StepRewardModel(str(tmp_path / "prm"))([user], [[4]], State)
    with pytest.raises(ValueError, match="prm needs the tokenizer of a trainer's policy, got None"):
        reward([user], [[4]], None)


def advantages_by_hand(rewards, scale=True):
    """DeepSeekMath, section 4.1.3, of one group: {end: reward} lists to {token: advantage}."""
    values = [score for steps in rewards for _, score in steps]
    mean = sum(values) / len(values)
    std = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
    divisor = std + 1e-4 if scale else 1.0
    return [
        lambda t, steps=steps: sum((score - mean) / divisor for end, score in steps if end >= t)
        for steps in rewards
    ]


def test_process_supervision_by_a_reward_model_end_to_end(tmp_path):
    """From a folder's name to the advantage of every token, against a computation by hand.

    The policy's tokens straddle the separator "==", the reward model has one token per character.
    """
    separator = "=="
    pieces = ["a=", "==", "=b", "c==d"]
    policy = character_tokenizer(pieces)
    own = character_tokenizer()
    model = save_model(tmp_path / "prm", LlamaForTokenClassification, own, num_labels=1)
    completions = [
        (["a=", "=b", "==", "c", "<eos>"], [("a", 1), ("b", 2), ("c", 4)]),
        (["c==d"], [("c", 0), ("d", 0)]),
        (["a", "==", "==", "<eos>"], [("a", 3)]),
        (["=b", "==", "c==d", "=b"], [("=b", 1), ("c", 2), ("d=b", 3)]),
    ]

    def sampled(prompts, trainer):
        ids = [ids_of(*tokens, tokenizer=policy) for tokens, _ in completions]
        return {"completion_ids": ids * (len(prompts) // 4)}

    torch.manual_seed(1)
    language_model = LlamaForCausalLM(
        LlamaConfig(**SIZES, vocab_size=len(policy), eos_token_id=1, max_position_embeddings=64)
    )
    trainer, _ = trainer_of(
        tmp_path / "run",
        rewards=Rewards(str(tmp_path / "prm")),
        model=language_model,
        tokenizer=policy,
        data=[{"prompt": "1?2"}],
        rollout_fn=sampled,
        reward_step_separator=separator,
        max_completion_length=8,
        max_steps=1,
    )
    batch = collect(trainer).batch
    rewards = []
    for _, steps in completions:
        read, scored = "1?2", []
        for text, end in steps:
            read += text + separator
            ids = own.convert_tokens_to_ids(list(read))
            scored.append((end, model(torch.tensor([ids])).logits[0, -1, 0].item()))
        rewards.append(scored)
    for row, (expected, (tokens, _)) in enumerate(
        zip(advantages_by_hand(rewards), completions, strict=True)
    ):
        for t in range(len(tokens)):
            got = batch.advantages[row, t].item()
            assert got == pytest.approx(expected(t), abs=1e-4), (row, t)
        assert (batch.advantages[row, len(tokens) :] == 0).all()
    assert trainer.train().step == 1


def test_a_sequence_classifier_scores_completions(tmp_path):
    own = character_tokenizer()
    model = save_model(tmp_path / "one", LlamaForSequenceClassification, own, num_labels=1)
    prompts, completions = ["1?2=", "3?4=", "5?6="], ["2", "3", "66"]
    scores = Rewards(str(tmp_path / "one"))(prompts, completions, [[4]] * 3, {}).each["one"]
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        ids = own(prompt + completion, return_tensors="pt")["input_ids"]
        assert model(ids).logits.item() == pytest.approx(score.item(), abs=1e-5)
    with pytest.raises(RuntimeError, match="one has no chat template for chat prompts"):
        Rewards(str(tmp_path / "one"))([[{"role": "user", "content": "1"}]], [[]], [[1]], {})


@pytest.mark.parametrize(
    "kind, num_labels, message",
    [
        (LlamaForSequenceClassification, 2, "reward model .* must have one label, got 2"),
        (LlamaForTokenClassification, 3, "step reward model .* one or two labels, got 3"),
        (LlamaForCausalLM, 1, "must be a model ForSeq.* or ForTok.*, got LlamaForCausalLM"),
    ],
)
def test_folders_that_hold_no_reward_model(tmp_path, kind, num_labels, message):
    save_model(tmp_path, kind, character_tokenizer(), num_labels=num_labels)
    with pytest.raises(ValueError, match=message):
        find_reward(str(tmp_path))


@pytest.mark.parametrize(
    "wrapper, kind",
    [(RewardModel, LlamaForTokenClassification), (StepRewardModel, LlamaForSequenceClassification)],
)
def test_a_classifier_of_the_other_kind(tmp_path, wrapper, kind):
    """transformers would load the weights that fit."""
    save_model(tmp_path, kind, character_tokenizer(), num_labels=1)
    with pytest.raises(ValueError, match=f"must be a model For.*, got {kind.__name__}"):
        wrapper(str(tmp_path))


def test_a_classifier_that_nobody_trained(tmp_path):
    """transformers would draw its weights at random."""
    save_model(tmp_path, LlamaForCausalLM, character_tokenizer(), num_labels=1)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trained classifier, but its weights lack score.weight"):
        RewardModel(str(tmp_path))


def test_a_folder_that_does_not_say_what_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="got no architectures in its config.json"):
        find_reward(str(tmp_path))


def test_an_empty_separator():
    with pytest.raises(ValueError, match="reward_step_separator must not be empty, got ''"):
        GRPOTrainerConfig(reward_step_separator="")
