"""Checkpoints that are whole or not there: written aside, synced, named in one step."""

import json
import os
import shutil
import warnings
from dataclasses import fields
from pathlib import Path

import torch

from grpo_fused.trainer.errors import TrainingError

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # being written, or being deleted: never loaded


def save_checkpoint(accelerator, output_dir, step, write, keep=None):
    """Writes `checkpoint-STEP` and deletes all but the `keep` newest ones; on all ranks.

    A kill at any moment leaves the checkpoints that were there, and so does a full disk. Those of
    later steps go too: the run has gone back to before them. Ranks share the folder.

    Args:
        write: called with a new folder on every rank; writes its files.

    Raises:
        TrainingError: a rank could not write; what it had written is deleted.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f"checkpoint-{step}{PARTIAL}"

    def start():
        for leftover in output_dir.glob(f"checkpoint-*{PARTIAL}"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)

    def finish():
        seal(partial)
        put_in_place(partial, final)

    main = accelerator.is_main_process
    for action in (start if main else None, lambda: write(partial), finish if main else None):
        error = None
        try:
            if action is not None:
                action()
        except Exception as raised:  # of any kind: torch and safetensors have their own
            error = raised
        if not any_rank(accelerator, error is not None):
            continue
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        last = newest(output_dir)
        raise TrainingError(
            f"{final} could not be written ({error or 'on another rank'}); "
            f"the last good checkpoint is {last or 'none'}"
        ) from error
    if main:
        found = checkpoints(output_dir)
        number = found.index(final) + 1
        kept = found[:number] if keep is None else found[:number][-keep:]
        for path in found:
            if path not in kept:
                remove(path)
    return final


def seal(folder):
    """Lists what a folder holds and syncs it all to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / MANIFEST).write_text(json.dumps(sizes, indent=1))
    sync_all(folder)


def put_in_place(partial, final):
    """Gives a folder that is whole its name; one that bore it goes only then."""
    doomed = final.with_name(f"{final.name}.old{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    if final.exists():
        os.replace(final, doomed)
    os.replace(partial, final)
    sync(final.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def sync_all(folder):
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path):
    """Deletes a checkpoint; one that is half deleted does not bear its name."""
    doomed = path.with_name(f"{path.name}.old{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def why_damaged(folder):
    """What is wrong with a checkpoint, in a phrase; None if it is whole."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"its {MANIFEST} is missing or damaged"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"


def checkpoints(output_dir):
    """Paths of a run's checkpoints, oldest first, damaged ones included."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and path.is_dir():
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def newest(output_dir):
    """The newest whole checkpoint of a run, or None; warns of newer ones that are damaged."""
    for path in reversed(checkpoints(output_dir)):
        reason = why_damaged(path)
        if reason is None:
            return path
        warnings.warn(f"{path} is damaged, {reason}: an older one is used", stacklevel=2)
    return None


def find_checkpoint(resume, output_dir):
    """The checkpoint that the setting `resume` means, or None for a fresh start.

    Raises:
        ValueError: no such checkpoint, or a damaged one; output_dir has those of another run.
    """
    if resume == "latest":
        return newest(output_dir)
    path = None if resume is None else Path(resume)
    if path is not None and not path.is_dir():
        raise ValueError(f"resume must be latest or the folder of a checkpoint, got {resume!r}")
    if path is None or path.resolve().parent != Path(output_dir).resolve():
        if found := checkpoints(output_dir):
            raise ValueError(
                f"output_dir {output_dir} has {found[-1].name} of an earlier run: resume=latest "
                "continues it, another folder starts anew"
            )
    if path is not None and (reason := why_damaged(path)):
        raise ValueError(f"resume: {path} is damaged, {reason}")
    return path


def check_same_run(saved, config, now):
    """A run that goes on as if it had never stopped has the settings that it had.

    Args:
        saved: dict of a checkpoint: "config" and what `now` has.
        config: the dataclass of now.
        now: dict: name -> value, like "world size".

    Raises:
        ValueError: naming the first field that differs.
    """
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(f"resume: {name} is {value}, the checkpoint has {saved.get(name)}")
    schedule = getattr(config, "lr_scheduler_type", "")
    for this in fields(config):
        if this.metadata.get("free") or this.name not in saved["config"]:
            continue
        if this.name == "max_steps" and schedule.startswith("constant"):
            continue  # the steps until then are the same
        value, before = getattr(config, this.name), saved["config"][this.name]
        if value != before:
            raise ValueError(f"resume: {this.name} is {value!r}, the checkpoint has {before!r}")


def any_rank(accelerator, flag):
    """Whether a flag is set on some rank."""
    flags = torch.tensor([float(flag)], device=accelerator.device)
    return bool(accelerator.gather(flags).sum() > 0)


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=1))
