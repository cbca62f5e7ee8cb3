"""Which rows come next: of sequences and of streams, over epochs, over ranks and after a resume."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from trainer_runs import ROWS, stream_of, trainer_of, weights_of

from grpo_fused import GRPOTrainerConfig
from grpo_fused.trainer.order import SequenceOrder, StreamOrder, next_rows
from grpo_fused.trainer.run.errors import TrainingError


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    """`datasets` sleeps for seconds whenever a shuffled stream of parquet files is closed."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def stream_order(stream, count=4, **options):
    """An order on one rank."""
    config = GRPOTrainerConfig(prompts_per_rollout=count, report_to=[], **options)
    return StreamOrder(stream, config, SimpleNamespace(from_main=lambda action: action()))


def taken(order, rollouts, count=4):
    """The prompts of some rollouts, one after the other."""
    return [row["prompt"] for i in rollouts for row in order.take(i * count, range(count))]


PROMPTS = [row["prompt"] for row in ROWS]


def test_every_epoch_of_a_sequence_has_every_row_once_in_another_order():
    trainer, _ = trainer_of("unused", data=ROWS[:6], prompts_per_rollout=4)
    rows = []
    for trainer.data_position in (0, 4, 8):
        found = next_rows(trainer)
        assert all(found[row] == found[row // 4 * 4] for row in range(16))  # groups
        rows += [row["prompt"] for row in found[::4]]
    assert sorted(rows[:6]) == sorted(rows[6:]) == sorted(PROMPTS[:6])
    assert rows[:6] != rows[6:]


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list, stream_of])
def test_without_shuffling_epochs_have_the_rows_in_the_order_of_the_data(kind):
    trainer, _ = trainer_of("unused", data=kind(ROWS[:6]), shuffle=False)
    rows = []
    for trainer.data_position in (0, 4, 8):
        rows += [row["prompt"] for row in next_rows(trainer)[::4]]
    assert rows == PROMPTS[:6] * 2


def test_a_rollout_may_take_several_epochs():
    config = GRPOTrainerConfig(prompts_per_rollout=7, shuffle=False)
    order = SequenceOrder(ROWS[:3], config)
    assert taken(order, [0], 7) == (PROMPTS[:3] * 3)[:7] and order.epochs(7) == 7 / 3
    order = stream_order(stream_of(ROWS[:3]), 7, shuffle=False)
    assert taken(order, [0], 7) == (PROMPTS[:3] * 3)[:7] and order.epochs(7) == 2


def test_a_stream_is_shuffled_by_its_buffer_in_every_epoch_anew():
    order = stream_order(stream_of(ROWS[:20]), seed=5, shuffle_buffer_size=6)
    shuffled = stream_of(ROWS[:20]).shuffle(seed=5, buffer_size=6)
    expected = []
    for epoch in range(2):
        shuffled.set_epoch(epoch)
        expected.append([row["prompt"] for row in shuffled])
    assert taken(order, range(10)) == expected[0] + expected[1]
    assert sorted(expected[0]) == sorted(expected[1]) and expected[0] != expected[1]
    other = stream_order(stream_of(ROWS[:20]), seed=6, shuffle_buffer_size=6)
    assert taken(other, range(5)) != expected[0]
    whole = stream_order(stream_of(ROWS[:20]), seed=5, shuffle_buffer_size=20)
    assert taken(whole, range(5)) != expected[0]


def test_the_latest_rollout_can_be_taken_again():
    order = stream_order(stream_of(ROWS[:6]))
    first = taken(order, [0])
    assert taken(order, [0]) == first and taken(order, [1]) != first
    assert [row["prompt"] for row in order.take(4, [3, 3])] == [taken(order, [1])[3]] * 2


@pytest.mark.parametrize("options", [{"shuffle": False}, {"shuffle_buffer_size": 3}])
@pytest.mark.parametrize("kind", ["generator", "parquet", "shuffled", "mapped"])
def test_a_place_in_a_stream_is_found_again(tmp_path, kind, options):
    """After every rollout: the stream ends in the middle of some."""

    def opened():
        if kind == "generator":
            return stream_of(ROWS[:10])
        if kind == "parquet":
            path = tmp_path / "rows.parquet"
            datasets.Dataset.from_list(ROWS[:10]).to_parquet(path)
            return datasets.load_dataset(
                "parquet", data_files=str(path), split="train", streaming=True
            )
        if kind == "shuffled":  # by the user, whose buffer no `state_dict` has either
            return stream_of(ROWS[:10]).shuffle(seed=1, buffer_size=4)
        return stream_of(ROWS[:10]).map(lambda row: {"extra": row["answer"] * 2})

    whole = stream_order(opened(), **options)
    expected, states = [], []
    for i in range(7):
        states.append(whole.state_dict(4 * i))
        expected.append(whole.take(4 * i, range(4)))
    assert [state["epoch"] for state in states] == [0, 0, 0, 1, 1, 1, 2]
    for start in range(7):
        resumed = stream_order(opened(), **options)
        resumed.load_state_dict(states[start], 4 * start)
        for i in range(start, 7):
            assert resumed.take(4 * i, range(4)) == expected[i]


