"""Whole runs: it learns, every loss and option runs, bad input is said before it does harm."""

import json
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig
from trainer_runs import HELD_OUT, ROWS, Scores, judge, trainer_of, weights_of
from transformers import AutoModelForCausalLM

from grpo_fused import LOSSES, GRPOTrainer, GRPOTrainerConfig, process_advantages
from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.collect import collect

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj"])


class Log:
    def __init__(self):
        self.steps, self.tables, self.closed = {}, {}, 0

    def write(self, step, metrics):
        self.steps[step] = json.loads(json.dumps(metrics))

    def completions(self, step, rows):
        self.tables[step] = rows

    def close(self):
        self.closed += 1


def exact(prompts, completions, completion_ids, columns):
    """1 for the larger digit and then the end."""
    right = [
        float(text == answer and ids[-1] == 1)
        for text, answer, ids in zip(completions, columns["answer"], completion_ids, strict=True)
    ]
    return Scores(torch.tensor(right), {"exact": torch.tensor(right)})


def test_it_learns_and_all_that_it_promises_is_there(tmp_path):
    log = Log()
    trainer, records = trainer_of(
        tmp_path,
        rewards=exact,
        seed=0,
        prompts_per_rollout=16,
        num_generations=16,
        micro_batch_size=256,
        max_steps=150,
        learning_rate=1e-3,
        adam_betas=[0.9, 0.99],
        entropy_coef=0.01,
        lr_scheduler_type="linear",
        eval_steps=100,
        eval_data=HELD_OUT,
        completions_steps=50,
        run_log=log,
    )
    assert trainer.train() == (150, None)
    rewards = [records[step]["reward"] for step in range(1, 151)]
    assert sum(rewards[:10]) / 10 < 0.2 and sum(rewards[-10:]) / 10 > 0.8
    assert list(log.steps) == list(range(151)) and log.closed == 1
    assert [step for step in log.steps if "eval/reward" in log.steps[step]] == [0, 100, 150]
    assert log.steps[150]["eval/reward"] > 0.7 > 0.3 > log.steps[0]["eval/reward"]
    assert log.steps[150]["learning_rate"] < 1e-4 and "kl" not in log.steps[150]
    assert list(log.tables) == [49, 99, 149]
    row = log.tables[149][0]
    assert set(row) == {"prompt", "completion", "reward", "exact"} and row["prompt"].endswith("=")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights_of(trainer)[name])
    assert model.generation_config.max_new_tokens == 2, "the model's own, not the sampling's"


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_every_loss_runs(tmp_path, loss_type, beta):
    trainer, records = trainer_of(tmp_path, loss_type=loss_type, beta=beta, num_iterations=2)
    before = weights_of(trainer)
    trainer.train()
    assert len(records) == 4 and ("kl" in records[4]) == (beta > 0)
    assert any(not torch.equal(before[name], w) for name, w in weights_of(trainer).items())


@pytest.mark.parametrize("mix", [1.0, 0.25])
def test_the_reference_is_refreshed_every_so_many_rollouts(tmp_path, mix):
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
    with trainer.reference.instead_of(trainer.model, trainer.unwrapped) as model:
        refreshed = trainer.policy.logps(model, batch)
    assert torch.equal(refreshed, trainer.policy.logps(trainer.model, batch))
    assert (tmp_path / "model" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="reference_mix must be 1 for a model with adapters"):
        trainer_of(tmp_path, peft_config=LORA, beta=0.1, reference_mix=0.5)


