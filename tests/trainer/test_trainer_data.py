"""Rows from files, data sets and tasks: the same rows from each, and errors with line numbers."""

import csv
import json
import os

import datasets
import pytest
from trainer_runs import trainer_of

from grpo_fused.trainer.run.command import load_data, load_eval_data
from grpo_fused.trainer.run.data import is_stream, load_rows
from grpo_fused.trainer.run.sources import is_hub_name
from grpo_fused.trainer.run.train_config import TrainConfig

ROWS = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(5)]
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
- config_name: other
  data_files:
  - {split: train, path: other/train.jsonl}
---
"""


def write_jsonl(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def repository(tmp_path):
    """A folder like a repository of the Hub: a card with two subsets, one with two splits."""
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "README.md").write_text(CARD)
    for name in ("main/train", "main/test", "other/train"):
        rows = [{"prompt": f"{name} {row['prompt']}"} for row in ROWS]
        write_jsonl(tmp_path / "repository" / f"{name}.jsonl", rows)
    return tmp_path / "repository"


KINDS = [".jsonl", ".csv", ".parquet", "folder", "split", "files", "object", "list"]


@pytest.fixture(params=[*KINDS, *(f"stream {kind}" for kind in KINDS[:-1])])
def source(request, tmp_path):
    """(source, options of load_rows) of the same rows."""
    streaming, _, kind = request.param.rpartition(" ")
    options = {"streaming": True} if streaming else {}
    data = datasets.Dataset.from_list(ROWS)
    path = tmp_path / f"rows{kind}"
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    elif kind == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "answer"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == ".parquet":
        data.to_parquet(path)
    elif kind == "folder":
        data.save_to_disk(path)
    elif kind == "split":
        datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(path)
    elif kind == "files":
        path.mkdir()
        data.to_parquet(path / "train.parquet")
    elif kind == "object":
        return (data.to_iterable_dataset() if streaming else data), options
    else:
        return list(ROWS), options
    return str(path), options


def loaded(source, **options):
    """The rows as a list, after a check of whether they are a stream."""
    rows = load_rows(source[0], **source[1], **options)
    assert is_stream(rows) == bool(source[1])
    assert bool(source[1]) or len(rows) == 5
    return [dict(row) for row in rows]


def test_every_kind_of_source_has_the_same_rows(source):
    assert loaded(source) == ROWS


def test_columns_by_other_names(source):
    rows = loaded(source, columns={"prompt": "answer", "question": "prompt"})
    assert rows[2] == {"prompt": "3", "question": "2+1="}
    rows = loaded(source, columns={"prompt": "answer"})  # the column that had the name goes
    assert rows[2] == {"prompt": "3"}
    with pytest.raises(ValueError, match=r"no column anser \(did you mean answer\?\), only prompt"):
        load_rows(source[0], **source[1], columns={"prompt": "anser"})


def test_a_system_prompt_makes_chats(source):
    messages = loaded(source, system_prompt="Add.")[0]["prompt"]
    assert messages == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "0+1="},
    ]
    with pytest.raises(ValueError, match="system_prompt requires text prompts, got "):
        load_rows([{"prompt": messages}], system_prompt="Add.")


@pytest.mark.parametrize("streaming", [False, True])
def test_values_of_jsonl_are_those_of_the_file(tmp_path, streaming):
    """`load_dataset` changes each of these."""
    values = [{"a": 1}, {"b": {"c": None}}, [1, "2", None], 3, "3", 2.5, "2024-01-01", 2**70, None]
    values += [[{"x": 1}, {"y": 2}], True, "", {}]
    rows = [{"prompt": "p", "value": value} for value in values]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    found = list(load_rows(tmp_path / "rows.jsonl", streaming=streaming))
    assert found == rows
    assert [type(row["value"]) for row in found] == [type(value) for value in values]
    renamed = load_rows(tmp_path / "rows.jsonl", streaming=streaming, columns={"v": "value"})
    assert [row["v"] for row in renamed] == values


@pytest.mark.parametrize("streaming", [False, True])
def test_values_of_csv_are_text(tmp_path, streaming):
    text = 'prompt,answer,note\n"a\nb",007,\nNA,1.50,"x,""y"""\n\n1e3,true,null\n'
    (tmp_path / "a.csv").write_text(text)
    assert [tuple(row.values()) for row in load_rows(tmp_path / "a.csv", streaming=streaming)] == [
        ("a\nb", "007", ""),
        ("NA", "1.50", 'x,"y"'),
        ("1e3", "true", "null"),
    ]


