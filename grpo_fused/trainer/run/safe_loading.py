"""Reads checkpoints as data: no file in one can name code that runs.

`torch.load` builds any object that a file names unless `weights_only` is set, and a pickle can name
`os.system`. Ours sets it; torch.distributed.checkpoint and libraries below Accelerate do not
everywhere. One place covers them all.
"""

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException

# What torch.distributed.checkpoint writes into `.metadata`: data classes, sizes, dtypes, a path.
CHECKPOINT = "torch.distributed.checkpoint."
RECORDS = {
    *(f"{CHECKPOINT}filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
    f"{CHECKPOINT}metadata.BytesStorageMetadata",
    f"{CHECKPOINT}metadata.ChunkStorageMetadata",
    f"{CHECKPOINT}metadata.Metadata",
    f"{CHECKPOINT}metadata.MetadataIndex",
    f"{CHECKPOINT}metadata.StorageMeta",
    f"{CHECKPOINT}metadata.TensorProperties",
    f"{CHECKPOINT}metadata.TensorStorageMetadata",
    f"{CHECKPOINT}metadata._MEM_FORMAT_ENCODING",
    "collections.OrderedDict",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # Python 3.13
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
}
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # overrules `weights_only=False` of every caller


class RecordUnpickler(pickle.Unpickler):
    """Builds the records of `.metadata` and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and f"{module}.{name}" not in RECORDS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


@contextlib.contextmanager
def as_data(folder: Path, trust: bool = False) -> Iterator[None]:
    """Within it, a checkpoint can be loaded without running code that its files name.

    Args:
        folder: the checkpoint. Every `.metadata` in it is read first, by names that are allowed.
        trust: nothing is checked. For DeepSpeed, whose checkpoints hold objects of its classes.

    Raises:
        ValueError: a file of the checkpoint names something that is no data.
    """
    if trust:
        yield
        return
    for path in folder.rglob("*.metadata"):
        try:
            with open(path, "rb") as file:
                RecordUnpickler(file).load()
        except Exception as error:  # a pickle that is damaged raises nearly anything
            raise ValueError(_refusal(path, error)) from error
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        # torch.distributed.checkpoint collects the errors of all ranks in one.
        failures = error.failures.values() if isinstance(error, CheckpointException) else [(error,)]
        for cause, *_ in failures:
            if isinstance(cause, pickle.UnpicklingError):
                raise ValueError(_refusal(folder, cause)) from error
        raise
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before


def _refusal(path: Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"resume: {path} is not a checkpoint that can be read as data ({reason}); it is damaged, "
        "or was changed to run code"
    )
