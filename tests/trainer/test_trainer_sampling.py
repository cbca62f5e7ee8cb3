"""Sampling with more settings than the policy has: distributions, supports and stop strings."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trainer_runs import EOS, ROWS, RewardScores, partial_credit, trainer_of
from transformers import GenerationConfig, PreTrainedTokenizerFast

from grpo_fused import GRPOTrainerConfig, sampling_support
from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.collect import collect
from grpo_fused.trainer.rollouts import rollout as rollouts
from grpo_fused.trainer.rollouts.generation import KNOWN, LEAVES_OUT, REWEIGHTS
from grpo_fused.trainer.rollouts.recording import Notes, StopStrings
from grpo_fused.trainer.rollouts.rollout import expand_support, pad
from grpo_fused.trainer.rollouts.sampler import Sampler

V, T, TEMPERATURE = 14, 4, 0.8
PROMPTS = ["1?2=", "77", "9", "3?3=3?3="] * 2
SETTINGS = {
    "bad_words_ids": [[4], [5, 6]],
    "begin_suppress_tokens": [7, 8],
    "encoder_no_repeat_ngram_size": 1,
    "epsilon_cutoff": 0.06,
    "eta_cutoff": 0.6,
    "forced_eos_token_id": EOS,
    "min_new_tokens": 3,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [EOS, 3],
    "top_h": 0.7,
    "typical_p": 0.6,
    "encoder_repetition_penalty": 1.5,
    "exponential_decay_length_penalty": [1, 3.0],
    "sequence_bias": [[[4], 3.0], [[5, 6], -2.0]],
    "watermarking_config": {"bias": 1.0, "greenlist_ratio": 0.5},
}


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    return tokenizer, make_model(tokenizer).eval()


def sampler_of(parts, **options):
    options = {"max_completion_length": T, "temperature": TEMPERATURE} | options
    return Sampler(*parts, GRPOTrainerConfig(report_to=[], **options))


def noted(sampler, model, prompts=PROMPTS, seed=1):
    """(prompt_ids, completions, notes) of a seeded rollout."""
    notes, ids = Notes(), sampler.encode(prompts)
    torch.manual_seed(seed)
    found = sampler.generate(model, ids, temperature=TEMPERATURE, notes=notes)
    return ids, found, notes


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_recorded_is_the_distribution_of_generate(parts, name):
    """transformers' own scores are the truth, of its own sampler with the same settings."""
    setting, model = {name: SETTINGS[name]}, parts[1]
    prompt_ids, completions, notes = noted(sampler_of(parts, generation_kwargs=setting), model)
    ids, mask = pad(prompt_ids, 0, "left")
    limits = dict(max_new_tokens=T, eos_token_id=EOS, pad_token_id=0)
    returns = dict(output_scores=True, return_dict_in_generate=True)
    config = GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=0, **limits, **returns, **setting
    )
    torch.manual_seed(1)
    truth = model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=config)
    far, cut = [], 0
    for row, completion in enumerate(completions):
        assert truth.sequences[row, ids.shape[1] :][: len(completion)].tolist() == completion
        counts, listed = map(torch.tensor, notes.supports[row])
        offsets, kept = expand_support(counts, listed, V)
        whole = torch.tensor([prompt_ids[row] + completion])
        with torch.no_grad():
            policy = model(whole).logits[0, len(prompt_ids[row]) - 1 : -1] / TEMPERATURE
        for place, token in enumerate(completion):
            scores = truth.scores[place][row]
            tokens = kept[offsets[place] : offsets[place + 1]].long()
            assert tokens.tolist() == (scores > -torch.inf).nonzero()[:, 0].tolist()
            logp = notes.logprobs[row][place]
            assert logp == pytest.approx(scores.log_softmax(0)[token].item(), abs=1e-6)
            difference = policy[place, tokens].softmax(0) - scores[tokens].softmax(0)
            far.append(difference.abs().max().item())
            cut += len(tokens) < V
    if name in LEAVES_OUT:
        assert cut and max(far) < 1e-6, "the policy, over a part"
    else:
        assert max(far) > 0.01, "another distribution"


