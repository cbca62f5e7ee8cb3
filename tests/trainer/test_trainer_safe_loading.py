"""A checkpoint that somebody else wrote cannot run code when a run is resumed from it."""

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from trainer_runs import trainer_of
from transformers import set_seed

from grpo_fused.trainer.run.safe_loading import FORCE, as_data
from grpo_fused.trainer.run.state import load_state, save_state

OPTIONS = {"max_steps": 1, "beta": 0.1, "save_steps": None}
PICKLES = ["optimizer.bin", "random_states_0.pkl", "rank_0.pt", "reference.pt"]


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def payload(path, kind):
    """The bytes of a file that torch.load, or pickle.load, builds a payload from."""
    if kind == "pickle":
        return pickle.dumps(Payload(path))
    buffer = io.BytesIO()
    torch.save({"state": Payload(path)}, buffer)
    return buffer.getvalue()


def test_payloads_work(tmp_path):
    """Else the tests below would pass whatever they load."""
    for kind in ("pickle", "torch"):
        content, ran = payload(tmp_path / kind, kind), tmp_path / kind
        if kind == "pickle":
            pickle.loads(content)
        else:
            torch.load(io.BytesIO(content), weights_only=False)
        assert ran.exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(trainer, its checkpoint)"""
    folder = tmp_path_factory.mktemp("run")
    set_seed(0)
    trainer, _ = trainer_of(folder, **OPTIONS)
    trainer.train()
    save_state(trainer)
    return trainer, folder / "checkpoint-1"


def test_every_file_is_data_or_is_tried_below(saved):
    """Text and safetensors name no code."""
    names = {path.name for path in saved[1].rglob("*") if path.is_file()}
    pickles = {name for name in names if not name.endswith((".json", ".safetensors"))}
    assert pickles == set(PICKLES)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
@pytest.mark.parametrize("name", PICKLES)
def test_no_file_of_a_checkpoint_runs_code(saved, tmp_path, name, kind):
    trainer, checkpoint = saved
    folder, ran = shutil.copytree(checkpoint, tmp_path / "changed"), tmp_path / "ran"
    assert (folder / name).exists()
    (folder / name).write_bytes(payload(ran, kind))
    if name.startswith("random_states"):  # Accelerate passes over those that it cannot read
        load_state(trainer, folder)
    else:
        with pytest.raises(ValueError, match="not a checkpoint that can be read as data"):
            load_state(trainer, folder)
    assert not ran.exists()
    load_state(trainer, checkpoint)  # what was not changed still loads


@pytest.fixture
def shards(tmp_path):
    """(state, folder): shards as those of a distributed model."""
    step = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3, 4)}
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "fused": None}]
    state = {
        "model": {"w": torch.ones(3, 4), "b": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": {"state": {"w": step}, "param_groups": groups},
    }
    distributed_checkpoint.save(state, checkpoint_id=tmp_path / "shards")
    return state, tmp_path / "shards"


def load_shards(state, folder):
    with as_data(folder):
        distributed_checkpoint.load(state, checkpoint_id=folder)


@pytest.mark.filterwarnings("ignore")
def test_shards_are_loaded(shards, monkeypatch):
    state, folder = shards
    monkeypatch.delenv(FORCE, raising=False)
    changed = {
        "model": {"w": torch.zeros(3, 4), "b": torch.zeros(3, dtype=torch.bfloat16)},
        "optimizer": {
            "state": {"w": {"step": torch.tensor(0.0), "exp_avg": torch.zeros(3, 4)}},
            "param_groups": [{"lr": 0.0, "betas": (0.0, 0.0), "fused": True}],
        },
    }
    load_shards(changed, folder)
    assert changed["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    for name, value in state["model"].items():
        assert changed["model"][name].equal(value)
    assert FORCE not in os.environ


@pytest.mark.filterwarnings("ignore")
def test_index_of_shards_runs_no_code(shards, tmp_path):
    state, folder = shards
    ran = tmp_path / "ran"
    (folder / ".metadata").write_bytes(payload(ran, "pickle"))
    with pytest.raises(ValueError, match=r"\.metadata .*it names posix\.mkdir"):
        load_shards(state, folder)
    assert not ran.exists()


class Entry(Payload):
    """Takes the place of a setting of the optimizer, an entry that is no tensor."""


@pytest.mark.filterwarnings("ignore")
def test_entries_of_shards_run_no_code(tmp_path):
    folder, ran = tmp_path / "shards", tmp_path / "ran"
    distributed_checkpoint.save({"lr": Entry(ran)}, checkpoint_id=folder)
    assert not ran.exists()
    with pytest.raises(ValueError, match="can be read as data"):
        load_shards({"lr": 0.1}, folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "os.system"),  # a module's own imports
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("builtins", "eval"),
        ("torch", "nonexistent"),
    ],
)
def test_names_that_an_index_may_not_have(tmp_path, module, name):
    text = b"".join(b"\x8c" + bytes([len(x)]) + x for x in (module.encode(), name.encode()))
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + text + b"\x93.")
    with pytest.raises(ValueError, match="it names"), as_data(tmp_path):
        pass
    with as_data(tmp_path, trust=True):  # DeepSpeed's, which SECURITY.md is about
        pass


def test_paths_of_an_index_are_allowed(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps([Path("x"), torch.Size([2]), torch.int8]))
    with as_data(tmp_path):
        pass
