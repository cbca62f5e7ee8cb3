"""Invalid input and faults: an error that names the cause, or a defined result."""

import errno
import resource
import tempfile
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import ProjectConfiguration
from peft import LoraConfig
from trainer_runs import (
    ROWS,
    MemoryLog,
    Rewards,
    RewardScores,
    partial_credit,
    trainer_of,
    weights_of,
)

from grpo_fused import GRPOTrainer, GRPOTrainerConfig
from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.run import summary
from grpo_fused.trainer.run.errors import TrainingError, explain
from grpo_fused.trainer.run.log import RunLog, read_metrics
from grpo_fused.trainer.run.summary import RunSummary, cause_of_idleness, duration
from grpo_fused.trainer.run.validation import check_accelerator, check_model


def test_completions_of_only_an_end_token(tmp_path):
    def ends(prompts, trainer):
        return {"completion_ids": [[1]] * len(prompts)}

    trainer, records = trainer_of(tmp_path, rollout_fn=ends, rewards=lambda *_: RewardScores(
        torch.arange(16.0), {}))  # fmt: skip
    trainer.train()
    assert records[1]["completions/max_length"] == 1 and records[1]["grad_norm"] > 0


@pytest.mark.parametrize("completion", [[], [5, 5]])
def test_nothing_to_train_on_is_a_step_that_changes_nothing(tmp_path, completion):
    """All completions are empty, or truncated and masked: the loss is a differentiable 0."""

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


@pytest.mark.parametrize(
    ("total", "options", "cause", "unscored"),
    [
        (float("nan"), {}, "a rollout trains nothing: all rewards are None", 4),
        (1.0, {}, "the gradient was 0 in the last 3 steps: the rewards in every group are equ", 0),
        (1.0, {"max_steps": 2}, "the gradient was 0 in the last 2 steps: the rewards in every", 0),
        (1.0, {"learning_rate": 0.0}, None, 0),
    ],
)
def test_a_run_that_learns_nothing_says_so_once(
    tmp_path, total, options, cause, unscored, monkeypatch
):
    monkeypatch.setattr(summary, "PATIENCE", 3)
    options = {"max_steps": 4, "save_steps": 3, "save_total_limit": None} | options
    steps = options["max_steps"]

    def rewards(*_):
        return RewardScores(torch.full((16,), total), {})

    trainer, _ = trainer_of(tmp_path, rewards=rewards, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = trainer.train()
    assert [cause in str(one.message) for one in caught] == [True] * (cause is not None), caught
    assert result.steps_without_gradient == steps and result.rollouts_without_reward == unscored
    line = summary.last_line(result, trainer.config)
    assert f"no gradient in {steps} of {steps} steps" in line
    assert (f"rollouts without any reward: {unscored}" in line) == bool(unscored)
    if steps == 4:  # a resumed run counts on, and does not warn again
        resume = str(tmp_path / "checkpoint-3")
        trainer, _ = trainer_of(tmp_path, rewards=rewards, **options | {"resume": resume})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = trainer.train()
        assert again._replace(seconds=0) == result._replace(seconds=0)


def test_a_run_in_which_some_steps_change_nothing_is_quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "PATIENCE", 3)

    def rewards(*_):
        return RewardScores(torch.arange(16.0) * (trainer.step % 3 == 2), {})

    trainer, _ = trainer_of(tmp_path, rewards=rewards, max_steps=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = trainer.train()
    assert result.steps_without_gradient == 4
    assert (result.first_reward, result.last_reward) == (2.5, 2.5)


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"frac_reward_none": 1.0}, "all rewards are None"),
        ({"num_tokens": 0.0}, "all completions are empty, or truncated and masked"),
        ({"frac_reward_zero_std": 1.0}, "the rewards in every group are equal"),
        ({}, "the objective clips all tokens"),
    ],
)
def test_causes_of_a_gradient_of_0(values, cause):
    plain = {"frac_reward_none": 0.0, "num_tokens": 9.0, "frac_reward_zero_std": 0.5}
    assert cause_of_idleness(plain | values).startswith(cause)


