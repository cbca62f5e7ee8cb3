"""The log of a run has each step once and in order, however an earlier run ended."""

import json
import math
import resource

import pytest
import torch
from matplotlib.figure import Figure

from grpo_fused.trainer.run.log import RunLog, read_metrics
from grpo_fused.trainer.run.plot import plot_history


def steps_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["reward"]) for line in map(json.loads, lines)]


def logged(folder, steps, value):
    log = RunLog(folder)
    for step in steps:
        log.write(step, {"reward": value})
    return log


def test_lines_are_on_the_disk_as_they_are_written(tmp_path):
    log = RunLog(tmp_path / "a" / "b")
    log.write(1, {"reward": 0.5, "kl": math.nan, "loss": math.inf})
    line = json.loads((tmp_path / "a" / "b" / "metrics.jsonl").read_text())
    assert line == {"step": 1, "reward": 0.5, "kl": None, "loss": None}
    log.write(2, {"reward": 0.75})
    assert steps_of(tmp_path / "a" / "b") == [(1, 0.5), (2, 0.75)]


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path, no_plot):
    logged(tmp_path, range(1, 8), 0.0)  # killed: never closed
    logged(tmp_path, range(5, 9), 1.0).close()
    assert steps_of(tmp_path) == [(i, 0.0) for i in range(1, 5)] + [(i, 1.0) for i in range(5, 9)]
    logged(tmp_path, range(0, 3), 2.0)
    assert steps_of(tmp_path) == [(0, 2.0), (1, 2.0), (2, 2.0)]
    logged(tmp_path, range(1, 3), 3.0)  # a fresh start drops an older evaluation
    assert steps_of(tmp_path) == [(1, 3.0), (2, 3.0)]


def test_a_run_without_steps_keeps_the_log(tmp_path, no_plot):
    logged(tmp_path, range(1, 4), 0.0).close()
    RunLog(tmp_path).close()
    assert len(steps_of(tmp_path)) == 3


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    logged(tmp_path, range(1, 4), 0.0)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(whole.rindex(b"\n", 0, -1) + 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert [line["step"] for line in read_metrics(path)] == [1, 2]
    logged(tmp_path, [3, 4], 1.0)
    assert steps_of(tmp_path) == [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0)]
    path.write_bytes(whole + b"[]\n\xff\n{}\n" + b'{"step": 2, "reward": 5}\n')
    assert [(line["step"], line["reward"]) for line in read_metrics(path)] == [(1, 0.0), (2, 5)]


def test_metrics_are_added_to_the_line_of_a_step(tmp_path):
    logged(tmp_path, range(1, 4), 0.0)
    log = RunLog(tmp_path)
    log.extend(2, {"eval/reward": 0.5})  # resumed from step 2, which was to be evaluated
    assert log.history[-1] == {"step": 2, "reward": 0.0, "eval/reward": 0.5}
    log.write(3, {"reward": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == log.history == [
        {"step": 1, "reward": 0.0},
        {"step": 2, "reward": 0.0, "eval/reward": 0.5},
        {"step": 3, "reward": 1.0},
    ]  # fmt: skip
    logged(tmp_path / "first", [0, 1], 0.0)
    RunLog(tmp_path / "first").extend(1, {"kl": 1.0})
    assert steps_of(tmp_path / "first") == [(0, 0.0), (1, 0.0)]
    RunLog(tmp_path / "other").extend(2, {"eval/reward": 0.5})
    assert read_metrics(tmp_path / "other" / "metrics.jsonl") == [{"step": 2, "eval/reward": 0.5}]


def test_a_full_disk_takes_the_line_back_and_keeps_the_others(tmp_path):
    log = logged(tmp_path, range(1, 40), 0.0)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large: '.*metrics.jsonl'"):
            log.write(40, {"reward": 1.0})
        with pytest.raises(OSError, match="File too large: '.*completions/40.jsonl'"):
            log.completions(40, [{"prompt": "p" * 2000, "completion": "c", "reward": 1.0}])
        with pytest.warns(UserWarning, match="reward.png could not be drawn"):
            log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["metrics.jsonl"]
    assert [step for step, _ in steps_of(tmp_path)] == list(range(1, 40))
    log = logged(tmp_path, [40], 1.0)
    log.close()
    assert steps_of(tmp_path)[-1] == (40, 1.0)


def test_completions_for_people_and_for_programs(tmp_path):
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
    rows = [
        {"prompt": "2+2=", "completion": "4", "reward": float(torch.tensor(1.1)), "tries": 3},
        {"prompt": chat, "completion": "é\n2", "reward": math.nan, "judge": torch.tensor(2)},
    ]
    RunLog(tmp_path / "new").completions(7, rows)
    tmp_path /= "new"
    lines = (tmp_path / "completions" / "7.jsonl").read_text().splitlines()
    assert [json.loads(line)["reward"] for line in lines] == [1.1, None]
    assert (tmp_path / "completions" / "7.txt").read_text() == (
        "=== reward 1.1, tries 3\n2+2=\n--- completion\n4\n\n"
        "=== reward nan, judge 2\n[system] Add.\n[user] 1+1\n--- completion\né\n2\n"
    )


@pytest.mark.parametrize("length", [1, 200])
def test_a_plot_of_any_length(length, monkeypatch):
    history = [{"step": i, "reward": i / length, "entropy": 1.0} for i in range(1, length + 1)]
    history.insert(0, {"step": 0, "eval/reward": 0.5})
    history[-1] |= {"eval/reward": 0.75, "kl": None}
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    assert plot_history(history, "a model, dapo loss") == b""
    monkeypatch.undo()
    assert plot_history(history, "a model, dapo loss").startswith(b"\x89PNG\r\n\x1a\n")
    (figure,) = figures
    figure.draw_without_rendering()
    assert figure.get_suptitle() == "a model, dapo loss"
    top, legend = figure.axes[0], figure.axes[0].get_legend()
    assert "held-out rows" in [text.get_text() for text in legend.texts]
    assert legend.get_window_extent().y0 >= top.get_window_extent().y1, "above all lines"


def test_no_plot_without_rewards(tmp_path):
    log = RunLog(tmp_path)
    log.write(1, {"reward": math.nan})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