def test_every_setting_of_transformers_is_of_one_kind():
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    known -= {"transformers_version"}
    assert known <= {*KNOWN} and len(KNOWN) == len(set(KNOWN))
    assert set(SETTINGS) == {*LEAVES_OUT, *REWEIGHTS}


def penalised(logits, seen, penalty):
    """Logits (V,) whose tokens in `seen` became less likely."""
    lower = torch.where(logits < 0, logits * penalty, logits / penalty)
    is_seen = torch.zeros(len(logits), dtype=torch.bool)
    is_seen[list(seen)] = True
    return torch.where(is_seen, lower, logits)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}, {"top_k": 4, "stop_strings": ["3"]}])
def test_a_repetition_penalty_is_corrected_for(filters):
    """Weights are the policy's probabilities over the sampler's, both over what was kept."""
    options = {"repetition_penalty": 1.7, "temperature": 0.8, "max_completion_length": 4}
    options |= {"generation_batch_size": 3, "rollout_correction_cap": 1e9, "minibatches": 2}
    trainer, _ = trainer_of("unused", **options, **filters)
    experience = collect(trainer)
    batch, model = experience.batch, trainer.model.eval()
    support = batch.support(V)
    assert (support is None) == (not filters)
    limits = {name: value for name, value in filters.items() if name != "stop_strings"}
    for row, mask in enumerate(batch.attended):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]].tolist()
        completion = batch.completion_ids[row][mask].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        for place, token in enumerate(completion):
            sampled = penalised(logits[place], prompt + completion[:place], 1.7) / 0.8
            _, kept = sampling_support(sampled[None], **limits)
            where = kept.tolist().index(token)
            theirs = sampled[kept.long()].log_softmax(0)[where]
            ours = (logits[place, kept.long()] / 0.8).log_softmax(0)[where]
            assert batch.sampling_logps[row, place] == pytest.approx(theirs.item(), abs=1e-4)
            weight = batch.importance_sampling_ratio[row, place].item()
            assert weight == pytest.approx((ours - theirs).exp().item(), rel=1e-3)
    assert experience.metrics["rollout/weight_min"] < 0.99


@pytest.mark.parametrize("loss_input", ["hidden", "logits"])
def test_an_unchanged_policy_has_ratio_1_over_what_was_left_in(loss_input, tmp_path):
    """Supports of nearly the whole vocabulary are kept as what they lack."""
    settings = {"min_new_tokens": 2, "bad_words_ids": [[4], [5, 6]]}
    options = {"generation_kwargs": settings, "loss_input": loss_input, "num_iterations": 2}
    trainer, records = trainer_of(tmp_path, max_steps=2, **options)
    batch = collect(trainer).batch
    assert batch.sampling_logps is None and batch.support_counts.max() == -3
    assert batch.support_ids.shape[1] <= 2 * 3, "of 2 * 14"
    assert not (batch.completion_ids == 4).any() and (batch.attended.sum(1) == 2).all()
    whole = trainer.policy.logps(trainer.model, batch)
    assert (batch.old_logps > whole + 0.01).all(), "over fewer tokens"
    trainer.train()
    assert records[1]["ratio/max"] == 1 and records[1]["grad_norm"] > 0


def test_supports_are_listed_by_what_they_lack(monkeypatch):
    monkeypatch.setattr(rollouts, "EXPANDED", 5 * 7)  # in parts of five rows
    draw = np.random.default_rng(0)
    counts, ids, expected = [], [], []
    for _ in range(23):
        listed = np.sort(draw.choice(7, draw.integers(0, 8), replace=False))
        is_rest = draw.integers(2)
        counts.append(-1 - len(listed) if is_rest else len(listed))
        ids += listed.tolist()
        expected.append(sorted(set(range(7)) - set(listed)) if is_rest else listed.tolist())
    offsets, found = expand_support(torch.tensor(counts), torch.tensor(ids, dtype=torch.int32), 7)
    assert found.dtype == torch.int32 and offsets[-1] == len(found)
    assert [row.tolist() for row in found.tensor_split(offsets[1:-1])] == expected


