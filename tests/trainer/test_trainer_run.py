"""Complete runs: logs and files, every loss, adapters, the reference, and other options."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import TINY
from trainer_runs import HELD_OUT, ROWS, MemoryLog, RewardScores, trainer_of, weights_of
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_fused import (
    LOSSES,
    GRPOTrainer,
    GRPOTrainerConfig,
    outcome_advantages,
    process_advantages,
)
from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.collect import collect
from grpo_fused.trainer.policy import disable_dropout

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj"])


def test_a_run_logs_evaluates_and_saves(tmp_path):
    """That such a run learns is shown by the demo."""
    log = MemoryLog()
    trainer, records = trainer_of(
        tmp_path,
        max_steps=6,
        learning_rate=1e-3,
        entropy_coef=0.01,
        lr_scheduler_type="linear",
        eval_steps=4,
        eval_data=HELD_OUT,
        completions_steps=2,
        completions_rows=20,
        eval_batch_size=7,
        run_log=log,
    )
    assert trainer.train()[:2] == (6, None)
    assert list(log.steps) == list(range(7)) and log.closed == 1
    assert [step for step in log.steps if "eval/reward" in log.steps[step]] == [0, 4, 6]
    assert all(log.steps[step]["reward"] == records[step]["reward"] for step in range(1, 7))
    rates = [log.steps[step]["learning_rate"] for step in range(1, 7)]
    assert rates == pytest.approx([1e-3 * (1 - i / 6) for i in range(6)])
    assert "kl" not in log.steps[6]
    # The first rollout is the baseline; evaluations show the same prompts at several steps.
    assert list(log.tables) == ["eval-0", 1, 2, 4, "eval-4", 6, "eval-6"]
    for step in (0, 4, 6):
        table = log.tables[f"eval-{step}"]
        assert [row["prompt"] for row in table] == [row["prompt"] for row in HELD_OUT]
        mean = sum(row["reward"] for row in table) / len(table)
        assert mean == pytest.approx(log.steps[step]["eval/reward"])
    for step in (1, 2, 4, 6):  # under the name of the step that has their metrics
        rewards = [row["reward"] for row in log.tables[step]]
        assert sum(rewards) / 16 == pytest.approx(log.steps[step]["reward"])
    row = log.tables[6][0]
    assert set(row) == {"prompt", "completion", "reward", "exact", "digits"}
    assert row["prompt"].endswith("=")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights_of(trainer)[name])
    assert model.generation_config.max_new_tokens == 2, "the model's own, not the sampler's"


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_runs(tmp_path, loss_type):
    beta = 0.1 if loss_type != "dapo" else 0.0
    trainer, records = trainer_of(tmp_path, loss_type=loss_type, beta=beta, max_steps=2)
    before = weights_of(trainer)
    trainer.train()
    assert len(records) == 2 and ("kl" in records[2]) == (beta > 0)
    assert any(not torch.equal(before[name], w) for name, w in weights_of(trainer).items())


@pytest.mark.parametrize("mix", [1.0, 0.25])
def test_the_reference_is_refreshed_at_intervals(tmp_path, mix):
    refreshed = []

    def on_refresh(trainer):
        moved = [
            torch.allclose(mine, before + mix * (new - before), atol=1e-6)
            for mine, before, new in zip(
                trainer.reference.model.parameters(),
                kept[-1],
                trainer.unwrapped.parameters(),
                strict=True,
            )
        ]
        assert all(moved)
        refreshed.append((trainer.step, trainer.rollouts))
        kept.append([p.clone() for p in trainer.reference.model.parameters()])

    trainer, records = trainer_of(
        tmp_path,
        beta=0.1,
        max_steps=6,
        reference_refresh_rollouts=2,
        reference_mix=mix,
        on_refresh=on_refresh,
    )
    kept = [[p.clone() for p in trainer.reference.model.parameters()]]
    trainer.train()
    assert refreshed == [(2, 2), (4, 4)]
    assert (records[3]["kl"] == 0) == (mix == 1.0) and records[2]["kl"] > 0


def test_adapters_are_trained_and_the_reference_is_the_model_without_them(tmp_path):
    trainer, records = trainer_of(tmp_path, peft_config=LORA, beta=0.1, num_iterations=2)
    assert trainer.reference.model is None, "no copy"
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name for name in changed)
    assert records[1]["kl"] == 0 < records[4]["kl"]

    batch = collect(trainer).batch
    with trainer.unwrapped.disable_adapter():
        expected = trainer.policy.logps(trainer.model, batch)
    assert torch.equal(batch.ref_logps, expected)
    trainer.reference.refresh(trainer.unwrapped)
    with trainer.reference.activate(trainer.model, trainer.unwrapped) as model:
        refreshed = trainer.policy.logps(model, batch)
    assert torch.equal(refreshed, trainer.policy.logps(trainer.model, batch))
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    saved = {name.replace(".weight", ".default.weight"): w for name, w in saved.items()}
    assert saved.keys() == {name for name in after if "lora_" in name}
    assert all(torch.equal(weight, after[name]) for name, weight in saved.items())
    with pytest.raises(ValueError, match="reference_mix must be 1 for a model with adapters"):
        trainer_of(
            tmp_path, peft_config=LORA, beta=0.1, reference_mix=0.5, reference_refresh_rollouts=1
        )


def test_scores_of_steps_give_process_advantages(tmp_path):
    steps = [[(0, 1.0), (1, float(i % 3))] if i % 5 else [(1, 0.5)] for i in range(16)]

    def rewards(prompts, completions, completion_ids, columns):
        return RewardScores(torch.full((16,), float("nan")), {}, steps)

    def two_tokens(prompts, trainer):
        return {"completion_ids": [[4, 5]] * len(prompts)}

    trainer, records = trainer_of(tmp_path, rewards=rewards, rollout_fn=two_tokens)
    ends = torch.tensor([[e for e, _ in row] + [-1] * (2 - len(row)) for row in steps])
    scores = torch.tensor([[s for _, s in row] + [0.0] * (2 - len(row)) for row in steps])
    expected = process_advantages(scores, ends, 2, 4)
    assert torch.equal(collect(trainer).batch.advantages, expected)
    trainer.train()
    assert records[4]["grad_norm"] > 0
    steps[3] = [(2, 1.0)]  # after the end of the completion
    with pytest.raises(ValueError, match="step_ends must be < 2, got 2"):
        collect(trainer)
    trainer, _ = trainer_of(tmp_path, rewards=rewards, scale_rewards="batch")
    with pytest.raises(ValueError, match="scale_rewards must be group or none for process rew"):
        collect(trainer)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_completions_without_a_score_do_not_count(tmp_path, scale):
    totals = torch.arange(16.0)
    totals[[1, 5]], totals[12:16] = float("nan"), float("nan")

    def rewards(*_):
        return RewardScores(totals, {})

    trainer, _ = trainer_of(tmp_path, rewards=rewards, scale_rewards=scale)
    experience = collect(trainer)
    advantages = experience.batch.advantages
    assert not advantages.isnan().any() and (advantages[totals.isnan()] == 0).all()
    assert advantages[[0, 2, 3]].sum().abs() < 1e-5 and advantages[0] < 0 < advantages[3]
    assert experience.metrics["reward"] == totals.nanmean().item()
    has_score, groups = ~totals.isnan(), torch.arange(16) // 4
    expected = outcome_advantages(totals[has_score], group_ids=groups[has_score], scale=scale)
    assert torch.equal(advantages[has_score], expected)
    totals[:4] = torch.tensor([0.1, float("nan"), 0.1, 0.1])
    assert (
        collect(trainer).metrics["frac_reward_zero_std"] == 0.5
    )  # one group is equal, one has no scores
    metrics = collect(trainer).metrics
    groups = [group[~group.isnan()] for group in totals.view(-1, 4)]
    stds = [group.std() if len(group) > 1 else 0.0 for group in groups if len(group)]
    assert metrics["reward_std"] == pytest.approx(float(sum(stds)) / len(stds))
    assert metrics["frac_reward_none"] == sum(not len(group) for group in groups) / 4
    totals.fill_(float("nan"))
    experience = collect(trainer)
    assert (experience.batch.advantages == 0).all()
    assert experience.metrics["frac_reward_none"] == 1 and experience.metrics["reward_std"] == 0


def test_activations_are_recomputed_in_the_backward_pass(tmp_path):
    model = make_model(make_tokenizer()).eval()  # as from_pretrained returns it
    trainer, _ = trainer_of(tmp_path, model=model, gradient_checkpointing=True)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    experience = collect(trainer)
    calls.clear()
    batch = next(iter(experience.micro_batches(0, 1, 16)))
    loss = trainer.policy.loss(trainer.model, batch, 32, 16)[0].loss
    forward = len(calls)
    loss.backward()
    assert (forward, len(calls)) == (1, 2)


def test_bfloat16_autocast(tmp_path):
    AcceleratorState._reset_state(True)
    try:
        trainer, records = trainer_of(tmp_path, mixed_precision="bf16", beta=0.1, num_iterations=2)
        trainer.train()
        assert records[1]["ratio/max"] == 1 and records[1]["kl"] == 0 < records[4]["kl"]
        with pytest.raises(ValueError, match="mixed_precision is 'no', but the accelerator has"):
            trainer_of(tmp_path, accelerator=trainer.accelerator)
        assert next(trainer.unwrapped.parameters()).dtype == torch.float32
    finally:
        AcceleratorState._reset_state(True)


def test_dropout_is_off_by_default(tmp_path):
    model = make_model(make_tokenizer())
    model.dropout, model.model.layers[0].self_attn.attention_dropout = torch.nn.Dropout(0.5), 0.5
    trainer_of(tmp_path, model=model, disable_dropout=False)
    assert model.dropout.p == 0.5 == model.model.layers[0].self_attn.attention_dropout
    trainer_of(tmp_path, model=model)
    assert model.dropout.p == 0 == model.model.layers[0].self_attn.attention_dropout


DROPOUTS = {
    "starcoder2": {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "word_embed_proj_dim": 16, "ffn_dim": 32},
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "phi": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3},
    "qwen3": {"attention_dropout": 0.3},
}


def two_logits(model):
    return [model(torch.arange(3, 9)[None]).logits for _ in range(2)]


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "eager") for name in DROPOUTS] + [("starcoder2", "sdpa"), ("opt", "sdpa")],
)
def test_no_model_of_transformers_keeps_a_dropout(name, attention, tmp_path):
    """Modules, functions with a number of the module, or of the config, which stays as it was."""
    config = AutoConfig.for_model(name, **TINY | DROPOUTS[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    first, second = two_logits(model)
    assert not torch.equal(first, second)
    disable_dropout(model)
    first, second = two_logits(model)
    assert torch.equal(first, second)
    model.save_pretrained(tmp_path)
    saved = AutoConfig.from_pretrained(tmp_path)
    assert all(getattr(saved, k) == v for k, v in DROPOUTS[name].items())


def test_a_dropout_that_only_the_config_knows():
    class Layer(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

        def forward(self, x):
            return torch.nn.functional.dropout(x, self.config.hidden_dropout, self.training)

    config = AutoConfig.for_model("bloom", hidden_dropout=0.5)
    model = torch.nn.Sequential(Layer(config), Layer(config))
    disable_dropout(model)
    assert model(torch.ones(100)).sum() == 100 and config.hidden_dropout == 0.5
    assert model[0].config is model[1].config, "one copy for all"


def with_adapters(names=("default",), seed=7):
    """A model whose adapters were trained before."""
    generator = torch.manual_seed(seed)
    model = get_peft_model(make_model(make_tokenizer()), LORA, names[0])
    for name in names[1:]:
        model.add_adapter(name, LORA)
        model.set_adapter(name)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("names", [("default",), ("first", "second")])
def test_adapters_that_were_trained_before_are_the_reference(names, tmp_path):
    """Without them the KL would start at that of two models; a resumed run keeps them."""
    options = {"beta": 0.1, "num_iterations": 2, "max_steps": 4, "save_steps": 2}
    model = with_adapters(names)
    trainer, records = trainer_of(tmp_path / "run", model=model, **options)
    active = trainer.unwrapped.active_adapter
    assert active == names[-1]
    expected = trainer.policy.logps(trainer.model, batch := collect(trainer).batch)
    assert torch.equal(batch.ref_logps, expected)
    trainer, records = trainer_of(tmp_path / "run", model=with_adapters(names), **options)
    trainer.train()
    assert records[1]["kl"] == 0 < records[4]["kl"] < 1
    again, resumed = trainer_of(
        *(tmp_path / "run",), model=with_adapters(names), resume=f"{tmp_path}/run/checkpoint-2",
        **options,
    )  # fmt: skip
    again.train()
    assert resumed[3] == records[3] and resumed[4] == records[4]


def test_an_adapter_loaded_for_training_is_the_reference(tmp_path):
    with_adapters().save_pretrained(tmp_path / "adapter")
    base, folder = make_model(make_tokenizer()), str(tmp_path / "adapter")
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    trainer, records = trainer_of(tmp_path / "run", model=model, beta=0.1, max_steps=1)
    trainer.train()
    assert records[1]["kl"] == 0
    frozen = PeftModel.from_pretrained(make_model(make_tokenizer()), folder)
    with pytest.raises(ValueError, match="requires a gradient, got none; .*is_trainable=True"):
        trainer_of(tmp_path / "frozen", model=frozen)


def test_a_model_by_name_and_trackers(tmp_path):
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    config = GRPOTrainerConfig(
        output_dir=str(tmp_path / "run"),
        prompts_per_rollout=2,
        max_steps=1,
        max_completion_length=2,
        completions_steps=1,
        progress_bar=False,
    )
    steps = []

    def any_digit(completions, answer, trainer_state, log_metric, log_extra, **columns):
        steps.append((trainer_state.global_step, trainer_state.max_steps))
        log_metric("share", 0.5)
        log_metric("share", 0.75)
        log_extra("wanted", answer)
        return [float(text[:1].isdigit()) for text in completions]

    def matches(completions, answer):
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    GRPOTrainer(str(tmp_path / "start"), [any_digit, matches], config, ROWS).train()
    assert steps == [(0, 1)]
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {"step", "reward", "rewards/any_digit", "rewards/matches"} <= set(json.loads(line))
    assert json.loads(line)["share"] == 0.625
    table = (tmp_path / "run" / "completions" / "1.jsonl").read_text().splitlines()
    answers = {row["prompt"]: row["answer"] for row in ROWS}
    assert all(row["wanted"] == answers[row["prompt"]] for row in map(json.loads, table))
    names = [path.name for path in (tmp_path / "run").rglob("*")]
    assert "reward.png" in names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "checkpoint-1" in names and "model.safetensors" in names