def test_chats_stay_what_they_are_and_missing_columns_are_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "hello"}]
    write_jsonl(path, [{"prompt": chat}, {"prompt": "text", "answer": 3}])
    expected = [{"prompt": chat, "answer": None}, {"prompt": "text", "answer": 3}]
    assert load_rows(path) == expected
    rows = list(load_rows(path, streaming=True))  # which cannot know what follows
    assert rows == [{"prompt": chat}, expected[1]]
    write_jsonl(path, [{"question": "a", "level": 1}, {"question": "b"}])
    renamed = load_rows(path, streaming=True, columns={"prompt": "question", "hard": "level"})
    assert list(renamed) == [{"prompt": "a", "hard": 1}, {"prompt": "b"}]


def test_long_fields_and_byte_order_marks(tmp_path):
    long = "1" * 200_000
    (tmp_path / "a.csv").write_text(f"prompt,answer\n{long},2\n", encoding="utf-8-sig")
    assert load_rows(tmp_path / "a.csv") == [{"prompt": long, "answer": "2"}]
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\r\n', encoding="utf-8-sig")
    assert load_rows(tmp_path / "a.jsonl") == [{"prompt": "x"}]


def test_a_split_is_chosen(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=data, test=data.select([4])).save_to_disk(tmp_path / "d")
    assert load_rows(tmp_path / "d", split="test")[0]["prompt"] == "4+1="
    with pytest.raises(ValueError, match=r"no split tset \(did you mean test\?\), only train"):
        load_rows(tmp_path / "d", split="tset")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_repository_has_subsets_and_splits(repository, streaming):
    def first(**options):
        return next(iter(load_rows(repository, streaming=streaming, **options)))["prompt"]

    assert first(subset="main") == "main/train 0+1="
    assert first(subset="main", split="test") == "main/test 0+1="
    assert first(subset="other") == "other/train 0+1="
    for options, message in [
        ({}, r"Config name is missing.*\['main', 'other'\].* \(with data_config none, data_split"),
        ({"subset": "man"}, r"'man' not found. Available: \['main', 'other'\]"),
        ({"subset": "main", "split": "tset"}, r"split.*tset.*\['train', 'test'\]"),
        ({"subset": "main", "revision": "v1"}, "data_revision is for names on the Hub, got 'v1'"),
    ]:
        with pytest.raises(ValueError, match=message):
            first(**options)