def test_where_nothing_was_left_out_there_is_no_support():
    trainer, _ = trainer_of("unused", generation_kwargs={"bad_words_ids": [[5, 6, 7]]})
    batch = collect(trainer).batch
    assert (batch.support_counts[batch.attended] == -1).all() and batch.support(V) is None


def test_greedy_completions_obey_what_does_not_sample(parts, recwarn):
    """An evaluation has penalties and prohibitions; filters of samples keep the highest."""
    model, plain = parts[1], sampler_of(parts)
    ids = plain.encode(PROMPTS)
    highest = plain.generate(model, ids, temperature=0)
    for name in ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"):
        narrow = sampler_of(parts, top_p=0.5, generation_kwargs={name: SETTINGS[name]})
        assert narrow.generate(model, ids, temperature=0) == highest
    settings = {"suppress_tokens": [EOS, highest[0][0]], "no_repeat_ngram_size": 1}
    settings |= {"watermarking_config": SETTINGS["watermarking_config"]}
    found = sampler_of(parts, repetition_penalty=2, generation_kwargs=settings)
    completions = found.generate(model, ids, temperature=0)
    assert completions != highest and not {EOS, highest[0][0]} & {i for c in completions for i in c}
    assert all(len(set(c)) == len(c) == T for c in completions)
    assert not recwarn.list

    penalty = sampler_of(parts, repetition_penalty=3)
    for prompt, completion in zip(ids, penalty.generate(model, ids, temperature=0), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1]
        assert completion[0] == penalised(logits, prompt, 3).argmax()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "num_beams = 2 is refused: tokens must be drawn one by one"),
        ({"num_beams": True}, "num_beams = True is refused"),
        ({"num_return_sequences": 4}, "num_return_sequences = 4 .* an option of its own, num_gen"),
        ({"penalty_alpha": 0.6}, "penalty_alpha = 0.6 is refused: tokens must be drawn"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens = 3 is refused"),
        ({"do_sample": False}, "do_sample = False is refused: temperature samples"),
        ({"max_new_tokens": 9}, "max_new_tokens = 9 .* an option of its own, max_completion_len"),
        ({"temperature": 0.5}, "temperature = 0.5 .* option of its own, temperature"),
        ({"top_k": 5}, "top_k = 5 .* option of its own, top_k"),
        ({"repetition_penalty": 1.1}, "repetition_penalty = 1.1 .* its own, repetition_penalty"),
        ({"stop_strings": ["a"]}, "stop_strings = .* option of its own, stop_strings"),
        ({"eos_token_id": 3}, "eos_token_id = 3 is refused: special tokens are those of"),
        ({"min_length": 3}, "min_length = 3 is refused: .* use min_new_tokens"),
        ({"max_time": 1.0}, "max_time = 1.0 is refused: .* cannot be resumed bit for bit"),
        ({"cache_implementation": "paged"}, "cache_implementation = 'paged' is refused"),
        ({"typical": 0.9}, r"typical = 0.9 is unknown \(did you mean typical_p\?\)"),
        ({"min_tokens": 0.9}, r"min_tokens = 0.9 is unknown \(did you mean min_new_tokens\?\)"),
        ({"min_new_tokens": object()}, "min_new_tokens must be made of numbers, text"),
    ],
)
def test_settings_that_the_loss_is_wrong_with_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"generation_kwargs: {message}"):
        GRPOTrainerConfig(generation_kwargs=settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suppress_tokens": [3, 99]}, r"must hold ids in \[0, 14\), got 99"),
        ({"bad_words_ids": [[3], [-1]]}, r"must hold ids in \[0, 14\), got -1"),
        ({"forced_eos_token_id": True}, r"must hold ids in \[0, 14\), got True"),
        ({"bad_words_ids": []}, "bad_words_ids = .* is not valid"),
        ({"typical_p": -1.0}, "typical_p = -1.0 is not valid"),
        ({"typical_p": 2.0}, "typical_p = 2.0 is not valid"),
        ({"min_new_tokens": "a"}, "min_new_tokens = 'a' is not valid"),
        ({"sequence_bias": [[[99], 1.0]]}, "sequence_bias = .* is not valid"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size = -2 has no effect"),
        ({"watermarking_config": {"greenlist": 1}}, "watermarking_config = .* is not valid"),
    ],
)
def test_values_of_settings_are_checked_before_a_run(parts, settings, message):
    with pytest.raises(ValueError, match="generation_kwargs: .*" + message):
        sampler_of(parts, generation_kwargs=settings)


