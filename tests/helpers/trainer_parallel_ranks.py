"""The trainer on several ranks: checks for `ranks`, which test_trainer_ranks.py starts.

The folder has "start", the model, "one", the run of one process with its checkpoints, and
"expected-one.pt", its results; "reward", a reward model, and "reward.pt", the results of its
training.
"""

import functools
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from batches import relative_error
from parallel_trainer import (
    DYNAMIC,
    PPO,
    by_tokens,
    fixed,
    load_start,
    result,
    reward_run,
    sgd,
    trainer_on,
)
from ranks import raises
from reward_models import pairs_of
from trainer_runs import HELD_OUT, ROWS, partial_credit
from transformers import AutoModelForCausalLM

import grpo_fused.trainer.reward_training
import grpo_fused.trainer.trainer
from grpo_fused.trainer import TrainingError
from grpo_fused.trainer.collect import collect
from grpo_fused.trainer.optimizer import MasterAdamW, make_optimizer
from grpo_fused.trainer.reference import local_tensor
from grpo_fused.trainer.run.checkpoint import list_checkpoints

grpo_fused.trainer.trainer.make_optimizer = sgd  # of this process alone
grpo_fused.trainer.reward_training.make_optimizer = sgd
# GRPO_FUSED_SLOW=1 runs all.
KINDS = {2: ("ddp", "fsdp", "tp") if "GRPO_FUSED_SLOW" in os.environ else ("ddp",), 4: ("2x2",)}
TENSOR_PARALLEL = {2: "tp", 4: "2x2"}


def compare(found, expected, steps, where):
    """Losses, gradient norms and metrics of every step, and the weights at the end."""
    for step in steps:
        got, want = found["records"][step], expected["records"][step]
        for name in ("loss", "grad_norm", "kl", "entropy", "ratio/mean", "reward", "num_tokens"):
            assert got[name] == pytest.approx(want[name], rel=1e-5, abs=1e-6), (where, step, name)
    for name, weight in expected["weights"].items():
        error = relative_error(found["weights"][name], weight)
        assert error < 1e-5, (where, name, error)


def check_runs(rank):
    """Equal to one process; resumed on as many ranks bit by bit; one checkpoint of the whole."""
    expected = torch.load(f"{rank.folder}/expected-one.pt")
    for kind in KINDS[rank.size]:
        folder = f"{rank.folder}/{kind}{rank.size}"
        trainer, records = trainer_on(
            folder, load_start(f"{rank.folder}/start", kind), save_steps=1, save_total_limit=None
        )
        trainer.train()
        found = result(trainer, records)
        compare(found, expected, range(1, 7), kind)
        for path in list_checkpoints(folder)[3:5]:  # behind a rollout, and in the middle of one
            again = (f"{folder}-again", load_start(f"{rank.folder}/start", kind))
            resumed, later = trainer_on(*again, resume=str(path))
            resumed.train()
            assert all(later[step] == records[step] for step in later), (kind, path)
            weights = result(resumed, later)["weights"]
            assert all(torch.equal(weights[n], w) for n, w in found["weights"].items())
        saved = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
        for name, weight in saved.named_parameters():
            assert torch.equal(weight, found["weights"][name]), (kind, name)


def check_another_number_of_ranks(rank):
    """What one process, or four, has saved, in the middle of a rollout and behind one."""
    expected = torch.load(f"{rank.folder}/expected-one.pt")
    sources = {"ddp": "one", "tp": "2x24"} if rank.size == 2 else {"2x2": "tp2"}
    for kind, source in sources.items():
        for path in list_checkpoints(f"{rank.folder}/{source}")[2:4]:
            folder = f"{rank.folder}/from-{source}-{path.name}-{rank.size}"
            model = load_start(f"{rank.folder}/start", kind)
            resumed, records = trainer_on(folder, model, resume=str(path))
            resumed.train()
            compare(result(resumed, records), expected, records, (kind, source, path.name))