def test_files_that_change_are_read_anew(repository, tmp_path):
    """`load_dataset` gives the rows of a folder with a card that it has seen first."""
    for content in ("old", "new"):
        write_jsonl(repository / "main" / "train.jsonl", [{"prompt": content}])
        os.utime(repository / "main" / "train.jsonl", (0, 0))
        assert load_rows(repository, subset="main")[0] == {"prompt": content}
    for name in ("a.jsonl", "a.csv", "a.parquet", "d/train.parquet"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        for content in ("old", "new"):
            if name.endswith("jsonl"):
                write_jsonl(path, [{"prompt": content}])
            elif name.endswith("csv"):
                path.write_text(f"prompt\n{content}\n")
            else:
                datasets.Dataset.from_list([{"prompt": content}]).to_parquet(path)
            os.utime(path, (0, 0))
            source = path.parent if path.parent.name == "d" else path
            for streaming in (False, True):
                (row,) = load_rows(source, streaming=streaming)
                assert row == {"prompt": content}, (name, streaming)


def test_nothing_is_copied_to_a_cache(repository, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.csv").write_text("prompt\n1\n")
    for source in (tmp_path / "a.parquet", tmp_path / "a.jsonl", tmp_path / "a.csv"):
        load_rows(source)
    load_rows(repository, subset="main")
    assert not (tmp_path / "cache").exists()


def test_names_of_the_hub(monkeypatch):
    """What `load_dataset` is asked for, and what is said when the network fails."""
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((*arguments, options))
        if options["revision"] == "gone":
            raise ConnectionError("Couldn't reach\n'openai/gsm8k' on the Hub")
        data = datasets.Dataset.from_list([{"question": "1+1?", "answer": "2"}])
        return data.to_iterable_dataset() if options["streaming"] else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"model": "m", "rewards": ["math_verify"], "data": "openai/gsm8k", "eval_steps": 1}
    options |= {"data_columns": {"prompt": "question"}, "data_config": "main"}
    options |= {"eval_data": "openai/gsm8k", "eval_data_split": "test[:100]"}
    config = TrainConfig(**options, data_streaming=True, data_revision="v1")
    assert list(load_data(config)) == load_eval_data(config).to_list()
    assert load_eval_data(config)[0] == {"prompt": "1+1?", "answer": "2"}
    asked = {"name": "main", "revision": "v1"}
    assert calls[0] == ("openai/gsm8k", {**asked, "split": "train", "streaming": True})
    assert calls[1] == ("openai/gsm8k", {**asked, "split": "test[:100]", "streaming": False})
    message = (
        "data: there is no file or folder openai/gsm8k here, and as a data set of the Hub it "
        "cannot be loaded: ConnectionError: Couldn't reach 'openai/gsm8k' on the Hub "
        r"\(with data_config main, data_split train\)"
    )
    with pytest.raises(ValueError, match=message):
        load_data(TrainConfig(**options, data_revision="gone"))


def test_held_out_files_beside_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """Subset and revision are those of the training data."""
    write_jsonl(tmp_path / "held_out.jsonl", ROWS)
    options = {"model": "m", "rewards": ["math_verify"], "data": "openai/gsm8k", "eval_steps": 1}
    options |= {"data_config": "main", "data_revision": "v1"}
    config = TrainConfig(**options, eval_data=str(tmp_path / "held_out.jsonl"))
    assert load_eval_data(config) == ROWS
    with pytest.raises(ValueError, match="eval_data_split requires eval_data, got 'test'"):
        TrainConfig(**options, eval_data_split="test")


def test_what_is_a_name_of_the_hub(repository, monkeypatch):
    for name in ("openai/gsm8k", "a-b/c_d.v1"):
        assert is_hub_name(name)
    for name in ("gsm8k", "runs/rows.jsonl", "/data/rows", "a/b/c", "../rows", str(repository)):
        assert not is_hub_name(name), name
    monkeypatch.chdir(repository.parent.parent)
    assert not is_hub_name(f"{repository.parent.name}/{repository.name}")


def test_a_task_by_name():
    pytest.importorskip("reasoning_gym")
    rows = load_rows("reasoning_gym:basic_arithmetic", task_size=4, task_seed=5)
    again = load_rows("reasoning_gym:basic_arithmetic", task_size=4, task_seed=5)
    other = load_rows("reasoning_gym:basic_arithmetic", task_size=4, task_seed=6)
    assert len(rows) == 4 and rows == again and rows != other
    assert rows[0].keys() == {"prompt", "answer", "entry"}
    with pytest.raises(ValueError, match=r"no task basic_aritmetic \(did you mean basic_arithm"):
        load_rows("reasoning_gym:basic_aritmetic")


TWO_LINES = '{"prompt": "x"}\n\n{"prompt": \n'


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", "", "a.jsonl has no rows"),
        ("a.jsonl", TWO_LINES, "a.jsonl, line 3 is not valid JSON: Expecting"),
        ("a.jsonl", '\n\n["x"]\n', r"a.jsonl, line 3 must be an object, got \['x'\]"),
        ("a.jsonl", '{"promt": "x", "y": 1}', r"no column prompt \(did you mean promt\?\), only"),
        ("a.jsonl", '{"prompt": ""}', r"a.jsonl, row 1 \(the first is 1\): prompt must be text th"),
        ("a.jsonl", '{"prompt": 3}', "row 1 .*: prompt must be text that is not empty, .* got 3"),
        ("a.jsonl", '{"prompt": []}', r"row 1 .*: prompt must be text .* got \[\]"),
        ("a.jsonl", '{"prompt": [{"role": "user"}]}', "row 1 .*: prompt must be text .* list"),
        ("a.csv", "", "a.csv has no rows"),
        ("a.csv", "prompt,answer\n", "a.csv has no rows"),
        ("a.csv", "prompt,answer\n1,2\n3\n", "a.csv, line 3 must have 2 values, got 1"),
        ("a.csv", 'prompt,answer\n"1\n2",2,3\n', "a.csv, line 3 must have 2 values, got 3"),
        ("a.csv", "prompt,prompt\n1,2\n", "a.csv, line 1 names column 'prompt' twice"),
        ("a.csv", 'prompt,answer\n1,"2\n', "a.csv, line 2 is not valid CSV: unexpected end"),
        ("a.csv", b"prompt\nd\xe9j\xe0\n", "a.csv is not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n"\xe9"', "a.jsonl, line 2 is not UTF-8"),
        ("a.parquet", "text", "a.parquet cannot be read"),
        ("a.txt", "text", "data must end in .jsonl, .parquet, .csv or .*, got .*a.txt"),
    ],
)
def test_invalid_files_are_rejected_by_line(tmp_path, name, text, message, streaming):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        list(load_rows(str(tmp_path / name), streaming=streaming))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_files_that_cannot_be_read(tmp_path, name):
    (tmp_path / name).symlink_to("/proc/self/mem")  # reading it fails, for root too
    with pytest.raises(ValueError, match=f"{name} cannot be read: "):
        load_rows(tmp_path / name)