@pytest.mark.parametrize(
    ("rewards", "ends"),
    [([], (None, None)), ([1], (1, 1)), ([1, 3], (1, 3)), ([1, 2, 3, 5, 9], (1.5, 7)),
     ([*range(30)], (4.5, 24.5))],
)  # fmt: skip
def test_rewards_at_both_ends_of_a_run(rewards, ends):
    counts = RunSummary()
    for reward in rewards:
        counts.add_rollout({"reward": reward, "frac_reward_none": 0.0}, show=False)
    assert counts.result(3, None, 5.0, "x")[2:5] == (*ends, 5.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (59.99, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_group_of_one(tmp_path):
    """Its advantages of whole completions are 0; rewards of steps train."""
    trainer, _ = trainer_of(tmp_path / "whole", num_generations=1)
    with pytest.raises(ValueError, match="num_generations must be at least 2"):
        trainer.train()

    def steps(completion_ids):
        return [[(i, float(token)) for i, token in enumerate(ids)] for ids in completion_ids]

    trainer, records = trainer_of(tmp_path / "steps", rewards=Rewards(steps), num_generations=1)
    trainer.train()
    assert records[4]["grad_norm"] > 0


def fails(*_):
    raise RuntimeError("no such answer")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"eval_steps": 3}, ValueError, "eval_steps = 3 requires eval_data, got None"),
        ({"eval_steps": 3, "eval_data": []}, ValueError, "eval_data has no rows"),
        ({"report_to": ["wandbb"]}, ValueError, "report_to: wandbb is not installed or unknown"),
        ({"rewards": fails}, RuntimeError, "no such answer"),
        (
            {"rewards": lambda *_: RewardScores(torch.ones(3), {})},
            ValueError,
            r"total must have shape \(16,\), got \(3,\)",
        ),
        (
            {"rewards": lambda *_: RewardScores(torch.full((16,), float("inf")), {})},
            ValueError,
            "total must be finite or NaN",
        ),
    ],
)
def test_bad_input_is_an_error_that_names_it(tmp_path, options, error, message):
    log = MemoryLog()
    with pytest.raises(error, match=message):
        trainer, _ = trainer_of(tmp_path, run_log=log, **options)
        trainer.train()
    assert not log.steps


@pytest.mark.parametrize(
    "config, message",
    [
        ({"beta": 0.1}, r"got dict; GRPOTrainerConfig\(\*\*config\) makes one"),
        (None, "got NoneType$"),
        (GRPOTrainerConfig, "got type$"),
        (SimpleNamespace(beta=0.1), "got SimpleNamespace$"),
    ],
)
def test_a_config_of_another_type(config, message):
    with pytest.raises(ValueError, match=f"config must be a GRPOTrainerConfig, {message}"):
        GRPOTrainer("unused", partial_credit, config, ROWS)


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
        return partial_credit(*arguments)

    trainer.rewards = rewards
    with pytest.raises(FloatingPointError, match="grad_norm is nan in step 3; the step is not ap"):
        trainer.train()
    assert weight.isfinite().all() and (tmp_path / "checkpoint-2").exists()