def test_settings_that_leave_nothing_out_are_accepted(parts):
    settings = {"do_sample": True, "num_beams": 1, "no_repeat_ngram_size": 0, "typical_p": 1.0}
    settings |= {"min_new_tokens": None, "use_cache": False, "encoder_repetition_penalty": 1.0}
    completions = noted(sampler_of(parts, generation_kwargs=settings), parts[1])[1]
    assert completions == noted(sampler_of(parts), parts[1])[1]
    config = GRPOTrainerConfig(generation_kwargs={"sequence_bias": {(4, 5): 1.0}})
    assert config.generation_kwargs == {"sequence_bias": [[[4, 5], 1.0]]}, "as JSON has it"


def test_nothing_left_to_sample_says_so(parts):
    sampler = sampler_of(parts, generation_kwargs={"suppress_tokens": list(range(V))})
    with pytest.raises(ValueError, match="generation_kwargs must leave a token to sample"):
        noted(sampler, parts[1])


def test_a_resumed_run_goes_on_with_the_sampler_s_distribution(tmp_path):
    """Its log-probabilities, and supports by what they lack."""
    options = {"repetition_penalty": 1.5, "generation_kwargs": {"suppress_tokens": [4]}}
    options |= {"minibatches": 2, "max_steps": 3, "stop_strings": ["3"], "top_p": 0.9}
    whole, expected = trainer_of(tmp_path, save_steps=1, save_total_limit=None, **options)
    whole.train()
    for step in (1, 2):
        path = str(tmp_path / f"checkpoint-{step}")
        resumed, records = trainer_of(tmp_path / "again", resume=path, seed=9, **options)
        resumed.train()
        assert records == {later: expected[later] for later in range(step + 1, 4)}
    assert expected[1]["rollout/kl"] != 0
    other, _ = trainer_of(tmp_path, resume=path, **options | {"repetition_penalty": 1.4})
    with pytest.raises(ValueError, match="resume: repetition_penalty is 1.4"):
        other.train()


def test_completions_end_at_a_stop_string(parts):
    """Rows stop at different times, and each is what it would have been, up to its stop."""
    tokenizer, model = parts
    whole = noted(sampler_of(parts), model, PROMPTS * 6)[1]
    sampler = sampler_of(parts, stop_strings=["3", "77"])
    _, found, notes = noted(sampler, model, PROMPTS * 6)
    lengths = set()
    for row, (ids, free) in enumerate(zip(found, whole, strict=True)):
        texts = [tokenizer.decode(free[: n + 1]) for n in range(len(free))]
        stops = [n + 1 for n, text in enumerate(texts) if "3" in text or "77" in text]
        assert ids == free[: stops[0] if stops else T]
        assert sampler.is_truncated(ids) == (not stops and ids[-1] != EOS)
        assert len(notes.logprobs[row]) == len(notes.supports[row][0]) == len(ids)
        lengths.add(stops[0] if stops else 0)
    assert lengths == set(range(T + 1))
    assert not sampler.is_truncated([5, 9, 9]) and sampler.is_truncated([5, 9])
    assert sampler.is_truncated([9, 9, 6]), "the stop is not its end"


def test_the_text_of_the_prompt_is_no_part_of_a_stop_string(parts):
    bias = {"sequence_bias": [[[5], 100.0]]}  # writes 3
    sampler = sampler_of(parts, stop_strings=["33"], generation_kwargs=bias)
    assert set(map(tuple, noted(sampler, parts[1], ["3?3=3", "33"])[1])) == {(5, 5)}


@pytest.mark.parametrize("stops", ["3", ["3"]])
def test_stop_strings_of_the_model_count(stops):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.generation_config.stop_strings = stops
    sampler = sampler_of((tokenizer, model), stop_strings=["77"])
    assert sampler.stops.strings == ["77", "3"]
    found = noted(sampler, model)[1]
    assert any(ids[-1] == 5 for ids in found) and not any(5 in ids[:-1] for ids in found)


