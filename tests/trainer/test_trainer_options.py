"""Options from a file and a command line: converted by type, rejected by name."""

import dataclasses

import pytest

from grpo_fused.trainer import TrainConfig
from grpo_fused.trainer.run.options import format_options, load_options


@dataclasses.dataclass
class Options:
    count: int = 1
    rate: float = 0.5
    name: str = "x"
    flag: bool = False
    limit: int | None = 3
    label: str | None = None
    names: list[str] = dataclasses.field(default_factory=list)
    rates: list[float] | None = None
    extras: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.count < 0:
            raise ValueError("count must be at least 0")


def written(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


TEXT = """\
count: 1e3
rate: 1e-6      # a string in YAML 1.1
name: no        # and this for False
flag: yes
limit: none
label: null
names: [a, 'no', 3]
rates:
  - 1
  - 0.5
extras: {low: 1e-1}
"""


def test_a_file_is_read_by_the_types_of_the_fields(tmp_path):
    options = load_options(Options, written(tmp_path, TEXT))
    wanted = Options(1000, 1e-6, "no", True, None, None, ["a", "no", "3"], [1.0, 0.5], {"low": 0.1})
    assert options == wanted
    assert type(options.count) is int and type(options.rates[0]) is float


def test_arguments_take_precedence_over_the_file(tmp_path):
    arguments = ["--count", "-0", "--rate=2", "--name", "a=b", "--flag", "false", "--limit", "7"]
    arguments += ["--names", "one", "--rates", "[1, 2]", "--extras.high", "3", "--label", "y"]
    options = load_options(Options, written(tmp_path, TEXT), arguments)
    wanted = Options(0, 2.0, "a=b", False, 7, "y", ["one"], [1.0, 2.0], {"low": 0.1, "high": 3.0})
    assert options == wanted
    assert load_options(Options, None, ["--extras", "{a: 1}"]).extras == {"a": 1.0}
    assert load_options(Options, written(tmp_path, "")) == Options()


def test_dashes_are_underscores():
    arguments = ["--model", "m", "--data", "d", "--rewards", "r", "--learning-rate", "1e-4"]
    assert load_options(TrainConfig, None, arguments).learning_rate == 1e-4


@pytest.mark.parametrize(
    "text, message",
    [
        ("count: 1\nrat: 2\n", r"config.yaml, line 2: there is no option rat \(did you mean rate"),
        ("count: 1.5\n", "line 1: count must be an integer, got '1.5'"),
        ("count: none\n", "count must be an integer, got 'none'"),
        ("count: inf\n", "count must be an integer, got 'inf'"),
        ("rate: fast\n", "rate must be a number, got 'fast'"),
        ("flag: 2\n", "flag must be true or false, got '2'"),
        ("limit: x\n", "limit must be an integer or none, got 'x'"),
        ("name: [a]\n", r"name must be a string, got \['a'\]"),
        ("rates: [1, x]\n", r"rates\[1\] must be a number, got 'x'"),
        ("extras: 3\n", "extras must be a mapping from names to numbers, got '3'"),
        ("extras: {a: b}\n", "extras.a must be a number, got 'b'"),
        ("count: 1\ncount: 2\n", "line 2: count is given twice"),
        ("- count\n", "must contain `name: value` lines, got a sequence"),
        ("count: [1\n", "config.yaml, line 2 is not valid YAML"),
        ("count: -1\n", "count must be at least 0"),
    ],
)
def test_a_bad_file_is_rejected_by_line_and_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_options(Options, written(tmp_path, text))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cuont", "1"], r"--cuont: there is no option cuont \(did you mean count\?\)"),
        (["--count"], "--count: a value is missing"),
        (["--count", "--rate"], "--count: a value is missing"),
        (["count", "1"], "expected --name value, got 'count'"),
        (["--count", "x"], "--count: count must be an integer, got 'x'"),
        (["--count.x", "1"], "--count.x: count is not a mapping, got count.x"),
        (["--names", "[a"], r"--names: '\[a' is not valid YAML, like \[a, b\]"),
    ],
)
def test_bad_arguments_are_rejected_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_options(Options, None, arguments)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml cannot be read: No such file"):
        load_options(Options, tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary.yaml cannot be read: not UTF-8"):
        load_options(Options, tmp_path / "binary.yaml")


def test_the_help_has_every_field_with_its_meaning_and_default():
    text = format_options(TrainConfig)
    for this in dataclasses.fields(TrainConfig):
        assert f"  --{this.name} " in text
        assert len(this.metadata["help"]) > 5 and this.metadata["help"].split()[0] in text
    assert "peak learning rate of AdamW (default: 1e-06)" in text
    first = text.split("  --")[1:3]  # those of the command, before the trainer's
    assert first[0].startswith("model a string") and "(required)" in first[0]
    assert max(map(len, text.splitlines())) <= 100
