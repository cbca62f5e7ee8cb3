"""The tuner's sweep with a clock that returns chosen times: real ones need a GPU."""

import json
import math

import pytest
import torch

from benchmarks import tune
from grpo_fused.kernels import launch


def choices_of(*sizes):
    return [launch.Choice("", math.inf, *size, "") for size in sizes]


def test_the_fastest_choice_becomes_a_row(device, tmp_path, capsys):
    """Every choice is run and its result written at once; one that does not fit has no time."""
    seen, output = [], tmp_path / "results.jsonl"

    def clock(step, prepare):
        (choice,) = launch.CHOICES
        step()
        prepare()
        assert len(output.read_text().splitlines()) == len(seen) if seen else not output.exists()
        seen.append(choice)
        if choice.unroll == 1:
            raise launch.triton.runtime.errors.OutOfResources(2, 1, "registers")
        return 1.0 if choice.threads == 64 else 2.0

    choices, before = choices_of((32, 2, 2), (64, 2, 2), (32, 1, 2)), launch.CHOICES
    tune.sweep(100, torch.float32, 8, device, clock, choices, "a GPU", output)
    assert launch.CHOICES is before
    assert seen == choices
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["threads"], r["unroll"], r["ms"]) for r in results] == [
        (32, 2, 2000.0),
        (64, 2, 1000.0),
        (32, 1, None),
    ]
    printed = capsys.readouterr().out
    (choice,) = eval(f"[{printed}]", vars(launch))  # results are comments
    assert choice[2:5] == (64, 2, 2) and choice.row_bytes == 400
    assert choice.architecture == launch.device_of(None).architecture
    assert choice.reason.startswith("measured on a GPU: 8 rows in 1000.000 ms")


def test_a_wrong_gradient_is_not_timed(device, monkeypatch):
    def wrong(logits, tokens, scales, formula, outputs):
        outputs.dlogits.zero_()

    monkeypatch.setattr(tune.launchers, "fused_loss", wrong)
    with pytest.raises(AssertionError, match="gradient is off"):
        list(tune.tune(100, torch.float32, 8, device, None, choices_of((32, 2, 2))))


def test_candidates_fit_a_multiprocessor():
    choices = list(tune.candidates())
    assert len(set(choices)) == len(choices) >= 20
    assert all(choice.threads * choice.programs <= tune.RESIDENT_THREADS for choice in choices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 2
    assert "there is none here" in capsys.readouterr().err
