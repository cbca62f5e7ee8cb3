"""Checkpoints: whenever a save is killed or the disk fills up, the last good one still loads."""

import os
import resource
import shutil

import pytest
import torch
from trainer_runs import trainer_of

from grpo_fused.trainer.run import checkpoint
from grpo_fused.trainer.run.checkpoint import (
    find_damage,
    latest_checkpoint,
    list_checkpoints,
    resolve_checkpoint,
)
from grpo_fused.trainer.run.errors import TrainingError
from grpo_fused.trainer.run.state import load_state, save_pretrained, save_state

OPTIONS = {"num_iterations": 3, "beta": 0.1, "max_steps": 2}


class Killed(BaseException):
    """Stands for a kill: no `except Exception` catches it."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer after two steps, with checkpoint-1, and a folder that looks like its output_dir."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    torch.manual_seed(0)
    trainer, _ = trainer_of(folder, **OPTIONS)
    trainer.train()
    trainer.step = 1
    save_state(trainer)
    return trainer, folder


@pytest.fixture
def trainer(trained, tmp_path):
    """The trained trainer in a folder of its own, about to write checkpoint-2."""
    trainer, folder = trained
    trainer.config.output_dir = str(shutil.copytree(folder, tmp_path / "run"))
    trainer.config.save_total_limit, trainer.step = 2, 2
    return trainer


def killed_at(monkeypatch, number):
    """Raises Killed halfway through the number-th operation that changes the disk."""
    count = 0
    operations = [(os, "replace"), (os, "fsync"), (torch, "save"), (shutil, "rmtree")]
    operations += [(checkpoint.Path, "mkdir"), (checkpoint.Path, "write_text")]

    def patched(original):
        def operation(*args, **kwargs):
            nonlocal count
            count += 1
            if count < number:
                return original(*args, **kwargs)
            if original is torch_save:
                original(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            if original is rmtree and os.path.isdir(args[0]):
                for path in list(checkpoint.Path(args[0]).iterdir())[:1]:
                    path.unlink()
            raise Killed(original)

        return operation

    torch_save, rmtree = torch.save, shutil.rmtree
    for owner, name in operations:
        monkeypatch.setattr(owner, name, patched(getattr(owner, name)))


def test_killed_at_any_moment_a_complete_checkpoint_remains(trainer, tmp_path, monkeypatch):
    output_dir, seen = trainer.config.output_dir, set()
    trainer.config.save_total_limit = 1
    backup = shutil.copytree(output_dir, tmp_path / "backup")
    resumed, _ = trainer_of(tmp_path / "resumed", **OPTIONS)
    for number in range(1, 100):
        shutil.rmtree(output_dir)
        shutil.copytree(backup, output_dir)
        with monkeypatch.context() as patch:
            killed_at(patch, number)
            try:
                save_state(trainer)
                break
            except Killed:
                pass
        found = latest_checkpoint(output_dir)
        assert not any(map(find_damage, list_checkpoints(output_dir))), "a half-written checkpoint"
        load_state(resumed, found)
        assert found.name == f"checkpoint-{resumed.step}"
        if found.name not in seen:
            again, _ = trainer_of(output_dir, resume="latest", **OPTIONS)
            assert again.train().step == 2
        seen.add(found.name)
        save_state(trainer)  # leftovers of the killed save do not get in the way
        assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-2"]
        assert not list(checkpoint.Path(output_dir).glob("*checkpoint*.partial"))
    assert number > 15 and seen == {"checkpoint-1", "checkpoint-2"}


def test_damage_to_any_file_is_detected(trainer):
    save_state(trainer)
    last = latest_checkpoint(trainer.config.output_dir)
    assert last.name == "checkpoint-2"
    for path in sorted(last.iterdir()):
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], content[:-1], None):
            path.write_bytes(damaged) if damaged is not None else path.unlink()
            with pytest.warns(UserWarning, match="checkpoint-2 is damaged .*using an older one"):
                assert latest_checkpoint(trainer.config.output_dir).name == "checkpoint-1"
            with pytest.raises(ValueError, match="checkpoint-2 is damaged"):
                resolve_checkpoint(str(last), trainer.config.output_dir)
        path.write_bytes(content)
    assert latest_checkpoint(trainer.config.output_dir) == last
    for folder in list_checkpoints(trainer.config.output_dir):
        (folder / "trainer.json").unlink()
    with pytest.raises(ValueError, match="all checkpoints in .* damaged, the newest, checkpoint-2"):
        resolve_checkpoint("latest", trainer.config.output_dir)


@pytest.mark.parametrize("limit", [0, 1000, 20_000, 200_000, 400_000])
def test_a_full_disk_leaves_the_last_good_checkpoint(trainer, limit):
    before = sorted(os.listdir(trainer.config.output_dir))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r"checkpoint-2 could not.*last good .*checkpoint-1"):
            save_state(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(trainer.config.output_dir)) == before
    save_state(trainer)
    assert latest_checkpoint(trainer.config.output_dir).name == "checkpoint-2"


def test_the_newest_are_kept_by_number_not_by_name(trainer):
    for trainer.step in (9, 10, 11):
        save_state(trainer)
    found = list_checkpoints(trainer.config.output_dir)
    assert [path.name for path in found] == ["checkpoint-10", "checkpoint-11"]


def test_an_older_checkpoint_can_be_continued(tmp_path):
    """The new checkpoints replace later ones, and are not deleted as the oldest."""
    trainer, _ = trainer_of(tmp_path, max_steps=3, save_steps=1, save_total_limit=None)
    trainer.train()
    older = {"resume": str(tmp_path / "checkpoint-1"), "save_total_limit": 2}
    resumed, _ = trainer_of(tmp_path, max_steps=2, save_steps=1, **older)
    resumed.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_a_model_that_cannot_be_written_leaves_the_old_one(trainer, monkeypatch):
    folder = checkpoint.Path(trainer.config.output_dir)
    before = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}

    def full(partial):
        (partial / "tokenizer.json").write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer.tokenizer, "save_pretrained", full)
    with pytest.raises(TrainingError, match="model could not be written .OSError: No space left"):
        save_pretrained(trainer)
    assert {path.name: path.read_bytes() for path in (folder / "model").iterdir()} == before
    assert not list(folder.glob("model.*"))


def test_killed_while_the_model_is_saved_one_is_complete(trainer, monkeypatch):
    folder = checkpoint.Path(trainer.config.output_dir)
    for number in range(1, 40):
        with monkeypatch.context() as patch:
            killed_at(patch, number)
            try:
                save_pretrained(trainer)
                break
            except Killed:
                pass
        complete = [path for path in folder.glob("model*") if len(list(path.iterdir())) >= 5]
        assert complete, number
    assert number > 5 and [path.name for path in folder.glob("model*")] == ["model"]


def test_a_run_resumed_from_before_damage_replaces_the_damaged_checkpoint(tmp_path):
    trainer, _ = trainer_of(tmp_path, max_steps=3, save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-3" / "trainer.json").unlink()
    with pytest.warns(UserWarning, match="checkpoint-3 is damaged .trainer.json is missing"):
        resumed, records = trainer_of(tmp_path, max_steps=3, save_steps=1, resume="latest")
        resumed.train()
    assert list(records) == [3]
    assert find_damage(tmp_path / "checkpoint-3") is None
