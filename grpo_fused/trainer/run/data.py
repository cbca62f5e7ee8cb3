"""Loads training rows, dicts with a prompt and other columns, from files, data sets and tasks."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_fused.checks import nearest

TASK = "reasoning_gym:"
SUFFIXES = (".jsonl", ".parquet", ".csv")


def load_rows(
    source: str | Path | Sequence[dict],
    *,
    columns: dict[str, str] | None = None,
    split: str = "train",
    system_prompt: str | None = None,
    task_size: int = 1000,
    task_seed: int = 0,
) -> Sequence[dict[str, Any]]:
    """Loads rows that all have a "prompt" and the same other columns.

    Args:
        source: path of a .jsonl, .parquet or .csv file (every column of a csv is text) or of a
            folder that `datasets` saved to disk; "reasoning_gym:TASK"; a `datasets` data set; or
            a sequence of dicts.
        columns: maps the wanted name of a column to its name in the source, where they differ:
            {"prompt": "question"}.
        split: split to use of a data set that has several.
        system_prompt: instructions to put before text prompts, which become chats.
        task_size, task_seed: number of rows to generate for a task, and the seed.

    Returns:
        Sequence of dicts. "prompt" is a str or a list of messages. A column that some rows of a
        jsonl file lack is None in these rows.

    Raises:
        ValueError: the file, format, data set or task does not exist; a line is invalid (the
            message has its number); there are no rows or no prompt column; a prompt is neither
            text nor a list of messages.
    """
    if isinstance(source, (str, Path)):
        name, rows = str(source), _read(str(source), split, task_size, task_seed)
    else:
        name, rows = f"data ({type(source).__name__})", _split(source, "data", split)
    if len(rows) == 0:
        raise ValueError(f"{name} has no rows")
    rows = _renamed(name, rows, columns or {})
    known = _column_names(rows)
    if "prompt" not in known:
        raise ValueError(
            f"{name} has no column prompt{nearest('prompt', known)}, only {', '.join(known)}; "
            "set data_columns={prompt: NAME} to use another column"
        )
    if system_prompt is not None:
        rows = [row | {"prompt": _chat(row["prompt"], system_prompt)} for row in rows]
    for i, prompt in enumerate(_column(rows, "prompt")):
        if not (isinstance(prompt, str) and prompt) and not _is_chat(prompt):
            raise ValueError(
                f"{name}: prompt of row {i} must be text or a list of messages "
                f"{{role: ..., content: ...}}, got {prompt!r}"
            )
    return rows


def _read(source, split, task_size, task_seed):
    if source.startswith(TASK):
        return _task(source.removeprefix(TASK), task_size, task_seed)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"data: no such file or folder: {source}")
    if path.is_dir():
        import datasets

        try:
            return _split(datasets.load_from_disk(source), source, split)
        except FileNotFoundError:
            raise ValueError(
                f"data: {source} is not a data set that `datasets` saved to disk"
            ) from None
    if path.suffix not in SUFFIXES:
        raise ValueError(f"data must end in {', '.join(SUFFIXES)} or be a folder, got {source}")
    if path.suffix == ".parquet":
        return _parquet(source)
    try:
        return _jsonl(path) if path.suffix == ".jsonl" else _csv(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {source} is not UTF-8: {error}") from error


def _jsonl(path):
    rows, names = [], {}
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be an object, got {row!r}")
            names |= dict.fromkeys(row)
            rows.append(row)
    return [dict.fromkeys(names) | row for row in rows]


def _csv(path):
    csv.field_size_limit(2**31 - 1)  # the default rejects fields above 131,072 characters
    with open(path, encoding="utf-8-sig", newline="") as file:  # Excel writes a BOM
        reader = csv.DictReader(file)
        rows = []
        for row in reader:
            if None in row or None in row.values():  # DictReader marks extra and missing values
                wanted = len(reader.fieldnames)
                extra = len(row.pop(None, []))
                got = extra + sum(value is not None for value in row.values())
                raise ValueError(
                    f"{path}, line {reader.line_num} must have {wanted} values, got {got}"
                )
            rows.append(row)
    return rows


def _parquet(source):
    """Maps the file into memory; `load_dataset` would copy it to a cache."""
    import datasets
    from pyarrow import ArrowException, parquet

    try:
        return datasets.Dataset(parquet.read_table(source, memory_map=True))
    except (ArrowException, OSError) as error:
        raise ValueError(f"data: {source} cannot be read: {error}") from error


def _task(name, size, seed):
    """Generates rows of a reasoning-gym task; the reward `reasoning_gym` reads `entry`."""
    try:
        import reasoning_gym
    except ImportError:
        raise ValueError(
            f'data: {TASK}{name} needs reasoning-gym: pip install "reasoning-gym"'
        ) from None
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ValueError(f"data: reasoning_gym has no task {name}{nearest(name, DATASETS)}")
    task = reasoning_gym.create_dataset(name, size=size, seed=seed)
    return [
        {"prompt": entry["question"], "answer": entry["answer"], "entry": entry} for entry in task
    ]


def _split(data, name, split):
    """Selects one split of a DatasetDict; other data is returned as it is."""
    if not isinstance(data, dict):
        return data
    if split not in data:
        raise ValueError(
            f"{name} has no split {split}{nearest(split, data)}, only {', '.join(data)}"
        )
    return data[split]


def _column_names(rows):
    """Returns the column names, which must be the same in all rows."""
    if hasattr(rows, "column_names"):
        return rows.column_names
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"data: rows must be dicts, got {row!r}")
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"data: row {i} must have the columns {', '.join(rows[0])}, "
                f"got {', '.join(map(str, row))}"
            )
    return list(rows[0])


def _column(rows, name):
    return rows[name] if hasattr(rows, "column_names") else [row[name] for row in rows]


def _renamed(name, rows, columns):
    """Renames columns; {new: old} in `columns`."""
    known = _column_names(rows)
    for old in columns.values():
        if old not in known:
            raise ValueError(
                f"{name} has no column {old}{nearest(old, known)}, only {', '.join(known)}"
            )
    names = {old: new for new, old in columns.items() if new != old}
    # A column whose name is wanted for another column is dropped.
    lost = [old for old in known if old in names.values() and old not in names]
    if hasattr(rows, "column_names"):
        return rows.remove_columns(lost).rename_columns(names)
    if not names:
        return rows
    return [{names.get(k, k): v for k, v in row.items() if k not in lost} for row in rows]


def _chat(prompt, system_prompt):
    if not isinstance(prompt, str):
        raise ValueError(f"system_prompt requires text prompts, got {prompt!r}")
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": prompt}]


def _is_chat(prompt):
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in prompt)
    )


def split_columns(rows: Sequence[dict]) -> tuple[list, dict[str, list]]:
    """Separates the prompts of rows from their other columns.

    Returns:
        (prompts, columns): the prompts, and the values of every other column by its name. A value
        is None where a row lacks the column.
    """
    for row in rows:
        if "prompt" not in row:
            raise ValueError(f'data: a row has no "prompt": {row!r}')
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    prompts = [row["prompt"] for row in rows]
    return prompts, {name: [row.get(name) for row in rows] for name in names}
