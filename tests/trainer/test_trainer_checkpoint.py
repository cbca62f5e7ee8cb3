"""Checkpoints: killed or out of space at any moment, the last good one is there and loads."""

import os
import resource
import shutil

import pytest
import torch
from trainer_runs import trainer_of

from grpo_fused.trainer import checkpoint
from grpo_fused.trainer.checkpoint import checkpoints, find_checkpoint, newest, why_damaged
from grpo_fused.trainer.errors import TrainingError
from grpo_fused.trainer.state import save, save_pretrained

OPTIONS = {"num_iterations": 3, "beta": 0.1, "max_steps": 2}


class Killed(BaseException):
    """Nothing catches it: what is on the disk when it is raised stays there."""


@pytest.fixture
def trainer(tmp_path):
    """A trainer after two steps, with checkpoint-1."""
    trainer, _ = trainer_of(tmp_path / "run", save_steps=None, **OPTIONS)
    trainer.train()
    trainer.step = 1
    save(trainer)
    trainer.step = 2
    return trainer


def killed_at(monkeypatch, number):
    """The number-th operation that changes the disk is half done, and the last."""
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


def test_killed_at_any_moment_a_whole_checkpoint_remains(trainer, tmp_path, monkeypatch):
    output_dir, seen = trainer.config.output_dir, set()
    trainer.config.save_total_limit = 1
    backup = shutil.copytree(output_dir, tmp_path / "backup")
    for number in range(1, 100):
        shutil.rmtree(output_dir)
        shutil.copytree(backup, output_dir)
        with monkeypatch.context() as patch:
            killed_at(patch, number)
            try:
                save(trainer)
                break
            except Killed:
                pass
        found = newest(output_dir)
        seen.add(found.name)
        assert not any(map(why_damaged, checkpoints(output_dir))), "half of one bears its name"
        resumed, _ = trainer_of(output_dir, resume="latest", **OPTIONS)
        assert resumed.train().step == 2
        save(trainer)  # and what was left behind is in nobody's way
        assert [path.name for path in checkpoints(output_dir)] == ["checkpoint-2"]
        assert not list(checkpoint.Path(output_dir).glob("*checkpoint*.partial"))
    assert number > 15 and seen == {"checkpoint-1", "checkpoint-2"}


def test_a_damaged_file_is_noticed_whichever_it_is(trainer):
    save(trainer)
    last = newest(trainer.config.output_dir)
    assert last.name == "checkpoint-2"
    for path in sorted(last.iterdir()):
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], content[:-1], None):
            path.write_bytes(damaged) if damaged is not None else path.unlink()
            with pytest.warns(UserWarning, match="checkpoint-2 is damaged, .*an older one is used"):
                assert newest(trainer.config.output_dir).name == "checkpoint-1"
            with pytest.raises(ValueError, match="checkpoint-2 is damaged"):
                find_checkpoint(str(last), trainer.config.output_dir)
        path.write_bytes(content)
    assert newest(trainer.config.output_dir) == last


@pytest.mark.parametrize("room", [0, 1000, 20_000, 200_000, 400_000])
def test_a_full_disk_leaves_the_last_good_checkpoint(trainer, room):
    before = sorted(os.listdir(trainer.config.output_dir))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r"checkpoint-2 could not.*last good .*checkpoint-1"):
            save(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(trainer.config.output_dir)) == before
    save(trainer)
    assert newest(trainer.config.output_dir).name == "checkpoint-2"


def test_the_newest_are_kept_by_number_not_by_name(tmp_path):
    trainer, _ = trainer_of(tmp_path, max_steps=11, save_steps=1, save_total_limit=2)
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]


def test_an_older_checkpoint_can_be_continued(tmp_path):
    """The run from there on replaces what came after, and is not deleted as the oldest."""
    trainer, _ = trainer_of(tmp_path, max_steps=4, save_steps=1, save_total_limit=None)
    trainer.train()
    older = {"resume": str(tmp_path / "checkpoint-1"), "save_total_limit": 2}
    resumed, _ = trainer_of(tmp_path, max_steps=4, save_steps=1, **older)
    resumed.config.max_steps = 2
    resumed.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_a_model_that_cannot_be_written_leaves_the_older(trainer, monkeypatch):
    folder = checkpoint.Path(trainer.config.output_dir)
    before = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}

    def full(partial):
        (partial / "tokenizer.json").write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer.tokenizer, "save_pretrained", full)
    with pytest.raises(TrainingError, match="model could not be written .No space left"):
        save_pretrained(trainer)
    assert {path.name: path.read_bytes() for path in (folder / "model").iterdir()} == before
    assert not list(folder.glob("model.*"))


def test_killed_while_the_model_is_saved_one_is_whole(trainer, monkeypatch):
    folder = checkpoint.Path(trainer.config.output_dir)
    for number in range(1, 40):
        with monkeypatch.context() as patch:
            killed_at(patch, number)
            try:
                save_pretrained(trainer)
                break
            except Killed:
                pass
        whole = [path for path in folder.glob("model*") if len(list(path.iterdir())) >= 5]
        assert whole, number
    assert number > 5 and [path.name for path in folder.glob("model*")] == ["model"]


def test_a_run_that_went_back_replaces_its_later_checkpoints(tmp_path):
    trainer, _ = trainer_of(tmp_path, max_steps=3, save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-3" / "trainer.json").unlink()
    with pytest.warns(UserWarning, match="checkpoint-3 is damaged, trainer.json is missing"):
        resumed, records = trainer_of(tmp_path, max_steps=3, save_steps=1, resume="latest")
        resumed.train()
    assert list(records) == [3]
    assert why_damaged(tmp_path / "checkpoint-3") is None