def test_a_disk_that_fills_while_training(tmp_path):
    """The error names the last good checkpoint, and the log has every step."""
    log = RunLog(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def rewards(*arguments):
        if trainer.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return partial_credit(*arguments)

    trainer, _ = trainer_of(tmp_path, rewards=rewards, run_log=log, save_steps=1)
    try:
        with (
            pytest.warns(UserWarning, match="reward.png could not be drawn"),
            pytest.raises(TrainingError, match="checkpoint-3 could not.*last good .*checkpoint-2"),
        ):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    again, _ = trainer_of(tmp_path, run_log=log, save_steps=1, resume="latest")
    assert again.train()[:2] == (4, None)


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    """torch's error neither says so nor has the system's as its cause."""
    of_torch = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert explain(of_torch, tmp_path) == f"RuntimeError: {of_torch}", "the disk has space"
    of_system = OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
    wrapped = ValueError("cannot save")
    wrapped.__cause__ = of_system

    def full(dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    for error in (of_torch, of_system, wrapped):
        assert explain(error, "runs/x").startswith("no space left in runs/x: [Errno 28] No space")
    assert "unexpected pos" in explain(of_torch, "runs/x")
    denied = PermissionError(errno.EACCES, "Permission denied", "runs/x/model")
    assert explain(denied, "runs/x") == "[Errno 13] Permission denied: 'runs/x/model'"


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    class Log(MemoryLog):
        def write(self, step, metrics):
            raise OSError(28, "No space left on device", "metrics.jsonl")

    trainer, _ = trainer_of(tmp_path, run_log=Log())
    with pytest.raises(TrainingError, match="step 1 could not be logged .no space left .*metrics"):
        trainer.train()
    trainer, _ = trainer_of(tmp_path)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    tracker = SimpleNamespace(log=fail, finish=fail, name="tensorboard", main_process_only=False)
    trainer.accelerator.trackers, trainer.has_logs = [tracker], True
    with (
        pytest.raises(TrainingError, match="step 1 could not be logged .no space left"),
        pytest.warns(UserWarning, match="tensorboard could not be ended .no space left"),
    ):
        trainer.train()


def test_a_refused_run_leaves_no_folder_of_a_tracker(tmp_path):
    options = {"report_to": ["tensorboard"], "max_steps": 1, "save_steps": 1}
    trainer_of(tmp_path, max_steps=1, save_steps=1)[0].train()
    trainer, _ = trainer_of(tmp_path, resume="latest", beta=0.5, **options)
    with pytest.raises(ValueError, match="resume: beta"):
        trainer.train()
    trainer, _ = trainer_of(tmp_path / "new", rewards=fails, **options)
    with pytest.raises(RuntimeError, match="no such answer"):
        trainer.train()
    assert not (tmp_path / "new").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "model"}


def test_a_head_that_cannot_be_fused_requires_logits(tmp_path):
    head = LoraConfig(r=2, target_modules=["lm_head"])
    with pytest.raises(ValueError, match='cannot be fused.*loss_input "logits" works with any'):
        trainer_of(tmp_path, peft_config=head)
    trainer, records = trainer_of(tmp_path, peft_config=head, loss_input="logits", beta=0.1)
    trainer.train()
    assert records[4]["grad_norm"] > 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mixed_precision": "bf16"}, "mixed_precision is 'no', but the accelerator has 'bf16'"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1, .*, got 2"),
        (
            {"parallelism_config": SimpleNamespace(tp_size=2, cp_size=1)},
            "must be data parallel .* got tensor parallel size 2, context parallel size 1",
        ),
        (
            {"project_configuration": ProjectConfiguration(automatic_checkpoint_naming=True)},
            "the accelerator's automatic_checkpoint_naming must be False",
        ),
        ({"distributed_type": DistributedType.FSDP}, "FSDP must be version 2"),
    ],
)
def test_incompatible_accelerators(settings, message):
    plain = {"mixed_precision": "no", "gradient_accumulation_steps": 1, "parallelism_config": None}
    plain |= {"distributed_type": "NO", "is_fsdp2": False, "project_configuration": None}
    check_accelerator(GRPOTrainerConfig(), SimpleNamespace(**plain))
    with pytest.raises(ValueError, match=message):
        check_accelerator(GRPOTrainerConfig(), SimpleNamespace(**plain | settings))


def test_gradients_in_float16_cannot_be_scaled(tmp_path):
    model, config = make_model(make_tokenizer()), GRPOTrainerConfig(mixed_precision="fp16")
    check_model(model, config)
    with pytest.raises(ValueError, match="mixed_precision fp16 requires a float32 model, .* got "):
        check_model(model.half(), config)
    check_model(model.half(), GRPOTrainerConfig())


def test_groups_and_minibatches_that_cannot_be_divided_among_ranks(tmp_path):
    class Three(Accelerator):
        num_processes = 3

    with pytest.raises(ValueError, match=r"num_generations must be a multiple of the 3 .* 4 \* 4"):
        trainer_of(tmp_path, accelerator=Three(cpu=True))
    with pytest.raises(ValueError, match="minibatches must divide the 4 sequences of each of 3"):
        trainer_of(tmp_path, accelerator=Three(cpu=True), prompts_per_rollout=3, minibatches=3)