def test_later_rows_are_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}, {"y": 1}])
    with pytest.raises(ValueError, match=r"a.jsonl, row 2 \(the first is 1\): prompt .* got None"):
        load_rows(tmp_path / "a.jsonl")
    datasets.Dataset.from_list([{"prompt": "x"}, {"prompt": ""}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 2 \(the first is 1\): prompt .* got ''"):
        load_rows(tmp_path / "a.parquet")


def test_missing_files_and_columns(tmp_path):
    for name in ("nowhere.jsonl", "runs/nowhere.csv", "nowhere", "/nowhere/rows", "a/b/c"):
        with pytest.raises(ValueError, match=f"no such file or folder: {name}"):
            load_rows(name)
    with pytest.raises(ValueError, match="cannot be loaded: EmptyDatasetError: .* doesn't contain"):
        load_rows(str(tmp_path))
    with pytest.raises(ValueError, match=r"data \(list\) has no rows"):
        load_rows([])
    with pytest.raises(ValueError, match=r"row 2 \(the .* must have the columns prompt, got other"):
        load_rows([{"prompt": "x"}, {"other": "y"}])
    with pytest.raises(ValueError, match=r"row 2 \(the first is 1\) must be a dict, got 'x'"):
        load_rows([{"prompt": "x"}, "x"])
    with pytest.raises(ValueError, match=r"no column qestion \(did you mean question\?\)"):
        load_rows([{"question": "x"}], columns={"prompt": "qestion"})


def test_arguments_that_are_not_for_a_kind_of_source(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "a.jsonl", tmp_path / "saved", "reasoning_gym:basic_arithmetic"):
        with pytest.raises(ValueError, match="data_config is for data sets of the Hub, got 'main'"):
            load_rows(source, subset="main")
        with pytest.raises(ValueError, match="data_revision is for data sets of the Hub, got 'v1'"):
            load_rows(source, revision="v1")
    with pytest.raises(ValueError, match="data_streaming must be false for reasoning_gym:basic"):
        load_rows("reasoning_gym:basic_arithmetic", streaming=True)
    with pytest.raises(ValueError, match="data_streaming is for a source given by its name, got d"):
        load_rows(ROWS, streaming=True)


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "data has no rows"),
        ([{"question": "?"}], r'data, row 1 \(the first is 1\) must have a "prompt", got question'),
        ([{}], 'row 1 .* must have a "prompt", got no columns'),
        ([{"promt": "?"}], r"\(did you mean promt\?\), got promt"),
        ([ROWS[0], {"answer": "3"}], 'row 2 .* must have a "prompt", got answer'),
        ([ROWS[0], "text"], "row 2 .* must be a dict, got 'text'"),
        (["text"], "row 1 .* must be a dict, got 'text'"),
        ((ROWS[0], {"prompt": ""}), "row 2 .*: prompt must be text that is not empty, .* got ''"),
        ([{"prompt": None}], "row 1 .*: prompt must be text .* got None"),
        ([{"prompt": 3}], "row 1 .*: prompt must be text .* got 3"),
        ([{"prompt": ["hello"]}], "row 1 .*: prompt must be text .* got "),
        (datasets.Dataset.from_list([*ROWS, {"prompt": ""}]), "row 6 .*: prompt must be text .*''"),
        (datasets.Dataset.from_list([{"q": ""}]), 'row 1 .* must have a "prompt", got q'),
        (datasets.Dataset.from_list([{"q": ""}]).to_iterable_dataset(), 'row 1 .* have a "prompt"'),
        (datasets.Dataset.from_dict({"prompt": []}), "data has no rows"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "got a dict of train"),
        ("rows.jsonl", "data must be a sequence of rows, got 'rows.jsonl'; .*load_rows reads"),
        (iter(ROWS), "sequence of rows or a datasets.IterableDataset, got list_iterator"),
        ({1, 2}, "sequence of rows or a datasets.IterableDataset, got set"),
        (None, "data has no rows"),
    ],
)
def test_rows_that_a_trainer_rejects_at_once(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, data=data)


def test_a_sequence_that_computes_its_rows_is_read_as_it_goes(tmp_path):
    class Computed:
        read = 0

        def __len__(self):
            return 1000

        def __getitem__(self, i):
            self.read += 1
            return {"prompt": "1?2=", "answer": "2"} if i < 998 else {"prompt": ""}

    data = Computed()
    trainer, _ = trainer_of(tmp_path, data=data, shuffle=False, max_steps=1)
    trainer.train()
    assert data.read < 150
    trainer.data_position = 996  # rows 997 to 1000
    with pytest.raises(ValueError, match=r"data, row 999 \(the first is 1\): prompt must be text"):
        trainer.experience, trainer.config.max_steps = None, 2
        trainer.train()


def test_held_out_rows_must_have_a_length(tmp_path):
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(ValueError, match="eval_data must have a length, got an IterableDataset; l"):
        trainer_of(tmp_path, eval_steps=1, eval_data=stream)
