"""Settings: accepted and rejected values, and a help text for each."""

import dataclasses

import pytest

from grpo_fused import LOSSES, Clip, GRPOTrainerConfig
from grpo_fused.trainer import TrainConfig

GIVEN = {"model": "folder", "data": "rows.jsonl", "rewards": ["math:gcd"]}


def test_no_two_configs_share_a_list():
    one, other = GRPOTrainerConfig(), GRPOTrainerConfig()
    one.report_to.append("wandb")
    assert other.report_to == ["tensorboard"]
    assert GRPOTrainerConfig(report_to="none").report_to == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"max_steps": 2.0}, "max_steps must be an integer, got 2.0"),
        ({"max_steps": True}, "max_steps must be an integer, got True"),
        ({"max_steps": None}, "max_steps must be an integer, got None"),
        ({"seed": 2**32}, "seed must be at least 0 and at most 4294967295, got 4294967296"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be at least 0, got inf"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"loss_type": "grop"}, "must be one of grpo, .*, got 'grop' .did you mean grpo."),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing must be true or false, got 1"),
        ({"report_to": "wandb"}, "report_to must be a list of strings, got 'wandb'"),
        ({"report_to": [3]}, r"report_to\[0\] must be a string, got 3"),
        ({"adam_betas": [0.9]}, r"adam_betas must be two numbers in .0, 1., got \[0.9\]"),
        ({"adam_betas": [0.9, 1.0]}, r"adam_betas must be two numbers in .0, 1., got \[0.9, 1.0\]"),
        ({"minibatches": 7}, "minibatches must divide .* = 64, got 7"),
        ({"objective": {"epsilon": 0.1}}, r"objective: dapo has .*'epsilon' \(did you mean epsi"),
        ({"objective": {"epsilon_low": -1.0}}, "epsilon_low must be"),
        ({"objective": {"epsilon_low": "x"}}, r"objective.epsilon_low must be a number, got 'x'"),
        (
            {"loss_type": "gpg", "objective": {"x": 1.0}},
            "gpg has no parameters, got 'x'",
        ),
        ({"rollout_correction_floor": 3.0}, "floor must be below .*cap = 3.0, got 3.0"),
        ({"reference_refresh_rollouts": 2}, "reference_refresh_rollouts requires beta > 0"),
        (
            {"reference_mix": 0.5, "beta": 0.1},
            "reference_mix below 1 requires reference_refr",
        ),
        (
            {"warmup_steps": 5},
            "warmup_steps requires another lr_scheduler_type, .* got 5 with",
        ),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of token"),
        (
            {"loss_type": "gmpo", "importance_sampling_level": "token"},
            "importance_sampling_level must be sequence for Gmpo, got 'token'",
        ),
    ],
)
def test_invalid_values_are_rejected_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOTrainerConfig(**options)


@pytest.mark.parametrize("missing", GIVEN)
def test_required_settings_of_train(missing):
    with pytest.raises(ValueError, match=f"{missing} is required"):
        TrainConfig(**{name: value for name, value in GIVEN.items() if name != missing})


def test_held_out_rows_require_eval_steps():
    with pytest.raises(ValueError, match="eval_data requires eval_steps, got 'rows.jsonl' without"):
        TrainConfig(**GIVEN, eval_data="rows.jsonl")


def test_a_quantized_model_is_not_sharded():
    with pytest.raises(ValueError, match="quantization must be none with tensor_.*, got '8bit'"):
        TrainConfig(**GIVEN, quantization="8bit", fully_shard=True)
    with pytest.raises(ValueError, match="quantization must be one of 4bit, 8bit, got '2bit'"):
        TrainConfig(**GIVEN, quantization="2bit")


def test_one_weight_per_reward():
    with pytest.raises(ValueError, match="reward_weights must be one per reward, 1, got 2"):
        TrainConfig(**GIVEN, reward_weights=[1.0, 2.0])


@pytest.mark.parametrize("loss_type", LOSSES)
def test_objective_parameters_replace_those_of_the_loss(loss_type):
    objective = LOSSES[loss_type].objective
    config = GRPOTrainerConfig(loss_type=loss_type)
    assert config.objective_or_default == objective
    if isinstance(objective, Clip):
        config = GRPOTrainerConfig(loss_type=loss_type, objective={"delta": 4.0})
        assert config.objective_or_default == dataclasses.replace(objective, delta=4.0)


def test_off_policy_is_more_than_one_step_per_rollout():
    assert not GRPOTrainerConfig().is_off_policy
    assert GRPOTrainerConfig(minibatches=2).is_off_policy
    assert GRPOTrainerConfig(num_iterations=2).is_off_policy
