"""A resumed run is bit-identical to one that was never interrupted, wherever it stopped."""

import inspect
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
from trainer_runs import HELD_OUT, ROWS, RewardScores, partial_credit, trainer_of, weights_of
from transformers import Qwen3ForCausalLM

from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.experience import Batch, Experience
from grpo_fused.trainer.rollouts.rollout import pad
from grpo_fused.trainer.run import resume_checks, state
from grpo_fused.trainer.run.checkpoint import list_checkpoints
from grpo_fused.trainer.run.log import read_metrics
from grpo_fused.trainer.run.resume_checks import checksum_rows
from grpo_fused.trainer.run.signals import StopSignals

# Rollouts begin at steps 1, 5 and 9, and the reference is refreshed before the last two.
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
BUFFERED = {"num_iterations": 2, "minibatches": 2, "beta": 0.04, "max_steps": 9}
BUFFERED |= {"reference_refresh_rollouts": 1, "lr_scheduler_type": "cosine", "warmup_steps": 2}
MOVING_AVERAGE = BUFFERED | {"reference_mix": 0.5, "eval_steps": 3, "eval_temperature": 1.0}
MOVING_AVERAGE |= {"eval_data": HELD_OUT[:5]}
GSPO = {"max_steps": 3, "num_iterations": 3, "loss_type": "gspo", "entropy_coef": 0.01}


def coarse(prompts, completions, completion_ids, columns):
    """Rewards of which some groups of four are equal."""
    totals = torch.tensor([float(len(set(text)) == 2) for text in completions])
    return RewardScores(totals, {"two": totals})


DYNAMIC = {"rewards": coarse, "dynamic_sampling_rounds": 4, "minibatches": 2, "max_steps": 6}
# (settings, steps to resume from): every step, or one before, at and after the first refresh.
RUNS = {
    "on policy": ({"max_steps": 3}, [1, 2]),
    "buffered": (BUFFERED, range(1, 9)),
    "moving average, evaluated": (MOVING_AVERAGE, [2, 4, 7]),
    "adapters": (BUFFERED | {"peft_config": LORA}, [3, 4, 6]),
    "many passes, gspo": (GSPO, [1, 2]),
    "dynamic sampling": (DYNAMIC, range(1, 6)),
}


def full_run(folder, options):
    """(folder, trainer, records) of a run that keeps a checkpoint of every step."""
    torch.manual_seed(0)
    trainer, records = trainer_of(folder, save_steps=1, save_total_limit=None, **options)
    trainer.train()
    assert len(list_checkpoints(folder)) == options["max_steps"]
    return folder, trainer, records


@pytest.fixture(scope="module")
def buffered(tmp_path_factory):
    return full_run(tmp_path_factory.mktemp("buffered"), BUFFERED)


@pytest.mark.parametrize("name", RUNS)
def test_resuming_is_bit_identical(tmp_path, name, buffered):
    options, steps = RUNS[name]
    is_shared = name == "buffered"
    folder, whole, expected = buffered if is_shared else full_run(tmp_path / "whole", options)
    weights = weights_of(whole)
    if "dynamic_sampling_rounds" in options:
        rounds = {expected[step]["dynamic_sampling/rounds"] for step in (1, 3, 5)}
        position, plain = whole.data_position, whole.rollouts * whole.config.prompts_per_rollout
        assert len(rounds) > 1 and position > plain and position % 4, "else the case tests little"
    for first in steps:
        seed = 3 if "peft_config" in options else 99  # frozen weights are not in checkpoints
        path = str(folder / f"checkpoint-{first}")
        resumed, records = trainer_of(tmp_path / "again", resume=path, seed=seed, **options)
        if options.get("beta") and "peft_config" not in options:
            torch.nn.init.ones_(next(resumed.reference.model.parameters()))  # must be loaded
        resumed.train()
        assert list(records) == list(range(first + 1, options["max_steps"] + 1))
        for step, metrics in records.items():
            assert metrics == expected[step], (path, step)
        for name, weight in weights_of(resumed).items():
            assert torch.equal(weight, weights[name]), (path, name)


