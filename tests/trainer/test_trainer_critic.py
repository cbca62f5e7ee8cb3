"""PPO in the trainer: values, rewards and advantages, one step, resume, and what is refused."""

import copy

import pytest
import torch
from batches import relative_error
from peft import LoraConfig, get_peft_model
from ppo_oracle import gae_equation, kl_rewards_equation, value_loss_equation, weight_equation
from trainer_ranks import by_length, sampled, step_gradients
from trainer_runs import HELD_OUT, FunctionRewards, RewardScores, trainer_of, weights_of
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from grpo_fused import GRPOTrainerConfig
from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.collect import collect

PPO = {"algorithm": "ppo", "loss_type": "ppo"}
STEP = PPO | {"max_completion_length": 7, "beta": 0.3, "entropy_coef": 0.02, "num_iterations": 2}
STEP |= {"max_grad_norm": 0.0, "gae_gamma": 0.9, "gae_lambda": 0.7, "value_cliprange": 0.05}
STEP |= {"value_coef": 0.3, "micro_batch_size": 5, "num_generations": 1, "prompts_per_rollout": 16}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def in_steps(prompts, completions, completion_ids, columns):
    """Scores of the first and the last token, but none for the third completion."""
    steps = [[(0, 0.5), (len(ids) - 1, float(sum(ids) % 3))] for ids in completion_ids]
    steps[2] = []
    totals = torch.tensor([sum(s for _, s in row) if row else float("nan") for row in steps])
    return RewardScores(totals, {"steps": totals}, steps, [1.0])


def some_without(prompts, completions, completion_ids, columns):
    scores = by_length(prompts, completions, completion_ids, columns)
    scores.total[4] = float("nan")
    return scores


def random_values(trainer):
    """Gives the critic a head that is not zero.

    Returns two functions from a batch to the critic in float64 and its values, as it is now and as
    it will be.
    """
    torch.manual_seed(7)
    if trainer.critic is not None:
        model, head = trainer.critic.unwrapped, trainer.critic.unwrapped.score
    else:
        model, head = trainer.unwrapped, trainer.unwrapped.value_head
    with torch.no_grad():
        head.weight.normal_(0, 0.1)
        head.bias.fill_(0.3)

    def values_of(model, batch):
        double = copy.deepcopy(model).double()
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        hidden = double.base_model(**inputs).last_hidden_state
        head = double.score if hasattr(double, "score") else double.value_head
        return double, head(hidden)[:, -batch.completion_ids.shape[1] - 1 : -1, 0]

    now = copy.deepcopy(model)
    return (lambda batch: values_of(now, batch)), (lambda batch: values_of(model, batch))


@pytest.mark.parametrize("critic", ["copy", "shared"])
@pytest.mark.parametrize("rewards", [some_without, in_steps])
def test_one_step_is_that_of_the_equations(tmp_path, critic, rewards):
    """In float64, one token at a time: rewards, advantages, both losses and both gradients."""
    trainer, _ = trainer_of(tmp_path, rewards=rewards, rollout_fn=sampled, critic=critic, **STEP)
    with torch.no_grad():  # away from the reference
        for parameter in trainer.unwrapped.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    before, values_of = random_values(trainer)
    gradients, experience, metrics = step_gradients_of(trainer)
    batch = experience.batch
    mask = batch.completion_mask
    silent = 2 if rewards is in_steps else 4
    assert not mask[silent].any() and mask.any(1).sum() == 15
    with torch.no_grad():
        assert relative_error(batch.values[mask], before(batch)[1][mask]) < 1e-5

    ids = [
        row[: int(n)]
        for row, n in zip(batch.completion_ids.tolist(), batch.attended.sum(1), strict=True)
    ]
    scores = rewards(None, None, ids, None)
    given = scores.total.nan_to_num(0.0)
    if scores.steps is not None:
        given = torch.zeros(mask.shape)
        for row, steps in enumerate(scores.steps):
            for end, score in steps:
                given[row, end] += score
    penalised = kl_rewards_equation(given, batch.old_logps, batch.ref_logps, mask, 0.3, "k1")
    found = gae_equation(penalised, batch.values, mask, 0.9, 0.7)
    advantages, returns = torch.tensor(found, dtype=torch.float64)
    assert relative_error(batch.returns[mask], returns[mask]) < 1e-5
    flat = advantages[mask]
    flat = (flat - flat.mean()) / (flat.var() + 1e-8).sqrt()
    assert relative_error(batch.advantages[mask], flat) < 1e-5
    assert batch.advantages[~mask].eq(0).all()

    double, values = values_of(batch)
    weights = weight_equation(mask, "token-mean")
    arguments = returns, mask, batch.values, 0.05, weights
    losses, slopes, expected = value_loss_equation(values.detach(), *arguments)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-4), name
    assert 0.1 < metrics["value/clip_ratio"] < 0.9
    assert metrics["value/loss"] == pytest.approx(float((losses * weights).sum()), rel=1e-4)
    kl = kl_rewards_equation(torch.zeros(16), batch.old_logps, batch.ref_logps, mask, -1.0, "k1")
    assert metrics["kl"] == pytest.approx(float(kl.sum() / mask.sum()), rel=1e-4)

    if critic == "copy":
        values.backward(slopes)
        theirs = {name: p.grad for name, p in double.named_parameters()}
        mine = {name: p.grad for name, p in trainer.critic.unwrapped.named_parameters()}
        double = copy.deepcopy(trainer.unwrapped).double()
        assert_close(mine, theirs)
        value_part = 0.0
    else:
        value_part = (values * slopes).sum() * 0.3
    policy = policy_loss(double, batch, flat)
    (policy + value_part).backward()
    assert_close(gradients, {name: p.grad for name, p in double.named_parameters()})