def test_a_stop_string_is_no_truncation(tmp_path):
    """In the loss, in metrics, and in an evaluation."""
    seen = []

    def rewards(prompts, completions, completion_ids, columns):
        seen.append(completion_ids)
        return partial_credit(prompts, completions, completion_ids, columns)

    always = {"sequence_bias": [[[5], 100.0]], "suppress_tokens": [EOS]}
    options = {"stop_strings": ["3"], "generation_kwargs": always, "max_steps": 1}
    options |= {"mask_truncated_completions": True, "eval_steps": 1, "eval_data": ROWS[:3]}
    trainer, records = trainer_of(tmp_path, rewards=rewards, **options)
    trainer.train()
    assert all(ids == [[5]] * len(ids) for ids in seen) and len(seen) == 3
    assert records[1]["num_tokens"] == 16
    assert records[1]["completions/clipped_ratio"] == 0
    assert records[1]["eval/completions/mean_length"] == 1

    output = {"completion_ids": [[4, 5], [5, 4]] * 8}
    given = {"rollout_fn": lambda prompts, trainer: output, "stop_strings": ["3"]}
    masked, _ = trainer_of("unused", mask_truncated_completions=True, **given)
    assert collect(masked).batch.completion_mask.any(1).tolist() == [True, False] * 8


def bytes_tokenizer():
    """A token per byte, and some longer ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, "st", "op", "sto", "pp"])}
    merges = [("s", "t"), ("o", "p"), ("st", "o"), ("p", "p")]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"), vocab


@pytest.mark.parametrize(
    ("tokens", "stops"),
    [
        (["st", "op"], True),
        (["sto", "pp"], True),  # the token goes on behind the string
        (["s", "t", "o", "p"], True),
        (["a", "sto", "p"], True),
        (["st", "op", "a"], False),  # had stopped before
        (["st", "op", "st", "op"], True),  # again
        (["sto"], False),
        (["Ċ"], False),
        (["Ċ", "Ċ"], True),
        (["Ċ", "Ċ", "Ċ"], True),  # two newlines end here, too
        (["Ã"], False),  # half of a character
        (["Ã", "©"], True),
        (["©", "Ã", "©"], True),
        (["Ã", "©", "Ã"], False),
        ([], False),
    ],
)
def test_a_stop_string_need_not_be_a_token(tokens, stops):
    tokenizer, vocab = bytes_tokenizer()
    found = StopStrings(tokenizer, ["stop", "\n\n", "é", "<end>"])
    found.check()
    ids = [vocab[token] for token in tokens]
    assert found.end([ids, [0]]) == [stops, False]
    assert found.end([[*ids, tokenizer.eos_token_id]]) == [True], "special tokens are text, too"


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        (["3", "a3"], "stop_strings: the tokenizer cannot write 'a3'"),
        (["\n"], "stop_strings: the tokenizer cannot write"),
        (["3", ""], "stop_strings must not be empty text"),
    ],
)
def test_stop_strings_that_cannot_be_written_are_refused(parts, stops, message):
    with pytest.raises(ValueError, match=message):
        sampler_of(parts, stop_strings=stops)


@pytest.mark.parametrize(("skips", "text"), [(True, "ab7"), (False, "<think>ab</think>7<eos>")])
def test_rewards_see_special_tokens_if_wanted(skips, text):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["a", "b"])
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    model = make_model(tokenizer)
    ids = tokenizer("<think>ab</think>7<eos>")["input_ids"]
    seen = []

    def rewards(prompts, completions, completion_ids, columns):
        seen.extend(completions)
        return RewardScores(torch.arange(16.0), {})

    trainer, _ = trainer_of(
        "unused",
        rewards=rewards,
        rollout_fn=lambda prompts, trainer: {"completion_ids": [ids] * 16},
        tokenizer=tokenizer,
        model=model,
        max_completion_length=9,
        skip_special_tokens=skips,
        completions_steps=1,
    )
    collect(trainer)
    assert seen == [text] * 16
    assert {row["completion"] for row in trainer.run_log.tables[1]} == {text}
