"""Reads the source of a run's rows: a file, a folder, a data set of the Hub, a generated task."""

import csv
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from grpo_fused.checks import nearest
from grpo_fused.trainer.run.errors import shorten

if TYPE_CHECKING:
    import datasets

TASK = "reasoning_gym:"
SUFFIXES = (".jsonl", ".parquet", ".csv")
SAVED = ("state.json", "dataset_dict.json")  # `save_to_disk` writes one of them
HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"

Rows = Union[Sequence[dict[str, Any]], "datasets.IterableDataset"]


def has_subsets(source: str) -> bool:
    """Returns whether a source is read by `load_dataset`, so that it may have subsets."""
    path = Path(source)
    if source.startswith(TASK) or path.suffix in SUFFIXES:
        return False
    return not any((path / name).is_file() for name in SAVED)


def is_hub_name(source: str) -> bool:
    """Returns whether a source has the form OWNER/NAME, and is nothing that exists here."""
    path = Path(source)
    is_name = re.fullmatch(HUB_NAME, source) is not None
    return is_name and path.suffix not in SUFFIXES and not path.exists()


def read_source(
    source: str,
    *,
    subset: str | None,
    split: str,
    revision: str | None,
    streaming: bool,
    task_size: int,
    task_seed: int,
) -> Rows:
    """Reads the rows of a source as they are in it; see `load_rows` for the arguments.

    Raises:
        ValueError: the source does not exist or cannot be read; an argument is not for its kind.
    """
    if not has_subsets(source):
        for name, value in (("data_config", subset), ("data_revision", revision)):
            if value is not None:
                raise ValueError(f"{name} is for data sets of the Hub, got {value!r} with {source}")
    if source.startswith(TASK):
        if streaming:
            raise ValueError(f"data_streaming must be false for {source}, whose rows are generated")
        return _task(source.removeprefix(TASK), task_size, task_seed)
    path = Path(source)
    if path.is_dir():
        if not has_subsets(source):
            return _saved(source, split, streaming)
        if revision is not None:
            raise ValueError(f"data_revision is for names on the Hub, got {revision!r} with {path}")
        return _load_folder(source, subset, split, streaming)
    if is_hub_name(source):
        hub = f"there is no file or folder {source} here, and as a data set of the Hub it"
        return _load(hub, source, name=subset, split=split, revision=revision, streaming=streaming)
    if not path.exists():
        raise ValueError(f"data: no such file or folder: {source}")
    if path.suffix == ".parquet":
        return _parquet(source, streaming)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"data must end in {', '.join(SUFFIXES)} or be a folder, got {source}")
    reader = read_jsonl if path.suffix == ".jsonl" else read_csv
    if streaming:
        import datasets

        return datasets.IterableDataset.from_generator(reader, gen_kwargs={"path": source})
    rows = list(reader(source))
    # The lines of a jsonl file may lack columns; the same are in every row.
    names = {name: None for row in rows for name in row}
    return [row if len(row) == len(names) else names | row for row in rows]


# Both readers are ours because `load_dataset` changes values, measured with datasets 5.2. Of jsonl
# it makes "2024-01-01" a datetime, a "3" in a column that also has 3 an int, 1 next to 2.5 a float,
# and it adds every key of a nested dict to all others. Of csv it fills rows that are too short with
# "", and drops the first value of rows that are too long. It also caches what it has read.


def read_jsonl(path: str) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file with one JSON object per line; blank lines do not count.

    Raises:
        ValueError: naming the line that is not UTF-8, no JSON or no object.
    """
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"data: {path}, line {number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if not text.strip():
                        continue
                    row = json.loads(text)
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where} is not UTF-8: {error}") from error
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where} is not valid JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{where} must be an object, got {shorten(row)}")
                yield row
    except OSError as error:
        raise ValueError(f"data: {path} cannot be read: {error.strerror}") from error


def read_csv(path: str) -> Iterator[dict[str, str]]:
    """Yields the rows of a csv file whose first line has the names; every value is text.

    Raises:
        ValueError: naming the line that has too few values, too many or an open quote.
    """
    csv.field_size_limit(2**31 - 1)  # the default rejects fields above 131,072 characters
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # Excel writes a BOM
            reader = csv.reader(file, strict=True)
            try:
                names = next(reader, [])
                for name in names:
                    if names.count(name) > 1:
                        raise ValueError(f"data: {path}, line 1 names column {name!r} twice")
                for values in reader:
                    if values and len(values) != len(names):
                        raise ValueError(
                            f"data: {path}, line {reader.line_num} must have {len(names)} values, "
                            f"got {len(values)}"
                        )
                    if values:  # a blank line has none
                        yield dict(zip(names, values, strict=True))
            except csv.Error as error:
                where = f"data: {path}, line {reader.line_num}"
                raise ValueError(f"{where} is not valid CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8: {error}") from error
    except OSError as error:
        raise ValueError(f"data: {path} cannot be read: {error.strerror}") from error


def _parquet(source, streaming):
    """Reads the file itself; `load_dataset` would copy all of it to a cache first."""
    import datasets
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(source, memory_map=True) as file:
            if not streaming:
                return datasets.Dataset(file.read())
    except (ArrowException, OSError) as error:
        raise ValueError(f"data: {source} cannot be read: {error}") from error
    return _load(source, "parquet", data_files=source, split="train", streaming=True)


def _saved(source, split, streaming):
    """Maps a folder of `save_to_disk` into memory."""
    import datasets

    try:
        data = datasets.load_from_disk(source)
    except Exception as error:  # whatever the formats inside raise
        raise ValueError(f"data: {source} cannot be read: {error}") from error
    data = choose_split(data, source, split)
    return data.to_iterable_dataset() if streaming else data


def choose_split(data: Any, name: str, split: str) -> Any:
    """Selects one split of a DatasetDict; other data is returned as it is.

    Raises:
        ValueError: there is no such split.
    """
    if not isinstance(data, dict):
        return data
    if split not in data:
        raise ValueError(
            f"{name} has no split {split}{nearest(split, data)}, only {', '.join(data)}"
        )
    return data[split]


def _load_folder(source, subset, split, streaming):
    """Loads data files in a folder, with or without the card that they have on the Hub."""
    options = {"name": subset, "split": split, "streaming": streaming}
    if streaming:
        return _load(source, source, **options)
    # The cache is of this run alone: for a folder with a card, datasets 5.2 would give the rows
    # that its files had when they were first read.
    with tempfile.TemporaryDirectory(prefix="grpo-fused-") as cache:
        return _load(source, source, **options, cache_dir=cache, keep_in_memory=True)


def _load(subject, *arguments, **options):
    """Calls `load_dataset`; several ranks may do so at once, for it locks its cache.

    Of names on the Hub the cache lies where HF_DATASETS_CACHE or HF_HOME say, by their commit.
    """
    import datasets

    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # the Hub, the network and each format raise their own
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())
        raise ValueError(
            f"data: {subject} cannot be loaded: {type(cause).__name__}: {reason} "
            f"(with data_config {options.get('name') or 'none'}, data_split {options['split']})"
        ) from error


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