def check_dynamic_sampling(rank):
    """Groups that straddle ranks: the batches of one process, whose checkpoint is resumed, too."""
    expected = torch.load(f"{rank.folder}/expected-dynamic.pt")
    for kind in KINDS[rank.size]:
        start = functools.partial(load_start, f"{rank.folder}/start", kind)
        folder = f"{rank.folder}/dynamic-{kind}{rank.size}"
        options = DYNAMIC | {"save_steps": 1, "save_total_limit": None}
        trainer, records = trainer_on(folder, start(), **options)
        trainer.train()
        compare(result(trainer, records), expected, range(1, 7), kind)
        names = [name for name in records[1] if name.startswith("dynamic_sampling/")]
        for step in range(1, 7):
            want = expected["records"][step]
            assert [records[step][n] for n in names] == [want[n] for n in names], (kind, step)
        assert len({records[step]["dynamic_sampling/rounds"] for step in (1, 3, 5)}) > 1
        path = list_checkpoints(folder)[2]  # in the middle of a rollout
        resumed, later = trainer_on(f"{folder}-again", start(), resume=str(path), **options)
        resumed.train()
        assert later == {step: records[step] for step in (4, 5, 6)}, kind
        if kind != "ddp":
            continue  # a distributed model does not resume what one process has saved
        path = list_checkpoints(f"{rank.folder}/dynamic")[1]  # behind a rollout
        resumed, later = trainer_on(f"{folder}-one", start(), resume=str(path), **DYNAMIC)
        resumed.train()
        compare(result(resumed, later), expected, later, (kind, path.name))