@pytest.mark.parametrize("rows", [ROWS[:2] + ROWS[3:10], ROWS[:3]])
def test_a_stream_that_has_changed_is_not_resumed(rows):
    order = stream_order(stream_of(ROWS[:10]), shuffle=False)
    taken(order, [0])
    other = stream_order(stream_of(rows), shuffle=False)
    other.load_state_dict(order.state_dict(4), 4)
    with pytest.raises(ValueError, match="resume: the first 4 rows in epoch 1 of data are not"):
        other.take(4, range(4))


def test_a_row_that_cannot_be_read_is_named_and_read_again_later():
    fails = [True]

    def rows():
        for number, row in enumerate(ROWS[:10]):
            if number == 5 and fails[0]:
                raise ConnectionResetError("reset by peer")
            yield row

    order = stream_order(datasets.IterableDataset.from_generator(rows), shuffle=False)
    found = taken(order, [0])
    message = r"data, epoch 1, row 6 \(the first is 1\) cannot be read: ConnectionResetError: reset"
    for _ in range(2):
        with pytest.raises(TrainingError, match=message):
            taken(order, [1])
    fails[0] = False
    assert found + taken(order, [1]) == PROMPTS[:8]


def test_a_row_of_a_stream_without_a_prompt_is_named():
    order = stream_order(stream_of([*ROWS[:4], {"answer": "3"}]), shuffle=False)
    taken(order, [0])
    with pytest.raises(ValueError, match=r'data, epoch 1, row 5 \(the first is 1\) must have a "p'):
        taken(order, [1])


def test_a_stream_that_can_be_read_once_is_an_error():
    left = iter(ROWS[:4])
    order = stream_order(datasets.IterableDataset.from_generator(lambda: left), shuffle=False)
    with pytest.raises(ValueError, match="data has no rows in epoch 2"):
        taken(order, [0])  # the first row was used up when the run began


@pytest.mark.parametrize("options", [{"shuffle": False}, {"shuffle_buffer_size": 4}])
def test_resuming_a_run_with_a_stream_is_bit_identical(tmp_path, options):
    """Ten rows, four a rollout and two steps for each: an epoch ends within the third rollout."""
    options, data = {"minibatches": 2, "max_steps": 7, **options}, stream_of(ROWS[:10])
    torch.manual_seed(0)
    whole, expected = trainer_of(
        tmp_path / "whole", data=data, save_steps=1, save_total_limit=None, **options
    )
    whole.train()
    assert [expected[step]["epoch"] for step in range(1, 8)] == [0, 0, 0, 0, 1, 1, 1]
    for first in (4, 5):  # behind a rollout, and in the middle of the third
        resumed, records = trainer_of(
            tmp_path / "again",
            data=data,
            resume=str(tmp_path / "whole" / f"checkpoint-{first}"),
            seed=99,
            **options,
        )
        resumed.train()
        assert records == {step: expected[step] for step in range(first + 1, 8)}
        for name, weight in weights_of(resumed).items():
            assert torch.equal(weight, weights_of(whole)[name]), (first, name)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shuffle": False}, "resume: shuffle is False, the checkpoint has True"),
        ({"shuffle_buffer_size": 3}, "resume: shuffle_buffer_size is 3, the checkpoint has 1000"),
        ({"data": ROWS[:10]}, "resume: data has 10 rows, the checkpoint had a stream"),
        (
            {"data": stream_of(ROWS[1:10])},
            "resume: the rows of data are not those of the checkpoint",
        ),
    ],
)
def test_another_order_is_another_run(tmp_path, options, message):
    data = stream_of(ROWS[:10])
    trainer_of(tmp_path, data=data, max_steps=1, save_steps=1)[0].train()
    trainer, _ = trainer_of(tmp_path, resume="latest", **{"data": data} | options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