def test_rewards_of_steps_are_process_supervision(tmp_path):
    steps = [[(0, 1.0), (1, float(i % 3))] if i % 5 else [(1, 0.5)] for i in range(16)]

    def rewards(prompts, completions, completion_ids, columns):
        return Scores(torch.full((16,), float("nan")), {}, steps)

    def two_tokens(prompts, trainer):
        return {"completion_ids": [[4, 5]] * len(prompts)}

    trainer, records = trainer_of(tmp_path, rewards=rewards, rollout_fn=two_tokens)
    ends = torch.tensor([[e for e, _ in row] + [-1] * (2 - len(row)) for row in steps])
    scores = torch.tensor([[s for _, s in row] + [0.0] * (2 - len(row)) for row in steps])
    expected = process_advantages(scores, ends, 2, 4)
    assert torch.equal(collect(trainer).batch.advantages, expected)
    trainer.train()
    assert records[4]["grad_norm"] > 0
    steps[3] = [(2, 1.0)]  # behind the completion
    with pytest.raises(ValueError, match="step_ends must be < 2, got 2"):
        collect(trainer)
    trainer, _ = trainer_of(tmp_path, rewards=rewards, scale_rewards="batch")
    with pytest.raises(ValueError, match="scale_rewards must be group or none for rewards of st"):
        collect(trainer)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_who_was_not_judged_neither_counts_nor_trains(tmp_path, scale):
    totals = torch.arange(16.0)
    totals[[1, 5]], totals[12:16] = float("nan"), float("nan")

    def rewards(*_):
        return Scores(totals, {})

    trainer, _ = trainer_of(tmp_path, rewards=rewards, scale_rewards=scale)
    experience = collect(trainer)
    advantages = experience.batch.advantages
    assert not advantages.isnan().any() and (advantages[totals.isnan()] == 0).all()
    assert advantages[[0, 2, 3]].sum().abs() < 1e-5 and advantages[0] < 0 < advantages[3]
    assert experience.metrics["reward"] == totals.nanmean().item()
    totals.fill_(float("nan"))
    assert (collect(trainer).batch.advantages == 0).all()


def test_nothing_but_end_tokens(tmp_path):
    def ends(prompts, trainer):
        return {"completion_ids": [[1]] * len(prompts)}

    trainer, records = trainer_of(tmp_path, rollout_fn=ends, rewards=lambda *_: Scores(
        torch.arange(16.0), {}))  # fmt: skip
    trainer.train()
    assert records[1]["completions/max_length"] == 1 and records[1]["grad_norm"] > 0


@pytest.mark.parametrize("completion", [[], [5, 5]])
def test_nothing_to_train_on_is_a_step_that_changes_nothing(tmp_path, completion):
    """Empty completions, or all cut off and masked: a differentiable 0."""

    def nothing(prompts, trainer):
        return {"completion_ids": [completion] * len(prompts)}

    trainer, records = trainer_of(
        tmp_path, rollout_fn=nothing, mask_truncated_completions=True, max_steps=2, beta=0.1
    )
    before = weights_of(trainer)
    trainer.train()
    assert records[2]["loss"] == records[2]["grad_norm"] == records[2]["num_tokens"] == 0
    assert records[2]["completions/clipped_ratio"] == 1
    assert all(torch.equal(before[name], w) for name, w in weights_of(trainer).items())


def test_a_group_of_one_is_warned_of_and_trains_nothing(tmp_path):
    with pytest.warns(UserWarning, match="num_generations is 1"):
        trainer, records = trainer_of(tmp_path, num_generations=1)
    trainer.train()
    assert records[4]["grad_norm"] == 0 and records[4]["reward_std"] == 0


def test_activations_are_computed_again_in_backward(tmp_path):
    model = make_model(make_tokenizer()).eval()  # as from_pretrained returns it
    trainer, _ = trainer_of(tmp_path, model=model, gradient_checkpointing=True)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    experience = collect(trainer)
    calls.clear()
    batch = next(iter(experience.micro_batches(0, 1, 16)))
    loss = trainer.policy.loss(trainer.model, batch, 32, 16).loss
    forward = len(calls)
    loss.backward()
    assert (forward, len(calls)) == (1, 2)


def test_bfloat16_autocast(tmp_path):
    AcceleratorState._reset_state(True)
    try:
        trainer, records = trainer_of(tmp_path, mixed_precision="bf16", beta=0.1, num_iterations=2)
        trainer.train()
        assert records[1]["ratio/max"] == 1 and records[4]["grad_norm"] > 0
        assert next(trainer.unwrapped.parameters()).dtype == torch.float32
    finally:
        AcceleratorState._reset_state(True)


def test_dropout_is_off_unless_it_is_wanted(tmp_path):
    model = make_model(make_tokenizer())
    model.dropout, model.model.layers[0].self_attn.attention_dropout = torch.nn.Dropout(0.5), 0.5
    trainer_of(tmp_path, model=model, disable_dropout=False)
    assert model.dropout.p == 0.5 == model.model.layers[0].self_attn.attention_dropout
    trainer_of(tmp_path, model=model)
    assert model.dropout.p == 0 == model.model.layers[0].self_attn.attention_dropout


