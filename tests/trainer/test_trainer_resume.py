"""A run that was stopped goes on bit by bit as if it had not been, wherever it was stopped."""

import os
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from trainer_runs import HELD_OUT, ROWS, Scores, judge, trainer_of, weights_of
from transformers import Qwen3ForCausalLM

from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer import state
from grpo_fused.trainer.checkpoint import checkpoints
from grpo_fused.trainer.state import checksum

# Steps 4 to 6 are inside the buffers of other rollouts than 2; the reference moves at 4 and 8.
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
BUFFERED = {"num_iterations": 2, "minibatches": 2, "beta": 0.04, "max_steps": 9}
BUFFERED |= {"reference_refresh_rollouts": 1, "lr_scheduler_type": "cosine", "warmup_steps": 2}
RUNS = {
    "on policy": {"max_steps": 4},
    "buffered": BUFFERED,
    "moving average, evaluated": BUFFERED
    | {"reference_mix": 0.5, "eval_steps": 3, "eval_data": HELD_OUT[:5], "eval_temperature": 1.0},
    "adapters": BUFFERED | {"peft_config": LORA},
    "many passes, gspo": {
        "max_steps": 3,
        "num_iterations": 3,
        "loss_type": "gspo",
        "entropy_coef": 0.01,
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_resume_from_every_step_is_bit_identical(tmp_path, name):
    options = RUNS[name]
    whole, expected = trainer_of(tmp_path / "whole", save_steps=1, save_total_limit=None, **options)
    whole.train()
    found = checkpoints(tmp_path / "whole")
    assert len(found) == options["max_steps"]
    for path in found[:-1]:
        seed = 3 if "peft_config" in options else 99  # of weights: what is not frozen is loaded
        resumed, records = trainer_of(tmp_path / "again", resume=str(path), seed=seed, **options)
        if options.get("beta") and "peft_config" not in options:
            torch.nn.init.ones_(next(resumed.reference.model.parameters()))  # all is loaded
        resumed.train()
        first = int(path.name.split("-")[1]) + 1
        assert list(records) == list(range(first, options["max_steps"] + 1))
        for step, metrics in records.items():
            assert metrics == expected[step], (path.name, step)
        for name, weight in weights_of(whole).items():
            assert torch.equal(weights_of(resumed)[name], weight), (path.name, name)


def test_a_checkpoint_of_adapters_is_small_and_knows_its_model(tmp_path):
    options = {"peft_config": RUNS["adapters"]["peft_config"], "max_steps": 2, "save_steps": 1}
    trainer, _ = trainer_of(tmp_path, **options)
    trainer.train()
    (path,) = (tmp_path / "checkpoint-1").glob("model.safetensors")
    adapters = sum(p.numel() for p in trainer.unwrapped.parameters() if p.requires_grad)
    assert 4 * adapters <= path.stat().st_size < 4 * adapters + 2000
    other, _ = trainer_of(tmp_path, resume="latest", seed=99, **options)
    with pytest.raises(ValueError, match="resume: frozen weights is .*, the checkpoint has"):
        other.train()


def test_adapters_with_other_settings_cannot_be_resumed(tmp_path):
    options = {"max_steps": 1, "save_steps": 1}
    trainer_of(tmp_path, peft_config=LORA, **options)[0].train()
    other = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_alpha=64)
    trainer, _ = trainer_of(tmp_path, peft_config=other, resume="latest", **options)
    with pytest.raises(ValueError, match="resume: adapters is .*'lora_alpha': 64.* has .*: 8,"):
        trainer.train()


@pytest.fixture
def not_ignored():
    """A shell that starts pytest in the background leaves SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_and_nothing_is_lost(tmp_path, number, not_ignored):
    whole, expected = trainer_of(tmp_path / "whole", **BUFFERED)
    whole.train()
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    calls = []

    def interrupting(prompts, *arguments):
        calls.extend([0] * (len(prompts) == 16))  # not of an evaluation
        if len(calls) == 2:  # while the second rollout is judged
            os.kill(os.getpid(), number)
            if number == signal.SIGTERM:  # a launcher forwards what its group got as well
                os.kill(os.getpid(), number)
        return judge(prompts, *arguments)

    held_out = {"eval_steps": 1, "eval_data": HELD_OUT[:2]}
    stopped, records = trainer_of(tmp_path / "run", rewards=interrupting, **BUFFERED | held_out)
    assert stopped.train() == (5, number)
    assert "eval/reward" in records[4] and "eval/reward" not in records[5]  # nobody is kept waiting
    records = {step: records[step] for step in range(1, 6)}
    records = {s: {k: v for k, v in r.items() if "eval" not in k} for s, r in records.items()}
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-5"]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers

    resumed, later = trainer_of(tmp_path / "run", resume="latest", seed=99, **BUFFERED)
    assert resumed.train() == (9, None)
    assert records | later == expected


def test_a_second_signal_does_what_it_always_does(tmp_path, not_ignored):
    def impatient(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return judge(*arguments)

    trainer, _ = trainer_of(tmp_path, rewards=impatient)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_a_signal_that_is_ignored_stays_so(tmp_path, not_ignored):
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def interrupting(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return judge(*arguments)

    trainer, _ = trainer_of(tmp_path, rewards=interrupting)
    assert trainer.train() == (4, None)


def test_latest_of_nothing_is_a_fresh_start_and_more_steps_may_follow(tmp_path):
    expected = trainer_of(tmp_path / "whole", max_steps=4)
    expected[0].train()
    first, records = trainer_of(tmp_path / "run", resume="latest", max_steps=2, save_steps=1)
    first.train()
    second, later = trainer_of(tmp_path / "run", resume="latest", max_steps=4, seed=99)
    second.train()
    assert records | later == expected[1]


def test_random_states_do_not_depend_on_what_accelerate_can_read(tmp_path, monkeypatch):
    """It passes over those that it cannot."""
    whole, expected = trainer_of(tmp_path, max_steps=3, save_steps=1, save_total_limit=None)
    whole.train()
    monkeypatch.delattr("accelerate.checkpointing.random.setstate")
    monkeypatch.setattr(state, "random", SimpleNamespace(setstate=lambda state: None))
    resumed, records = trainer_of(
        tmp_path / "again", resume=str(tmp_path / "checkpoint-1"), max_steps=3, seed=99
    )
    resumed.train()
    assert records == {step: expected[step] for step in (2, 3)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    trainer_of(folder, max_steps=1, save_steps=1)[0].train()
    return folder


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 0.1}, r"resume: beta is 0.1, the checkpoint has 0.0"),
        ({"loss_type": "grpo"}, r"resume: loss_type is 'grpo', the checkpoint has 'dapo'"),
        ({"objective": {"epsilon_low": 0.1}}, r"resume: objective is .* the checkpoint has \{\}"),
        ({"lr_scheduler_type": "linear", "max_steps": 1}, "resume: lr_scheduler_type"),
        ({"data": ROWS[:7]}, "resume: rows is 7, the checkpoint has 80"),
        ({"data": ROWS[::-1]}, "resume: content of rows is "),
        (
            {"resume": "nowhere"},
            "resume must be latest or the folder of a checkpoint, got 'nowhere'",
        ),
        ({"resume": None}, "output_dir .* has checkpoint-1 of an earlier run: resume=latest"),
    ],
)
def test_another_run_cannot_be_resumed(saved, options, message):
    trainer, _ = trainer_of(saved, **{"resume": "latest", **options})
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_the_checkpoints_of_another_run_are_not_replaced(saved, tmp_path):
    options = {"max_steps": 2, "save_steps": 1}
    trainer_of(tmp_path, **options)[0].train()
    trainer, _ = trainer_of(tmp_path, resume=str(saved / "checkpoint-1"), **options)
    with pytest.raises(ValueError, match="has checkpoint-2 of an earlier run"):
        trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_what_a_checkpoint_knows_of_rows_is_the_same_in_every_process():
    program = (
        "from grpo_fused.trainer.state import checksum\n"
        "print(checksum([{'prompt': 'a', 1: {'b', 'c', 'd'}, ('x', 2): object(), 'e': [0.5]}]))"
    )
    found = set()
    for seed in ("1", "2", "3"):
        command = [sys.executable, "-c", program]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        found.add(subprocess.check_output(command, env=environment, text=True))
    assert len(found) == 1
    assert checksum([{"prompt": "a"}]) != checksum([{"prompt": "b"}])


def test_an_evaluation_changes_no_draw_of_a_reward(tmp_path):
    def drawn(*arguments):
        totals = [random.random() + np.random.random() for _ in arguments[0]]
        return Scores(torch.tensor(totals), {})

    options = {"rewards": drawn, "eval_data": HELD_OUT[:3], "eval_temperature": 1.0}
    rewards = []
    for every in (1, 4):
        trainer, records = trainer_of(tmp_path / str(every), eval_steps=every, **options)
        random.seed(0)
        np.random.seed(0)
        trainer.train()
        rewards.append([records[step]["reward"] for step in range(1, 5)])
    assert rewards[0] == rewards[1] and len(set(rewards[0])) == 4


def test_another_number_of_ranks_cannot_be_resumed(tmp_path):
    trainer_of(tmp_path, max_steps=1, save_steps=1)[0].train()
    path = tmp_path / "checkpoint-1" / "trainer.json"
    path.write_text(path.read_text().replace('"ranks": 1', '"ranks": 2'))
    trainer, _ = trainer_of(tmp_path, max_steps=2, resume="latest")
    with pytest.raises(ValueError, match="resume: ranks is 1, the checkpoint has 2"):
        trainer.train()


def test_the_length_of_a_schedule_is_part_of_the_run(tmp_path):
    options = {"save_steps": 1, "lr_scheduler_type": "linear"}
    trainer_of(tmp_path, max_steps=1, **options)[0].train()
    with pytest.raises(ValueError, match="resume: max_steps is 2, the checkpoint has 1"):
        trainer_of(tmp_path, max_steps=2, resume="latest", **options)[0].train()


def test_what_does_not_touch_the_weights_may_change(saved):
    trainer, _ = trainer_of(saved, resume="latest", max_steps=2, save_steps=7, eval_batch_size=3)
    assert trainer.train().step == 2


def test_adapters_of_a_tied_model_are_small(tmp_path):
    """The embedding is in a model's state under the head's name as well."""
    torch.manual_seed(0)
    config = make_model(make_tokenizer()).config
    config.tie_word_embeddings = True
    model = Qwen3ForCausalLM(config)
    trainer, _ = trainer_of(tmp_path, model=model, peft_config=LORA, save_steps=2)
    trainer.train()
    saved = load_file(checkpoints(tmp_path)[0] / "model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    resumed, _ = trainer_of(
        tmp_path, model=Qwen3ForCausalLM(config), peft_config=LORA, resume="latest"
    )
    with pytest.raises(ValueError, match="frozen weights is"):  # of another base model
        resumed.train()
