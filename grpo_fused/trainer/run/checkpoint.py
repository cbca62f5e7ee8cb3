"""Atomic checkpoints: written to a temporary folder, synced to the disk, then renamed."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from grpo_fused.trainer.run.errors import OtherRankError, TrainingError, explain, together

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # suffix of folders that are being written or deleted; never loaded


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    write: Callable[[Path], None],
    keep: int | None = None,
) -> Path:
    """Writes `checkpoint-STEP` and deletes checkpoints that are no longer wanted.

    A process that is killed or runs out of disk space at any moment leaves the earlier checkpoints
    intact. Checkpoints of later steps are deleted as well: the run was resumed from before them.
    Every rank must call it, and all ranks must share `output_dir`.

    Args:
        accelerator: of the run.
        output_dir: folder that holds the checkpoints.
        step: optimizer steps taken so far.
        write: called with the new folder on every rank; writes this rank's files.
        keep: number of checkpoints to keep, newest first; None keeps all.

    Returns:
        Path of the checkpoint.

    Raises:
        TrainingError: a rank could not write; the unfinished checkpoint is deleted.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f"checkpoint-{step}{PARTIAL}"

    def start():
        for leftover in output_dir.glob(f"checkpoint-*{PARTIAL}"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)

    def finish():
        write_manifest(partial)
        replace_folder(partial, final)

    main = accelerator.is_main_process
    for action in (start if main else None, lambda: write(partial), finish if main else None):
        try:
            write_together(
                accelerator, partial, action or (lambda: None), f"{final} could not be written"
            )
        except TrainingError as error:
            last = latest_checkpoint(output_dir) or "none"
            raise type(error)(f"{error}; the last good checkpoint is {last}") from error.__cause__
    if main:
        found = list_checkpoints(output_dir)
        until_now = found[: found.index(final) + 1]
        kept = until_now if keep is None else until_now[-keep:]
        for path in found:
            if path not in kept:
                delete_checkpoint(path)
    return final


def write_together(
    accelerator: Accelerator, folder: Path, write: Callable[[], Any], failure: str
) -> None:
    """Lets every rank write to a folder; if one cannot, all raise, and the folder is deleted.

    Args:
        accelerator: of the run.
        folder: that is written.
        write: what this rank does.
        failure: beginning of the message.

    Raises:
        TrainingError: this rank could not write; it says why.
        OtherRankError: another rank could not.
    """
    try:
        together(accelerator, write)
    except Exception as error:  # torch and safetensors raise exceptions of their own
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OtherRankError):
            raise OtherRankError(f"{failure} (on another rank)") from error
        raise TrainingError(f"{failure} ({explain(error, folder.parent)})") from error


def write_manifest(folder: Path) -> None:
    """Records the size of every file in a folder, then syncs the folder to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / MANIFEST).write_text(json.dumps(sizes, indent=1))
    sync_folder(folder)


def replace_folder(partial: Path, final: Path) -> None:
    """Renames a complete folder to its final name; an older folder is deleted only afterwards."""
    doomed = final.with_name(f"{final.name}.old{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    if final.exists():
        os.replace(final, doomed)
    os.replace(partial, final)
    sync(final.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Syncs a folder and everything in it to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_checkpoint(path: Path) -> None:
    """Deletes a checkpoint. It is renamed first: no half-deleted folder looks like a checkpoint."""
    doomed = path.with_name(f"{path.name}.old{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def find_damage(folder: Path) -> str | None:
    """Describes how a checkpoint is damaged; None if it is complete."""
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
    return None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Lists the checkpoints of a run, oldest first, including damaged ones."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and path.is_dir():
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """Returns the newest complete checkpoint of a run; warns of newer ones that are damaged.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    damaged = []
    for path in reversed(list_checkpoints(output_dir)):
        reason = find_damage(path)
        if reason is None:
            for newer, why in damaged:
                warnings.warn(f"{newer} is damaged ({why}); using an older one", stacklevel=2)
            return path
        damaged.append((path, reason))
    if damaged:
        newest, why = damaged[0]
        raise ValueError(
            f"resume: all checkpoints in {output_dir} are damaged, the newest, {newest.name}, "
            f"because {why}; move them away for a fresh start"
        )
    return None


def resolve_checkpoint(resume: str | None, output_dir: str | Path) -> Path | None:
    """Returns the checkpoint that the setting `resume` refers to; None for a fresh start.

    Raises:
        ValueError: the checkpoint does not exist or is damaged; output_dir holds checkpoints of
            another run.
    """
    if resume == "latest":
        return latest_checkpoint(output_dir)
    path = None if resume is None else Path(resume)
    if path is not None and not path.is_dir():
        raise ValueError(
            f"resume must be 'latest' or the folder of a checkpoint, got {resume!r}, which does "
            "not exist"
        )
    if path is None or path.resolve().parent != Path(output_dir).resolve():
        if found := list_checkpoints(output_dir):
            raise ValueError(
                f"output_dir {output_dir} contains {found[-1].name} of an earlier run; set "
                "resume=latest to continue that run, or choose another output_dir"
            )
    if path is not None and (reason := find_damage(path)):
        raise ValueError(f"resume: {path} is damaged ({reason})")
    return path