def check_sampling(rank):
    """Ranks of tensor parallelism sample the same tokens, and score and evaluate them once."""
    kind = TENSOR_PARALLEL[rank.size]
    folder = f"{rank.folder}/sampling{rank.size}"
    calls = []

    def counted(*arguments):
        calls.append(1)
        torch.rand(3)  # on the first rank alone
        return partial_credit(*arguments)

    options = {"rollout_fn": None, "max_completion_length": 2, "eval_data": HELD_OUT[:5]}
    options |= {"eval_steps": 1, "rewards": counted, "max_steps": 2, "max_prompt_length": None}
    options |= {"repetition_penalty": 1.5, "stop_strings": ["3"]}
    options["generation_kwargs"] = {"suppress_tokens": [4]}
    trainer, records = trainer_on(folder, load_start(f"{rank.folder}/start", kind), **options)
    batch = collect(trainer).batch
    assert bool(calls) == (rank.rank % 2 == 0)
    shape = torch.tensor(batch.completion_ids.shape)
    assert torch.equal(rank.gather(shape)[rank.rank // 2 * 2], shape)
    assert not (batch.completion_ids == 4).any() and batch.support(14) is not None
    total = torch.stack([batch.sampling_logps.sum(), batch.support_ids.sum()]).float()
    assert torch.equal(rank.gather(total)[rank.rank // 2 * 2], total), "of the first"
    trainer.train()
    assert "eval/reward" in records[1] and records[2]["num_tokens"] > 0
    for name in ("reward", "loss", "eval/reward", "grad_norm", "rollout/kl"):
        values = rank.gather(torch.tensor(records[2][name]))
        assert all(torch.equal(value, values[0]) for value in values), name


def check_mixed_precision(rank):
    """The forward of an update runs in the precision of old log-probabilities: ratios are 1."""
    start, folder = f"{rank.folder}/start", f"{rank.folder}/bf16-{rank.size}"
    kind, options = TENSOR_PARALLEL[rank.size], {"max_steps": 1, "mixed_precision": "bf16"}
    AcceleratorState._reset_state()
    trainer, records = trainer_on(folder, load_start(start, kind), loss_type="dapo", **options)
    trainer.train()
    assert records[1]["ratio/max"] == records[1]["ratio/mean"] == 1.0
    AcceleratorState._reset_state()
    options["mixed_precision"] = "fp16"
    call = functools.partial(trainer_on, folder, load_start(start, kind), **options)
    raises(ValueError, "mixed_precision must be no or bf16", call)
    AcceleratorState._reset_state()


def check_ppo(rank):
    """Advantages are whitened over all ranks; the critic's gradients are averaged, too."""
    expected = torch.load(f"{rank.folder}/expected-ppo-one.pt")
    if rank.size > 2:
        return
    model = load_start(f"{rank.folder}/start", "ddp")
    trainer, records = trainer_on(f"{rank.folder}/ppo", model, **PPO)
    trainer.train()
    compare(result(trainer, records), expected, range(1, 5), "ppo")
    for step, metrics in records.items():
        for name in ("value/loss", "value/grad_norm", "value/explained_variance"):
            wanted = expected["records"][step][name]
            assert metrics[name] == pytest.approx(wanted, rel=1e-4, abs=1e-5), (step, name)


def check_masters(rank):
    """Float32 masters of sharded bfloat16 weights come back from a checkpoint bit by bit."""
    for kind in KINDS[rank.size]:
        if kind == "ddp":
            continue  # in `test_trainer_optimizer`
        start = functools.partial(load_start, f"{rank.folder}/start", kind, torch.bfloat16)
        folder = f"{rank.folder}/masters-{kind}{rank.size}"
        options = {"learning_rate": 1e-4, "max_steps": 3}
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(grpo_fused.trainer.trainer, "make_optimizer", make_optimizer)
            trainer, records = trainer_on(folder, start(), save_steps=2, **options)
            trainer.train()
            assert isinstance(trainer.optimizer.optimizer, MasterAdamW)
            path = f"{folder}/checkpoint-2"
            resumed, later = trainer_on(f"{folder}-again", start(), resume=path, **options)
            resumed.train()
        assert later == {3: records[3]}, kind
        for mine, parameter in zip(
            resumed.unwrapped.parameters(), trainer.unwrapped.parameters(), strict=True
        ):
            masters = resumed.optimizer.state[mine]["master"], trainer.optimizer.state[parameter]
            assert torch.equal(local_tensor(masters[0]), local_tensor(masters[1]["master"]))
            assert masters[0].dtype == torch.float32


def check_disagreement(rank):
    """A ValueError on every rank, which names what differs."""
    start, folder = f"{rank.folder}/start", f"{rank.folder}/disagree"
    mine = rank.rank == 0
    for name, options in (
        ("loss_type", {"loss_type": "dapo" if mine else "grpo"}),
        ("max_completion_length", {"max_completion_length": 5 if mine else 6}),
        ("data", {"data": [{"prompt": "1+1=" if mine else "1+2=", "answer": "2"}]}),
    ):
        model = load_start(start, "ddp")
        raises(
            ValueError, f"disagree on {name}", lambda m=model, o=options: trainer_on(folder, m, **o)
        )


def check_streams(rank):
    """The main process alone reads a stream; every rank has its share, after a resume too.

    Five rows, three a rollout: an epoch ends in the second rollout.
    """
    import datasets

    folder, seen = f"{rank.folder}/stream{rank.size}", []

    def rows():
        seen.append([])
        for row in ROWS[:5]:
            seen[-1].append(row)
            yield row
        if len(seen) == faulty:
            yield {"question": "?"}

    def checked(prompts, trainer):
        for place, prompt in enumerate(prompts):
            group = (trainer.ranks.index * trainer.rows_per_rank + place) // 4
            assert prompt == ROWS[(3 * trainer.rollouts + group) % 5]["prompt"]
        return fixed(prompts, trainer)

    faulty = None
    options = {"data": datasets.IterableDataset.from_generator(rows), "shuffle": False}
    options |= {"rollout_fn": checked, "save_total_limit": None}

    def run(where, **more):
        seen.clear()
        model = load_start(f"{rank.folder}/start", "ddp")
        trainer, records = trainer_on(where, model, **options, **more)
        trainer.train()
        return records

    records = run(folder, save_steps=1)
    main = rank.rank == 0
    assert sum(map(len, seen)) - 2 == 9 * main, "besides the first row, which all have checked"
    assert [records[step]["epoch"] for step in range(1, 7)] == [0, 0, 1, 1, 1, 1]
    path = list_checkpoints(folder)[2]  # in the middle of the second rollout
    later = run(f"{folder}-again", resume=str(path))
    if rank.size == 2:
        assert later == {step: records[step] for step in (4, 5, 6)}
    for step in (4, 5, 6):  # of more ranks, DDP may sum in another order after a resume
        for name in ("loss", "grad_norm", "kl", "reward", "num_tokens", "epoch"):
            assert later[step][name] == pytest.approx(records[step][name], rel=1e-4, abs=1e-6), name
    faulty = 4  # the fourth reading, after two of the first row alone, and one of an epoch
    error, text = (ValueError, "epoch 2, row 6 (the") if main else (TrainingError, "another rank")
    raises(error, text, lambda: run(f"{folder}-faulty", max_steps=20))


def check_reward_training(rank):
    """A reward model is trained as by one process, and stays equal to the bit on all ranks."""
    root = Path(rank.folder)
    expected = torch.load(root / "reward.pt")
    slow = "GRPO_FUSED_SLOW" in os.environ
    for kind in ("ddp", TENSOR_PARALLEL[rank.size]) if slow else ("ddp",):
        output = root / f"reward-{kind}{rank.size}"
        seed = 1 if rank.rank else None  # the weights of rank 0 count
        trainer, records = reward_run(root, kind, output, seed, save_steps=3)
        trainer.train()
        for name in ("reward_model/loss", "reward_model/accuracy", "reward_model/preference"):
            wanted = expected["records"][5][name]
            assert records[5][name] == pytest.approx(wanted, abs=1e-5), (kind, name)
        found = trainer.reward_training.model.model.state_dict()
        for name, weight in expected["weights"].items():
            rank.assert_same_bits(found[name])
            error = relative_error(found[name], weight)
            assert error < 1e-5, (kind, name, error)
        again = (root, kind, f"{output}-again", 2)
        resumed, later = reward_run(*again, resume=str(output / "checkpoint-3"))
        resumed.train()
        weights = resumed.reward_training.model.model.state_dict().items()
        if rank.size > 2:  # DDP may sum in another order after a resume
            assert all(relative_error(weight, found[name]) < 1e-5 for name, weight in weights), kind
            continue
        assert all(later[step] == records[step] for step in (4, 5, 6)), kind
        for name, weight in weights:
            assert torch.equal(weight, found[name]), (kind, name)
    history = pairs_of(2 + rank.rank)
    call = functools.partial(reward_run, root, "ddp", root / "other", history=history)
    raises(ValueError, "disagree on the history of pairs", call)


def check_errors(rank):
    """What one rank raises stops all of them."""

    def failing(*arguments):
        if rank.rank == rank.size - 1:
            raise OSError("no answer")
        return by_tokens(*arguments)

    model = load_start(f"{rank.folder}/start", "ddp")
    trainer, _ = trainer_on(f"{rank.folder}/errors", model, rewards=failing)
    own = rank.rank == rank.size - 1
    error, text = (OSError, "no answer") if own else (TrainingError, "another rank failed")
    raises(error, text, trainer.train)


def check_a_rank_that_dies(rank):
    """The others stop with a message, and soon. The last check: this ends the group."""
    model, seen = load_start(f"{rank.folder}/start", "ddp"), []

    def dying(*arguments):
        seen.append(1)
        if rank.rank == rank.size - 1 and len(seen) == 2:
            os._exit(0)
        return by_tokens(*arguments)

    trainer, records = trainer_on(f"{rank.folder}/dies", model, rewards=dying)
    raises(TrainingError, "as if another rank had stopped", trainer.train)
    assert set(records) == {1, 2}
    os._exit(0)  # no barrier without it
