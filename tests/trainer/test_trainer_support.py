"""What the sampler kept, from its filters or from a rollout_fn to the loss and its metrics."""

import pytest
import torch
from trainer_runs import EOS, ROWS, scored, trainer_of

from grpo_fused import sampling_support
from grpo_fused.trainer.collect import collect

FILTERS = {"top_k": 3, "top_p": 0.9, "min_p": 0.05}


def sampled_logps(model, prompt, completion, config):
    """(log-probabilities, ids kept) of the tokens of a completion under transformers' sampler."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    offsets, ids = sampling_support(
        logits,
        temperature=config.temperature,
        **{name: getattr(config, name) for name in FILTERS if getattr(config, name)},
    )
    kept = [ids[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    logps = [
        (row[tokens.long()] / config.temperature).log_softmax(0)[tokens == chosen][0]
        for row, tokens, chosen in zip(logits, kept, completion, strict=True)
    ]
    return torch.stack(logps), [tokens.tolist() for tokens in kept]


@pytest.mark.parametrize("names", [["top_k"], ["top_p"], ["top_k", "top_p", "min_p"]])
def test_the_sampler_hands_over_what_it_kept(names, tmp_path):
    """Old log-probabilities are then over it, those of the reference are not."""
    options = {name: FILTERS[name] for name in names} | {"temperature": 0.8, "beta": 0.1}
    trainer, _ = trainer_of(tmp_path, generation_batch_size=3, minibatches=2, **options)
    batch = collect(trainer).batch
    model = trainer.model.eval()
    offsets, ids = batch.support(14)
    assert ids.dtype == torch.int32 and len(offsets) == batch.completion_ids.numel() + 1
    rows, T = ids.tensor_split(offsets[1:-1]), batch.completion_ids.shape[1]
    with torch.no_grad():
        for b, mask in enumerate(batch.attended):
            prompt = batch.prompt_ids[b][batch.prompt_mask[b]].tolist()
            completion = batch.completion_ids[b][mask].tolist()
            logps, kept = sampled_logps(model, prompt, completion, trainer.config)
            assert [row.tolist() for row in rows[b * T : b * T + len(completion)]] == kept
            assert all(len(row) == 0 for row in rows[b * T + len(completion) : (b + 1) * T])
            torch.testing.assert_close(
                batch.old_logps[b, : len(logps)], logps, rtol=1e-4, atol=1e-5
            )
    whole = trainer.policy.logps(model, batch)
    torch.testing.assert_close(batch.ref_logps, whole, rtol=1e-4, atol=1e-5)
    assert (batch.old_logps - whole)[batch.completion_mask].max() > 0.01


def filtered(prompts, trainer, support=True, shift=0.0):
    """A rollout_fn: transformers' sampler, as a server would be, with its log-probabilities."""
    sampler, config = trainer.sampler, trainer.config
    rollout = sampler.rollout(trainer.unwrapped, prompts, {}, temperature=config.temperature)
    found = {"completion_ids": rollout.completion_ids, "prompt_ids": rollout.prompt_ids}
    model = trainer.unwrapped.eval()
    with torch.no_grad():
        pairs = zip(rollout.prompt_ids, rollout.completion_ids, strict=True)
        results = [sampled_logps(model, *pair, config) for pair in pairs]
    found["logprobs"] = [(logps + shift).tolist() for logps, _ in results]
    if support:
        found["support"] = [kept for _, kept in results]
    return found


def test_with_a_support_the_weights_of_an_unchanged_policy_are_1(tmp_path):
    """Without one they are biased, which a warning says once and metrics show."""
    options = {"top_p": 0.7, "rollout_correction_cap": 1.5, "max_steps": 2}
    trainer, records = trainer_of(tmp_path / "with", rollout_fn=filtered, **options)
    trainer.train()
    first = records[1]
    assert first["rollout/weight_mean"] == pytest.approx(1, abs=1e-5)
    assert first["rollout/weight_min"] == pytest.approx(1, abs=1e-5)
    assert first["rollout/kl"] == pytest.approx(0, abs=1e-5) and first["rollout/cut_ratio"] == 0

    biased, records = trainer_of(
        tmp_path / "without", rollout_fn=lambda *a: filtered(*a, support=False), **options
    )
    with pytest.warns(UserWarning, match="rollout_fn returned no support") as caught:
        biased.train()
    assert len([w for w in caught if "no support" in str(w.message)]) == 1
    assert records[1]["rollout/weight_mean"] < 0.95 and records[1]["rollout/kl"] > 0.05

    far, records = trainer_of(
        tmp_path / "far", rollout_fn=lambda *a: filtered(*a, shift=-1.0), **options
    )
    far.train()
    assert records[1]["rollout/cut_ratio"] == 1
    assert records[1]["rollout/weight_mean"] == pytest.approx(torch.e, rel=1e-4)


@pytest.mark.parametrize(
    ("support", "message"),
    [
        ([[[5]]] * 16, "support of completion 0 must have one entry per token, 2, got 1"),
        ([[[5], [7]]] * 16, "support of completion 0 must have .* that of token 0 lacks 4"),
    ],
)
def test_a_support_that_cannot_be_is_refused(support, message):
    output = {"completion_ids": [[4, EOS]] * 16, "support": support}
    trainer, _ = trainer_of("unused", rollout_fn=lambda prompts, trainer: output)
    with pytest.raises(ValueError, match=message):
        collect(trainer)


@pytest.mark.parametrize(
    "row", [[4, 4], [4, 99], [-1, 4]], ids=["twice", "past the vocabulary", "negative"]
)
def test_ids_of_a_support_are_checked(row):
    output = {"completion_ids": [[4, EOS]] * 16, "support": [[row, [EOS]]] * 16}
    trainer, _ = trainer_of("unused", rollout_fn=lambda prompts, trainer: output)
    with pytest.raises(
        ValueError, match=r"support of completion 0 must have distinct ids in \[0, "
    ):
        collect(trainer)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_evaluation_with_filters(temperature, tmp_path):
    """Nothing is noted: it trains on none of it."""
    options = {"top_p": 0.8, "eval_steps": 1, "eval_data": ROWS[:3], "max_steps": 1}
    trainer, records = trainer_of(tmp_path, eval_temperature=temperature, **options)
    trainer.train()
    assert 0 <= records[1]["eval/reward"]
    rollout = trainer.sampler.rollout(trainer.unwrapped, ["1?2="], {}, temperature=temperature)
    assert rollout.support is None


def test_a_loss_over_the_sampler_is_not_corrected_again():
    options = {"rollout_fn": scored, "max_completion_length": 3}
    trainer, _ = trainer_of("unused", loss_type="rollout_is", **options)
    batch = collect(trainer).batch
    assert batch.sampling_logps is not None and batch.importance_sampling_ratio is None