def test_a_checkpoint_of_adapters_is_small_and_bound_to_its_base_model(tmp_path):
    options = {"peft_config": LORA, "max_steps": 2, "save_steps": 1}
    trainer, _ = trainer_of(tmp_path, **options)
    trainer.train()
    (path,) = (tmp_path / "checkpoint-1").glob("model.safetensors")
    adapters = sum(p.numel() for p in trainer.unwrapped.parameters() if p.requires_grad)
    assert 4 * adapters <= path.stat().st_size < 4 * adapters + 2000
    other, _ = trainer_of(tmp_path, resume="latest", seed=99, **options)
    with pytest.raises(
        ValueError, match="resume: the frozen weights are not .*: the base model is"
    ):
        other.train()


def test_adapters_with_other_settings_cannot_be_resumed(tmp_path):
    options = {"max_steps": 1, "save_steps": 1}
    trainer_of(tmp_path, peft_config=LORA, **options)[0].train()
    other = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_alpha=64)
    trainer, _ = trainer_of(tmp_path, peft_config=other, resume="latest", **options)
    with pytest.raises(
        ValueError, match="resume: lora_alpha of adapter default is 64, the .* has 8;"
    ):
        trainer.train()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_and_nothing_is_lost(
    tmp_path, number, buffered, default_sigint
):
    _, _, expected = buffered
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    calls = []

    def interrupting(prompts, *arguments):
        calls.extend([0] * (len(prompts) == 16))  # not in an evaluation
        if len(calls) == 2:  # while the second rollout is scored
            os.kill(os.getpid(), number)
            if number == signal.SIGTERM:  # a launcher forwards it as well
                os.kill(os.getpid(), number)
        return partial_credit(prompts, *arguments)

    held_out = {"eval_steps": 1, "eval_data": HELD_OUT[:2]}
    stopped, records = trainer_of(tmp_path / "run", rewards=interrupting, **BUFFERED | held_out)
    assert stopped.train()[:2] == (5, number)
    assert "eval/reward" in records[4] and "eval/reward" not in records[5], "no wait for it"
    records = {step: records[step] for step in range(1, 6)}
    records = {s: {k: v for k, v in r.items() if "eval" not in k} for s, r in records.items()}
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-5"]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers

    resumed, later = trainer_of(tmp_path / "run", resume="latest", seed=99, **BUFFERED)
    assert resumed.train()[:2] == (9, None)
    assert records | later == expected


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_the_evaluation_of_an_interrupted_step_is_made_up_for(tmp_path, stop, no_plot):
    """metrics.jsonl is that of a run without the signal: at the first, a middle and the last."""
    options = {"eval_steps": 1, "eval_data": HELD_OUT[:2], "eval_temperature": 1.0, "run_log": None}

    def interrupting(prompts, *arguments):
        if len(prompts) == 16 and trainer.step == stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return partial_credit(prompts, *arguments)

    whole, _ = trainer_of(tmp_path / "whole", **options)
    expected = whole.train()
    trainer, _ = trainer_of(tmp_path / "run", rewards=interrupting, **options)
    assert trainer.train()[:2] == (stop, signal.SIGTERM)
    before = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert before[-1]["step"] == stop and "eval/reward" not in before[-1]
    for _ in range(2):  # again from the same checkpoint: the second replaces what the first did
        resumed, _ = trainer_of(tmp_path / "run", resume="latest", seed=99, **options)
        result = resumed.train()
    logs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "run")]
    assert [line["step"] for line in logs[1]] == [0, 1, 2, 3, 4]
    for line, wanted in zip(*logs, strict=True):
        assert list(line) == list(wanted), "in the same order"
        assert {k: v for k, v in line.items() if "seconds" not in k} == {
            k: v for k, v in wanted.items() if "seconds" not in k
        }
    assert result._replace(seconds=0, output_dir=None) == expected._replace(
        seconds=0, output_dir=None
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_answered_at_once(tmp_path, number, default_sigint, capsys):
    """Once, above the progress bar, and only by the process that has one."""
    said = []

    def interrupting(*arguments):
        os.kill(os.getpid(), number)
        said.append(capsys.readouterr().err)
        if number == signal.SIGTERM:
            os.kill(os.getpid(), number)
        return partial_credit(*arguments)

    trainer, _ = trainer_of(tmp_path, rewards=interrupting, progress_bar=True)
    assert trainer.train().signal == number
    lines = said[0].replace("\r", "\n").splitlines()
    (line,) = [line for line in lines if "stopping after this step" in line]
    assert line.startswith(("SIGTERM: ", "Ctrl-C: "))
    assert "stopping" not in capsys.readouterr().err
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
    assert signals.received == number and not capsys.readouterr().err


def test_a_ctrl_c_that_a_launcher_forwards_is_the_same(default_sigint, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        signals.since -= 10
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_second_ctrl_c_interrupts_at_once(tmp_path, default_sigint):
    def impatient(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return partial_credit(*arguments)

    trainer, _ = trainer_of(tmp_path, rewards=impatient)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_a_signal_that_is_ignored_stays_so(tmp_path, default_sigint):
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def interrupting(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return partial_credit(*arguments)

    trainer, _ = trainer_of(tmp_path, rewards=interrupting)
    assert trainer.train()[:2] == (4, None)


def test_latest_of_nothing_is_a_fresh_start_and_more_steps_may_follow(tmp_path):
    expected = trainer_of(tmp_path / "whole", max_steps=4)
    expected[0].train()
    first, records = trainer_of(tmp_path / "run", resume="latest", max_steps=2, save_steps=1)
    first.train()
    second, later = trainer_of(tmp_path / "run", resume="latest", max_steps=4, seed=99)
    second.train()
    assert records | later == expected[1]


def test_random_states_do_not_depend_on_accelerate(tmp_path, monkeypatch):
    """Accelerate skips random states that it cannot load."""
    whole, expected = trainer_of(tmp_path, max_steps=3, save_steps=1, save_total_limit=None)
    whole.train()
    monkeypatch.delattr("accelerate.checkpointing.random.setstate")
    monkeypatch.setattr(state, "random", SimpleNamespace(setstate=lambda state: None))
    resumed, records = trainer_of(
        tmp_path / "again", resume=str(tmp_path / "checkpoint-1"), max_steps=3, seed=99
    )
    resumed.train()
    assert records == {step: expected[step] for step in (2, 3)}


def partly_frozen():
    model = make_model(make_tokenizer())
    model.lm_head.requires_grad_(False)
    return model


def another_model():
    config = make_model(make_tokenizer()).config
    config.rms_norm_eps = 0.1  # the same shapes
    return Qwen3ForCausalLM(config)


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
        ({"data": ROWS[:7]}, "resume: data has 7 rows, the checkpoint had 80 rows; set"),
        ({"data": ROWS[::-1]}, "resume: the rows of data are not those"),
        ({"temperature": 0.7}, "temperature is 0.7, .* or start a new run, in another output_dir"),
        ({"peft_config": LORA}, "the model has adapters, the checkpoint is of a run with no adap"),
        ({"model": partly_frozen()}, "some weights are frozen, but the checkpoint"),
        ({"model": another_model()}, "rms_norm_eps of the model is 0.1, the checkpoint has 1e-06"),
        (
            {"resume": "nowhere"},
            "resume must be 'latest' or the folder of a checkpoint, got 'nowhere'",
        ),
        (
            {"resume": None},
            "output_dir .* contains checkpoint-1 of an earlier run; set resume",
        ),
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
    with pytest.raises(ValueError, match="contains checkpoint-2 of an earlier run"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_the_checksum_of_rows_is_the_same_in_every_process():
    """Its source alone runs in the other processes: importing torch there would take seconds."""
    source = [inspect.getsource(f) for f in (checksum_rows, resume_checks._stable)]
    rows = "[{'prompt': 'a', 1: {'b', 'c', 'd'}, ('x', 2): object(), 'e': [0.5]}]"
    program = "import zlib\nfrom collections.abc import Sequence\n" + "\n".join(source)
    command = [sys.executable, "-c", f"{program}\nprint(checksum_rows({rows}))"]
    found = set()
    for seed in ("1", "2", "3"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        found.add(subprocess.check_output(command, env=environment, text=True))
    assert found == {f"{checksum_rows(eval(rows))}\n"}
    assert checksum_rows([{"prompt": "a"}]) != checksum_rows([{"prompt": "b"}])


def test_an_evaluation_does_not_change_random_rewards(tmp_path):
    def drawn(*arguments):
        totals = [random.random() + np.random.random() for _ in arguments[0]]
        return RewardScores(torch.tensor(totals), {})

    options = {"rewards": drawn, "eval_data": HELD_OUT[:3], "eval_temperature": 1.0}
    rewards = []
    for every in (1, 4):
        trainer, records = trainer_of(tmp_path / str(every), eval_steps=every, **options)
        random.seed(0)
        np.random.seed(0)
        trainer.train()
        rewards.append([records[step]["reward"] for step in range(1, 5)])
    assert rewards[0] == rewards[1] and len(set(rewards[0])) == 4


def experience_of(lengths, start):
    """An Experience of one rank: sequences of (prompt, completion) tokens, numbered from start."""
    P, T = (max(sizes) for sizes in zip(*lengths, strict=True))
    rows = len(lengths)
    number = torch.arange(start, start + rows)
    prompts, completions = (torch.tensor(sizes)[:, None] for sizes in zip(*lengths, strict=True))
    prompt_mask = torch.arange(P) >= P - prompts
    mask = torch.arange(T) < completions
    counts = torch.where(mask, torch.arange(T) + 1, 0)  # as many kept ids as tokens so far
    batch = Batch(
        torch.where(prompt_mask, number[:, None], -7),
        prompt_mask,
        torch.where(mask, number[:, None], -7),
        mask,
        mask,
        advantages=number.float(),
        ref_logps=torch.where(mask, number[:, None].float(), 0.0),
        importance_sampling_ratio=number[:, None].float(),
        support_counts=counts,
        support_ids=pad([[n] * int(k) for n, k in zip(number, counts.sum(1), strict=True)], -1)[0],
    )
    return Experience(batch, lengths, [4.0, 4.0], {"reward": 1.0}, position=1)


def test_experience_of_two_ranks_is_dealt_to_others():
    """Every minibatch keeps its sequences, whatever lengths they were padded to."""
    parts = [
        experience_of([(2, 1), (1, 3), (3, 2), (1, 1)], 0),
        experience_of([(1, 4), (4, 1), (1, 1), (2, 2)], 4),
    ]
    minibatches = [[0, 1, 4, 5], [2, 3, 6, 7]]
    lengths = [pair for part in parts for pair in part.lengths]
    for size in (1, 2, 4):
        dealt = [Experience.deal(parts, 2, index, size, -7) for index in range(size)]
        for minibatch, members in enumerate(minibatches):
            seen = []
            for experience in dealt:
                assert experience.position == 1 and experience.metrics == {"reward": 1.0}
                for batch in experience.micro_batches(minibatch, 2, 1):
                    (number,) = batch.advantages.int().tolist()
                    seen.append(number)
                    prompt, completion = lengths[number]
                    assert batch.prompt_ids.tolist() == [[number] * prompt]
                    assert batch.completion_ids.tolist() == [[number] * completion]
                    assert batch.prompt_mask.all() and batch.completion_mask.all()
                    assert batch.ref_logps.tolist() == [[float(number)] * completion]
                    assert batch.importance_sampling_ratio.tolist() == [[float(number)]]
                    offsets, ids = batch.support(14)
                    assert offsets.diff().tolist() == list(range(1, completion + 1))
                    assert ids.tolist() == [number] * (completion * (completion + 1) // 2)
            assert seen == members
    parts = [experience_of([(1, 1), (1, 1)], 0), experience_of([(2, 3), (1, 1)], 2)]
    batch = Experience.deal(parts, 1, 0, 1, -7).batch  # widths of 1 are widened, too
    assert batch.completion_ids.tolist() == [[0, -7, -7], [1, -7, -7], [2, 2, 2], [3, -7, -7]]
    assert batch.prompt_ids.tolist() == [[-7, 0], [-7, 1], [2, 2], [-7, 3]]
    parts = [experience_of([(1, 1)] * 4, 0)] * 2
    with pytest.raises(ValueError, match="a minibatch of 4 sequences cannot be .* 3 ranks"):
        Experience.deal(parts, 2, 0, 3, -7)


def test_the_length_of_a_schedule_is_part_of_the_run(tmp_path):
    options = {"save_steps": 1, "lr_scheduler_type": "linear"}
    trainer_of(tmp_path, max_steps=1, **options)[0].train()
    with pytest.raises(ValueError, match="resume: max_steps is 2, the checkpoint has 1"):
        trainer_of(tmp_path, max_steps=2, resume="latest", **options)[0].train()


def test_settings_that_do_not_affect_results_may_change(saved):
    trainer, _ = trainer_of(saved, resume="latest", max_steps=2, save_steps=7, eval_batch_size=3)
    assert trainer.train().step == 2


@pytest.mark.parametrize("steps", [1, 2])
def test_what_only_affects_memory_may_change_in_the_middle_of_a_rollout(tmp_path, steps):
    options = {"num_iterations": 2, "max_steps": 4, "save_steps": 1, "save_total_limit": None}
    options |= {"beta": 0.1, "entropy_coef": 0.01}
    torch.manual_seed(0)
    _, expected = run_of(tmp_path, **options)
    changes = {"micro_batch_size": 3, "gradient_checkpointing": True, "loss_input": "logits"}
    path = str(tmp_path / f"checkpoint-{steps}")
    with pytest.warns(UserWarning) as warned:
        _, records = run_of(tmp_path / "again", resume=path, **options | changes)
    messages = "\n".join(str(warning.message) for warning in warned)
    for name, value in changes.items():
        assert f"{name} is {value!r}, the checkpoint has" in messages
    assert list(records) == list(range(steps + 1, 5))
    for step in records:
        for name in ("loss", "grad_norm", "kl", "entropy", "reward", "num_tokens"):
            assert records[step][name] == pytest.approx(expected[step][name], rel=1e-4, abs=1e-6)


def test_the_micro_batch_is_part_of_a_loss_that_compares_its_tokens(tmp_path):
    options = {"save_steps": 1, "loss_type": "clip_cov"}
    trainer_of(tmp_path, max_steps=1, **options)[0].train()
    trainer, _ = trainer_of(tmp_path, max_steps=2, resume="latest", micro_batch_size=3, **options)
    with pytest.raises(ValueError, match="micro_batch_size is 3, .* 8 .clip_cov selects tokens"):
        trainer.train()


def run_of(folder, **options):
    trainer, records = trainer_of(folder, **options)
    trainer.train()
    return trainer, records


def test_adapters_of_a_tied_model_are_small(tmp_path):
    """The tied head is in the state dict under two names."""
    torch.manual_seed(0)
    config = make_model(make_tokenizer()).config
    config.tie_word_embeddings = True
    model = Qwen3ForCausalLM(config)
    trainer, _ = trainer_of(tmp_path, model=model, peft_config=LORA, save_steps=2)
    trainer.train()
    saved = load_file(list_checkpoints(tmp_path)[0] / "model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    resumed, _ = trainer_of(
        tmp_path, model=Qwen3ForCausalLM(config), peft_config=LORA, resume="latest"
    )
    with pytest.raises(ValueError, match="frozen weights are not"):  # of another base model
        resumed.train()
