"""Rows to train on, from files, data sets and tasks: dicts with a prompt and other columns."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from grpo_fused.checks import nearest

TASK = "reasoning_gym:"
READERS = (".jsonl", ".parquet", ".csv")


def load_rows(
    source,
    *,
    columns: dict[str, str] | None = None,
    split: str = "train",
    system_prompt: str | None = None,
    task_size: int = 1000,
    task_seed: int = 0,
) -> Sequence[dict]:
    """Rows of a source, each with a "prompt" and the same other columns.

    Args:
        source: path of a .jsonl, .parquet or .csv file (all columns of a csv are text) or of a
            folder that `datasets` saved to disk; "reasoning_gym:TASK" for a task by its name; a
            `datasets` data set; or a sequence of dicts.
        columns: name in the rows -> name in the source, where they differ: {"prompt": "question"}.
        split: of a `datasets` data set that has several.
        system_prompt: makes a chat of prompts that are text: these instructions, then the prompt.
        task_size, task_seed: rows of a task, and what they are drawn from.

    Returns:
        Sequence of dicts. "prompt" is a str or a list of messages; a column that some rows of a
        jsonl file lack is None there.

    Raises:
        ValueError: no such file, format, data set or task; a broken line, by its number; no rows;
            no prompt column, with the columns that are there; a prompt that is neither.
    """
    if isinstance(source, (str, Path)):
        name, rows = str(source), _read(str(source), split, task_size, task_seed)
    else:
        name, rows = f"data ({type(source).__name__})", _split(source, "data", split)
    if len(rows) == 0:
        raise ValueError(f"{name} has no rows")
    rows = _renamed(name, rows, columns or {})
    known = _columns(rows)
    if "prompt" not in known:
        raise ValueError(
            f"{name} has no column prompt{nearest('prompt', known)}: there are {', '.join(known)}; "
            "data_columns={prompt: NAME} says which it is"
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
        raise ValueError(f"data: there is no file or folder {source}")
    if path.is_dir():
        import datasets

        try:
            return _split(datasets.load_from_disk(source), source, split)
        except FileNotFoundError:
            raise ValueError(f"data: {source} is no folder that `datasets` saved to disk") from None
    if path.suffix not in READERS:
        raise ValueError(f"data: {source} must end in {', '.join(READERS)}, or be a folder")
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
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be an object, got {row!r}")
            names |= dict.fromkeys(row)
            rows.append(row)
    return [dict.fromkeys(names) | row for row in rows]


def _csv(path):
    csv.field_size_limit(2**31 - 1)  # or a prompt of 131,072 characters is an error
    with open(path, encoding="utf-8-sig", newline="") as file:  # Excel begins with a mark
        reader = csv.DictReader(file)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                wanted = len(reader.fieldnames)
                got = (
                    wanted + len(row[None])
                    if None in row
                    else sum(v is not None for v in row.values())
                )
                raise ValueError(
                    f"{path}, line {reader.line_num} must have {wanted} values, got {got}"
                )
            rows.append(row)
    return rows


def _parquet(source):
    """Read as it lies on the disk, in no cache."""
    import datasets
    from pyarrow import ArrowException, parquet

    try:
        return datasets.Dataset(parquet.read_table(source, memory_map=True))
    except (ArrowException, OSError) as error:
        raise ValueError(f"data: {source} cannot be read: {error}") from error


def _task(name, size, seed):
    """Rows of a task of reasoning-gym; the column `entry` is what its scoring wants."""
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
    """One data set of a dict of them, which `datasets` calls splits."""
    if not isinstance(data, dict):
        return data
    if split not in data:
        raise ValueError(
            f"{name} has no split {split}{nearest(split, data)}: there are {', '.join(data)}"
        )
    return data[split]


def _columns(rows):
    """Names; rows of a plain sequence must have the same."""
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
    """Columns under the names that are wanted of them."""
    known = _columns(rows)
    for old in columns.values():
        if old not in known:
            raise ValueError(
                f"{name} has no column {old}{nearest(old, known)}: there are {', '.join(known)}"
            )
    names = {old: new for new, old in columns.items() if new != old}
    # What bore a wanted name before makes room for what is to bear it.
    lost = [old for old in known if old in names.values() and old not in names]
    if hasattr(rows, "column_names"):
        return rows.remove_columns(lost).rename_columns(names)
    if not names:
        return rows
    return [{names.get(k, k): v for k, v in row.items() if k not in lost} for row in rows]


def _chat(prompt, system_prompt):
    if not isinstance(prompt, str):
        raise ValueError(f"system_prompt is for prompts that are text, got {prompt!r}")
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": prompt}]


def _is_chat(prompt):
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in prompt)
    )
