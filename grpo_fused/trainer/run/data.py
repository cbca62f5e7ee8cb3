"""Training rows, dicts with a prompt and other columns: loading, renaming and checking them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_fused.checks import nearest
from grpo_fused.trainer.run.errors import shorten
from grpo_fused.trainer.run.sources import Rows, choose_split, read_source

if TYPE_CHECKING:
    from grpo_fused.trainer.run.config import GRPOTrainerConfig


def load_rows(
    source: str | Path | Rows,
    *,
    columns: dict[str, str] | None = None,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    system_prompt: str | None = None,
    task_size: int = 1000,
    task_seed: int = 0,
) -> Rows:
    """Loads rows that all have a "prompt" and the same other columns.

    Args:
        source: path of a .jsonl, .parquet or .csv file (every column of a csv is text); of a folder
            that `datasets` saved to disk, or that holds data files as on the Hub; name of a data
            set of the Hub, OWNER/NAME; "reasoning_gym:TASK"; a `datasets` data set; or a sequence
            of dicts.
        columns: maps the wanted name of a column to its name in the source, where they differ:
            {"prompt": "question"}.
        subset: the configuration of a data set of the Hub that has several.
        split: split to use of a data set that has several.
        revision: branch, tag or commit of a data set of the Hub.
        streaming: read rows as they are needed, into a `datasets.IterableDataset`.
        system_prompt: instructions to put before text prompts, which become chats.
        task_size, task_seed: number of rows to generate for a task, and the seed.

    Returns:
        Sequence of dicts, or a stream of them. "prompt" is a str or a list of messages. A column
        that some rows of a jsonl file lack is None in these rows, and missing in those of a stream.

    Raises:
        ValueError: the file, format, data set or task does not exist; a line is invalid (the
            message has its number); there are no rows or no prompt column; a prompt is neither
            text nor a list of messages. Of a stream, only the first row is read.
    """
    if isinstance(source, (str, Path)):
        name = str(source)
        options = {"subset": subset, "split": split, "revision": revision, "streaming": streaming}
        rows = read_source(name, **options, task_size=task_size, task_seed=task_seed)
    else:
        name = f"data ({type(source).__name__})"
        rows = choose_split(source, "data", split)
        if streaming and not is_stream(rows):
            raise ValueError(f"data_streaming is for a source given by its name, got {name}")
    if not is_stream(rows) and len(rows) == 0:
        raise ValueError(f"{name} has no rows")
    known = _column_names(name, rows)
    rows, known = _renamed(name, rows, known, columns or {})
    if "prompt" not in known:
        raise ValueError(
            f"{name} has no column prompt{nearest('prompt', known)}, only {', '.join(known)}; "
            "set data_columns={prompt: NAME} to use another column"
        )
    if system_prompt is not None:

        def with_system(row):
            return {"prompt": _chat(row.get("prompt"), system_prompt)}

        if is_stream(rows):
            rows = rows.map(with_system)
        else:
            rows = [row | with_system(row) for row in rows]
    return check_rows(name, rows)


def is_stream(data: Any) -> bool:
    """Returns whether data is a `datasets.IterableDataset`, without importing `datasets`."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(data, datasets.IterableDataset)


