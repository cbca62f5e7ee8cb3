"""The tuner's sweep, with a clock that knows the answer: its timings need a GPU."""

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = str(Path(__file__).parents[2])
sys.path.append(ROOT)  # for as long as it takes: see conftest
import benchmarks.tune as tune  # noqa: E402

sys.path.remove(ROOT)
tiling = tune.tiling


def choices_of(*sizes):
    return [tiling.Choice("", math.inf, *size, tiling.NEVER, "") for size in sizes]


def test_the_fastest_choice_wins_and_becomes_a_row(device):
    """Every choice is run and restored; the clock calls 64 threads fastest, sharing a third."""
    seen = []

    def clock(step, prepare):
        (choice,) = tiling.CHOICES
        step()
        prepare()
        seen.append(choice)
        time = 1.0 if choice.threads == 64 else 2.0
        return time / 3 if choice.sharing == -math.inf else time

    choices = choices_of((32, 2, 2, 1), (64, 2, 2, 1))
    before = tiling.CHOICES
    ranking = tune.tune(1600, torch.float32, (8, 2), device, clock, choices)
    assert tiling.CHOICES is before
    assert [choice.threads for _, choice in ranking] == [64, 32]
    assert [(c.threads, c.sharing) for c in seen] == [
        (32, math.inf),
        (64, math.inf),
        (64, math.inf),
        (64, -math.inf),
    ]
    segments = math.ceil(1600 * 4 / (2 * 64 * 16))
    resident = 2 * tune.launch.device_of(None).multiprocessors
    cost = round(tune.sharing_cost(1.0, 1 / 3, 2, segments, resident), 2)
    assert ranking[0][1].sharing == cost
    row = tune.source(*ranking[0], 8, "a GPU")
    (choice,) = eval(f"[{row}]", vars(tiling))
    assert choice == ranking[0][1]._replace(reason=choice.reason)
    assert choice.reason.startswith("measured on a GPU: 8 rows in 1000.000 ms")


def test_a_wrong_gradient_is_not_timed(device, monkeypatch):
    def wrong(*args):
        args[-1].zero_()

    monkeypatch.setattr(tune.launchers, "fused_loss", wrong)
    with pytest.raises(AssertionError, match="gradient is off"):
        tune.tune(100, torch.float32, (8,), device, None, choices_of((32, 2, 2, 1)))


def test_sharing_cost_makes_the_table_agree_with_the_clock():
    """With the cost that was found, the rule predicts the ratio that was measured."""
    device = tiling.Device("sm_90", warp_size=32, multiprocessors=100)
    for ratio, programs in ((0.6, 5), (1.3, 1)):
        cost = tune.sharing_cost(2.0, 2.0 * ratio, 40, 5, 100)
        tile = tiling.Tiling(16, 4, 1, 2, cost)
        assert tiling.programs_per_row(40, 5, device, tile) == programs


def test_candidates_keep_segments_and_fit():
    for choice in tune.candidates():
        assert choice.segment * choice.threads * choice.unroll * 16 >= tune.SEGMENT_BYTES
        assert choice.threads * choice.programs <= tune.RESIDENT_THREADS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 2
    assert "there is none here" in capsys.readouterr().err
