"""Rows from files, data sets and tasks: the same rows from each, and errors with line numbers."""

import csv
import json

import datasets
import pytest

from grpo_fused.trainer.run.data import load_rows

ROWS = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(5)]


@pytest.fixture(params=[".jsonl", ".csv", ".parquet", "folder", "split", "object", "list"])
def source(request, tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    path = tmp_path / f"rows{request.param}"
    if request.param == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    elif request.param == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "answer"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif request.param == ".parquet":
        data.to_parquet(path)
    elif request.param == "folder":
        data.save_to_disk(path)
    elif request.param == "split":
        datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(path)
    else:
        return data if request.param == "object" else list(ROWS)
    return str(path)


def test_every_kind_of_source_has_the_same_rows(source):
    rows = load_rows(source)
    assert len(rows) == 5 and [dict(row) for row in rows] == ROWS


def test_columns_by_other_names(source):
    rows = load_rows(source, columns={"prompt": "answer", "question": "prompt"})
    assert dict(rows[2]) == {"prompt": "3", "question": "2+1="}
    rows = load_rows(source, columns={"prompt": "answer"})  # the column that had the name goes
    assert dict(rows[2]) == {"prompt": "3"}


def test_a_system_prompt_makes_chats(source):
    messages = load_rows(source, system_prompt="Add.")[0]["prompt"]
    assert messages == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "0+1="},
    ]
    with pytest.raises(ValueError, match="system_prompt requires text prompts, got "):
        load_rows([{"prompt": messages}], system_prompt="Add.")


def test_chats_stay_what_they_are_and_missing_columns_are_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "hello"}]
    lines = [json.dumps({"prompt": chat}), json.dumps({"prompt": "text", "answer": 3})]
    path.write_text("\n".join(lines))
    assert load_rows(path) == [
        {"prompt": chat, "answer": None},
        {"prompt": "text", "answer": 3},
    ]


def test_long_fields_and_byte_order_marks(tmp_path):
    long = "1" * 200_000
    (tmp_path / "a.csv").write_text(f"prompt,answer\n{long},2\n")
    assert load_rows(tmp_path / "a.csv")[0]["prompt"] == long
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n', encoding="utf-8-sig")
    assert load_rows(tmp_path / "a.jsonl") == [{"prompt": "x"}]


def test_a_split_is_chosen(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=data, test=data.select([4])).save_to_disk(tmp_path / "d")
    assert load_rows(tmp_path / "d", split="test")[0]["prompt"] == "4+1="
    with pytest.raises(ValueError, match=r"no split tset \(did you mean test\?\), only train"):
        load_rows(tmp_path / "d", split="tset")


def test_a_task_by_name():
    pytest.importorskip("reasoning_gym")
    rows = load_rows("reasoning_gym:basic_arithmetic", task_size=4, task_seed=5)
    again = load_rows("reasoning_gym:basic_arithmetic", task_size=4, task_seed=5)
    other = load_rows("reasoning_gym:basic_arithmetic", task_size=4, task_seed=6)
    assert len(rows) == 4 and rows == again and rows != other
    assert rows[0].keys() == {"prompt", "answer", "entry"}
    with pytest.raises(ValueError, match=r"no task basic_aritmetic \(did you mean basic_arithm"):
        load_rows("reasoning_gym:basic_aritmetic")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", "", "a.jsonl has no rows"),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"prompt": \n',
            "a.jsonl, line 2 is not valid JSON: Expecting",
        ),
        ("a.jsonl", '\n\n["x"]\n', r"a.jsonl, line 3 must be an object, got \['x'\]"),
        ("a.jsonl", '{"promt": "x", "y": 1}', r"no column prompt \(did you mean promt\?\), only"),
        ("a.jsonl", '{"prompt": ""}', "a.jsonl: prompt of row 0 must be text or a list of mess"),
        ("a.jsonl", '{"prompt": "x"}\n{"y": 1}', "prompt of row 1 must be text .*, got None"),
        ("a.jsonl", '{"prompt": [{"role": "user"}]}', "prompt of row 0 must be text or a list"),
        ("a.csv", "prompt,answer\n", "a.csv has no rows"),
        ("a.csv", "prompt,answer\n1,2\n3\n", "a.csv, line 3 must have 2 values, got 1"),
        ("a.csv", "prompt,answer\n1,2,3\n", "a.csv, line 2 must have 2 values, got 3"),
        ("a.parquet", "text", "a.parquet cannot be read"),
        ("a.txt", "text", "data must end in .jsonl, .parquet, .csv or .*, got .*a.txt"),
    ],
)
def test_invalid_files_are_rejected_by_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name))


def test_missing_files_and_columns(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder: nowhere.jsonl"):
        load_rows("nowhere.jsonl")
    with pytest.raises(ValueError, match="is not a data set that `datasets` saved to disk"):
        load_rows(str(tmp_path))
    with pytest.raises(ValueError, match=r"data \(list\) has no rows"):
        load_rows([])
    with pytest.raises(ValueError, match="row 1 must have the columns prompt, got other"):
        load_rows([{"prompt": "x"}, {"other": "y"}])
    with pytest.raises(ValueError, match=r"no column qestion \(did you mean question\?\)"):
        load_rows([{"question": "x"}], columns={"prompt": "qestion"})
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.jsonl is not UTF-8"):
        load_rows(tmp_path / "latin.jsonl")