def first_row(name: str, stream: Any) -> Any:
    """Returns the first row of a stream's first epoch.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    stream.set_epoch(0)
    try:
        for row in stream:
            return row
    except ValueError:
        raise  # of our readers, or of a format that names the fault
    except Exception as error:  # network and formats raise their own
        raise ValueError(f"{name} cannot be read: {type(error).__name__}: {error}") from error
    raise ValueError(f"{name} has no rows")


def check_eval_rows(data: Any, config: "GRPOTrainerConfig") -> Any:
    """Checks the held-out rows of a run that has eval_steps, and returns them.

    Raises:
        ValueError: there are none; see `check_rows`.
    """
    if data is None:
        raise ValueError(f"eval_steps = {config.eval_steps} requires eval_data, got None")
    return check_rows("eval_data", data, may_stream=False)


def check_rows(name: str, data: Any, *, may_stream: bool = True) -> Any:
    """Checks that data has rows with a prompt, and returns it.

    It reads all rows of lists and `datasets.Dataset`s. Of other sequences, which may compute their
    rows, and of streams, it reads the first.

    Args:
        name: of the data, for messages.
        data: a sequence of rows or, if `may_stream`, a `datasets.IterableDataset`.

    Raises:
        ValueError: naming the data and, counted from 1, the row.
    """
    if isinstance(data, dict):
        raise ValueError(
            f"{name} must be a sequence of rows, got a dict of {', '.join(map(str, data))}"
        )
    if is_stream(data):
        if not may_stream:
            raise ValueError(
                f"{name} must have a length, got an IterableDataset; list(stream.take(100)) "
                "makes a sequence of its first rows"
            )
        check_row(name, 1, first_row(name, data))
        return data
    if data is not None and not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ValueError(
            f"{name} must be a sequence of rows or a datasets.IterableDataset, got "
            f"{type(data).__name__}"
        )
    if isinstance(data, (str, bytes)):
        raise ValueError(
            f"{name} must be a sequence of rows, got {shorten(data)}; "
            "grpo_fused.trainer.run.data.load_rows reads files and data sets"
        )
    if data is None or len(data) == 0:
        raise ValueError(f"{name} has no rows")
    if "prompt" in getattr(data, "column_names", ()):
        for number, prompt in enumerate(data["prompt"], 1):
            check_row(name, number, {"prompt": prompt})
    else:
        for number, row in enumerate(data if isinstance(data, (list, tuple)) else [data[0]], 1):
            check_row(name, number, row)
    return data


def check_row(name: str, number: int, row: Any) -> None:
    """Checks that a row is a dict whose prompt is text or a chat.

    Args:
        name: of the data, for messages.
        number: of the row, counted from 1.
        row: of any type.

    Raises:
        ValueError: naming the data and the row.
    """
    where = f"{name}, row {number} (the first is 1)"
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a dict, got {shorten(row)}")
    if "prompt" not in row:
        names = ", ".join(map(str, row)) or "no columns"
        raise ValueError(f'{where} must have a "prompt"{nearest("prompt", row)}, got {names}')
    prompt = row["prompt"]
    if not (isinstance(prompt, str) and prompt) and not _is_chat(prompt):
        raise ValueError(
            f"{where}: prompt must be text that is not empty, or a list of messages "
            f"{{role: ..., content: ...}}, got {shorten(prompt)}"
        )


def _is_chat(prompt):
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in prompt)
    )


def _chat(prompt, system_prompt):
    if not isinstance(prompt, str):
        raise ValueError(f"system_prompt requires text prompts, got {shorten(prompt)}")
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": prompt}]


def _column_names(name, rows):
    """Returns the column names, which must be the same in all rows of a sequence."""
    if getattr(rows, "column_names", None) is not None:
        return rows.column_names
    if is_stream(rows):
        return list(first_row(name, rows))
    for number, row in enumerate(rows, 1):
        where = f"{name}, row {number} (the first is 1)"
        if not isinstance(row, dict):
            raise ValueError(f"{where} must be a dict, got {shorten(row)}")
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"{where} must have the columns {', '.join(map(str, rows[0]))}, "
                f"got {', '.join(map(str, row))}"
            )
    return list(rows[0])


def _renamed(name, rows, known, columns):
    """Returns the rows and the names of their columns after renaming: {new: old} in `columns`."""
    for old in columns.values():
        if old not in known:
            raise ValueError(
                f"{name} has no column {old}{nearest(old, known)}, only {', '.join(known)}; "
                "data_columns must be {WANTED: NAME IN THE DATA}"
            )
    names = {old: new for new, old in columns.items() if new != old}
    # A column whose name is wanted for another column is dropped.
    lost = [old for old in known if old in names.values() and old not in names]
    after = [names.get(old, old) for old in known if old not in lost]
    if not names:
        return rows, known
    if is_stream(rows):  # whose own rename_columns swaps no names, and wants all in every row

        def rename(row):
            return {new: row[old] for old, new in names.items() if old in row}

        return rows.map(rename, remove_columns=[*names, *lost]), after
    if hasattr(rows, "column_names"):
        return rows.remove_columns(lost).rename_columns(names), after
    return [{names.get(k, k): v for k, v in row.items() if k not in lost} for row in rows], after


def split_columns(rows: Sequence[dict]) -> tuple[list, dict[str, list]]:
    """Separates the prompts of rows from their other columns.

    Returns:
        (prompts, columns): the prompts, and the values of every other column by its name. A value
        is None where a row lacks the column.
    """
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    prompts = [row["prompt"] for row in rows]
    return prompts, {name: [row.get(name) for row in rows] for name in names}