def test_a_model_by_name_and_trackers(tmp_path):
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    config = GRPOTrainerConfig(
        output_dir=str(tmp_path / "run"),
        prompts_per_rollout=2,
        max_steps=1,
        max_completion_length=2,
        progress_bar=False,
    )
    GRPOTrainer(str(tmp_path / "start"), judge, config, ROWS).train()
    names = [path.name for path in (tmp_path / "run").rglob("*")]
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "checkpoint-1" in names and "model.safetensors" in names


def fails(*_):
    raise RuntimeError("no such answer")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"data": []}, ValueError, "data has no rows"),
        ({"data": [{"question": "?"}]}, ValueError, 'rows must be dicts with a "prompt"'),
        ({"eval_steps": 3}, ValueError, "eval_steps is 3, but there is no eval_data"),
        ({"eval_steps": 3, "eval_data": []}, ValueError, "eval_data has no rows"),
        ({"report_to": ["wandbb"]}, ValueError, "report_to: wandbb is not installed or unknown"),
        ({"rewards": fails}, RuntimeError, "no such answer"),
        (
            {"rewards": lambda *_: Scores(torch.ones(3), {})},
            ValueError,
            r"total must have shape \(16,\), got \(3,\)",
        ),
        (
            {"rewards": lambda *_: Scores(torch.full((16,), float("inf")), {})},
            ValueError,
            "total must be finite or NaN",
        ),
    ],
)
def test_bad_input_is_an_error_that_names_it(tmp_path, options, error, message):
    log = Log()
    with pytest.raises(error, match=message):
        trainer, _ = trainer_of(tmp_path, run_log=log, **options)
        trainer.train()
    assert log.closed == ("rewards" in options) and not log.steps


def test_a_gradient_that_is_not_finite_stops_before_it_is_applied(tmp_path):
    trainer, _ = trainer_of(tmp_path, save_steps=1)

    def broken(parameter):
        parameter.grad.fill_(float("nan"))

    weight = trainer.unwrapped.lm_head.weight
    trainer.on_refresh = None
    hook = None

    def rewards(*arguments):
        nonlocal hook
        if trainer.step == 2:
            hook = weight.register_post_accumulate_grad_hook(broken)
        return judge(*arguments)

    trainer.rewards = rewards
    with pytest.raises(FloatingPointError, match="grad_norm is nan in step 3: the step is not ta"):
        trainer.train()
    assert weight.isfinite().all() and (tmp_path / "checkpoint-2").exists()


def test_a_head_that_cannot_be_fused_wants_logits(tmp_path):
    head = LoraConfig(r=2, target_modules=["lm_head"])
    with pytest.raises(ValueError, match='cannot be fused.*loss_input "logits" works with any'):
        trainer_of(tmp_path, peft_config=head)
    trainer, records = trainer_of(tmp_path, peft_config=head, loss_input="logits", beta=0.1)
    trainer.train()
    assert records[4]["grad_norm"] > 0


def test_groups_and_minibatches_that_ranks_cannot_share(tmp_path):
    class Three(Accelerator):
        num_processes = 3

    with pytest.raises(ValueError, match="prompts_per_rollout must be a multiple of the 3 ranks"):
        trainer_of(tmp_path, accelerator=Three(cpu=True))
    with pytest.raises(ValueError, match="minibatches must divide the 4 sequences of each of 3"):
        trainer_of(tmp_path, accelerator=Three(cpu=True), prompts_per_rollout=3, minibatches=3)


def test_the_name_needs_the_extra_only_when_it_is_used(tmp_path):
    program = (
        "import sys; sys.modules.update(transformers=None, accelerate=None)\n"
        "import grpo_fused; from grpo_fused import *; print(len(grpo_fused.LOSSES))\n"
        "try: grpo_fused.nothing\nexcept AttributeError as error: print(error)\n"
        "try: grpo_fused.GRPOTrainer\nexcept ImportError as error: print('needs', error.name)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == [
        str(len(LOSSES)),
        "module 'grpo_fused' has no attribute 'nothing'",
        "needs accelerate",
    ]