def policy_loss(double, batch, advantages):
    """PPO's clipped loss of every sequence's mean, and the entropy bonus over tokens."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = double(**inputs).logits[:, -batch.completion_ids.shape[1] - 1 : -1]
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    mask, chosen = batch.completion_mask, batch.completion_ids[..., None]
    ratio = (logps.gather(-1, chosen)[..., 0] - batch.old_logps.double()).exp()
    spread = torch.zeros(mask.shape, dtype=torch.float64)
    spread[mask] = advantages
    terms = torch.min(ratio * spread, ratio.clamp(0.8, 1.2) * spread) * mask
    per_sequence = terms.sum(1) / mask.sum(1).clamp(min=1)
    return -per_sequence.mean() - 0.02 * (entropy * mask).sum() / mask.sum()


def step_gradients_of(trainer):
    """`step_gradients` of a critic that moves, too."""
    update = trainer.update

    def moved(experience, signals):
        if trainer.critic is not None:
            trainer.critic.step = lambda: None
            with torch.no_grad():
                for parameter in trainer.critic.unwrapped.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        return update(experience, signals)

    trainer.update = moved
    return step_gradients(trainer)


def assert_close(found, expected):
    expected = {name: gradient for name, gradient in expected.items() if gradient is not None}
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-5 * largest, name


RUNS = {
    "copy": {"critic": "copy", "beta": 0.1},
    "shared": {"critic": "shared", "beta": 0.1, "critic_learning_rate": None},
    "adapters, copy": {"critic": "copy", "peft_config": LORA},
    "adapters, shared": {"critic": "shared", "peft_config": LORA, "beta": 0.1},
}


@pytest.mark.parametrize("name", RUNS)
def test_resuming_is_bit_identical(tmp_path, name):
    options = (
        PPO | RUNS[name] | {"num_iterations": 2, "max_steps": 4, "lr_scheduler_type": "linear"}
    )
    torch.manual_seed(0)
    whole, expected = trainer_of(tmp_path / "whole", save_steps=1, save_total_limit=None, **options)
    whole.train()
    for first in (1, 2, 3):
        path = str(tmp_path / "whole" / f"checkpoint-{first}")
        resumed, records = trainer_of(tmp_path / f"{first}", resume=path, **options)
        resumed.train()
        assert records == {step: expected[step] for step in range(first + 1, 5)}
        for one, other in ((resumed, whole), (resumed.critic, whole.critic)):
            if one is not None:
                weights = one.unwrapped.state_dict()
                for key, weight in other.unwrapped.state_dict().items():
                    assert torch.equal(weights[key], weight), (first, key)


def test_the_saved_model_is_the_policy_and_the_critic_starts_another_run(tmp_path):
    tokenizer = make_tokenizer()
    for critic in ("shared", "copy"):
        trainer, _ = trainer_of(tmp_path / critic, critic=critic, max_steps=1, **PPO)
        trainer.train()
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / critic / "model")
        weights = weights_of(trainer)
        assert all(torch.equal(p, weights[name]) for name, p in saved.named_parameters())
        assert not any("value_head" in name for name, _ in saved.named_parameters())
    folder = str(tmp_path / "copy" / "critic")
    again, _ = trainer_of(tmp_path / "again", tokenizer=tokenizer, critic_model=folder, **PPO)
    mine, theirs = again.critic.unwrapped.state_dict(), trainer.critic.unwrapped.state_dict()
    assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())
    assert mine["score.weight"].any()


def test_the_values_of_a_new_critic_are_zero_and_its_trunk_is_the_policys(tmp_path):
    trainer, _ = trainer_of(tmp_path, **PPO)
    assert not collect(trainer).batch.values.any()
    trunk = trainer.critic.unwrapped.base_model.state_dict()
    for name, weight in trainer.unwrapped.base_model.state_dict().items():
        assert torch.equal(trunk[name], weight) and trunk[name].data_ptr() != weight.data_ptr()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"critic": "shared"}, "critic requires algorithm ppo, got 'shared'"),
        ({"gae_lambda": 0.5}, "gae_lambda requires algorithm ppo, got 0.5"),
        (
            PPO | {"baseline": "batch"},
            "baseline must be group with .* ppo, whose .* 'batch'",
        ),
        (PPO | {"kl_estimator": "k2"}, "kl_estimator must be k3 with algorithm ppo"),
        (
            PPO | {"dynamic_sampling_rounds": 2, "num_generations": 2},
            "dynamic_sampling_rounds must be 1 with algorithm ppo",
        ),
        (
            PPO | {"critic": "shared", "loss_input": "logits"},
            'requires loss_input "hidden"',
        ),
        (
            PPO | {"critic": "shared", "critic_learning_rate": 1.0},
            "_learning_rate must be none",
        ),
        (
            PPO | {"mixed_precision": "fp16"},
            "must be no or bf16 with algorithm ppo",
        ),
        (
            PPO | {"reward_kl_estimator": "k3+"},
            "must be one of k1, k2, k3, abs",
        ),
        (PPO | {"gae_gamma": 1.5}, "gae_gamma must be at least 0 and at most 1, got 1.5"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOTrainerConfig(**options)


def test_critics_that_do_not_fit(tmp_path):
    adapted = get_peft_model(make_model(make_tokenizer()), LORA)
    with pytest.raises(ValueError, match="critic must be shared, or critic_model be given, for"):
        trainer_of(tmp_path, model=adapted, **PPO)
    with pytest.raises(ValueError, match="critic_model nowhere/at/all cannot be loaded"):
        trainer_of(tmp_path, critic_model="nowhere/at/all", **PPO)
    config = make_model(make_tokenizer()).config
    config.num_labels = 2
    AutoModelForTokenClassification.from_config(config).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="two must have one label, the value, got 2"):
        trainer_of(tmp_path, critic_model=str(tmp_path / "two"), **PPO)


@pytest.mark.parametrize("where", ["values", "gradient"])
def test_a_critic_that_is_nan_stops_the_run_before_the_step(tmp_path, where):
    trainer, _ = trainer_of(tmp_path, max_steps=3, save_steps=1, **PPO)
    step = trainer.critic.step

    def broken():
        step()
        with torch.no_grad():
            trainer.critic.unwrapped.score.bias.fill_(float("nan"))

    if where == "values":
        trainer.critic.step, message = broken, "the critic predicts values that are NaN"
    else:
        trainer.critic.clip_gradients = lambda: torch.tensor(float("nan"))
        message = r"value/grad_norm is nan in step 1; the step is not applied"
    before = {name: w.clone() for name, w in weights_of(trainer).items()}
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    if where == "gradient":
        assert all(torch.equal(before[name], w) for name, w in weights_of(trainer).items())
        assert trainer.step == 0
    else:
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_rollout_of_one_completion_a_prompt_needs_no_group(tmp_path, recwarn):
    options = {"num_generations": 1, "prompts_per_rollout": 16, "max_steps": 2}
    trainer, records = trainer_of(tmp_path, eval_data=HELD_OUT[:4], eval_steps=2, **options, **PPO)
    trainer.train()
    assert records[1]["grad_norm"] > 0 and not [w for w in recwarn if "num_gen" in str(w.message)]


def test_without_any_reward_nothing_is_learned(tmp_path):
    def silent(prompts, completions, completion_ids, columns):
        totals = torch.full((len(completion_ids),), float("nan"))
        return RewardScores(totals, {"none": totals})

    trainer, records = trainer_of(
        tmp_path, rewards=FunctionRewards(silent), max_steps=1, weight_decay=0.0, **PPO
    )
    trainer.train()
    assert records[1]["grad_norm"] == records[1]["value/grad_norm"] == 0.0
    assert records[1]["num_tokens"] == 0
