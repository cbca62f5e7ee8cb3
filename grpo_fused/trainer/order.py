"""The order of the prompts: which rows a rollout has, over epochs, and from where a run resumes."""

import functools
import random
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from grpo_fused.trainer.ranks import Ranks
from grpo_fused.trainer.run.config import GRPOTrainerConfig
from grpo_fused.trainer.run.data import check_row, first_row, is_stream
from grpo_fused.trainer.run.errors import TrainingError
from grpo_fused.trainer.run.resume_checks import checksum_rows


class SequenceOrder:
    """Rows of a sequence, every epoch in another order; it depends on seed and place alone.

    Args:
        rows: of the run.
        config: of the run: seed, shuffle and prompts_per_rollout.

    Attributes:
        content: {"rows": their number, "content of rows": checksum}, which must stay the same in
            the runs that resume.
    """

    def __init__(self, rows: Sequence[dict], config: GRPOTrainerConfig):
        self.rows, self.config = rows, config
        self.content = {"rows": len(rows), "content of rows": checksum_rows(rows)}

    def take(self, position: int, prompts: Sequence[int]) -> list[dict]:
        """Returns rows of the next prompts_per_rollout prompts.

        Args:
            position: prompts of all epochs before them.
            prompts: which of them, from 0.
        """
        size, found = len(self.rows), []
        for prompt in prompts:
            epoch, place = divmod(position + prompt, size)
            if self.config.shuffle:
                place = epoch_order(self.config.seed, epoch, size)[place]
            row = self.rows[place]
            check_row("data", place + 1, row)
            found.append(row)
        return found

    def epochs(self, position: int) -> float:
        """Returns how often so many prompts go through the rows."""
        return position / len(self.rows)

    def state_dict(self, position: int) -> None:
        """Nothing: the position tells the place."""

    def load_state_dict(self, state: None, position: int) -> None:
        """Nothing, as well."""


class Place(NamedTuple):
    """A place in a stream: behind `row` rows of an epoch, which have this checksum."""

    epoch: int
    row: int
    checksum: int


class StreamOrder:
    """Rows of a stream, which the main process reads and sends to all ranks.

    Every epoch reads the stream from its start; it must then have the same rows. With
    config.shuffle, rows are drawn from a buffer of shuffle_buffer_size, in every epoch anew. A
    resumed run reads the rows of its epoch again up to its place: `IterableDataset.state_dict`
    leaves out what is in the buffer.

    Args:
        stream: a `datasets.IterableDataset`.
        config: of the run.
        ranks: of the run.

    Attributes:
        content: as of SequenceOrder, with the checksum of the first row.
    """

    def __init__(self, stream: Any, config: GRPOTrainerConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks
        row = first_row("data", stream)
        self.content = {"rows": "a stream", "content of rows": checksum_rows([row])}
        if config.shuffle:
            stream = stream.shuffle(seed=config.seed, buffer_size=config.shuffle_buffer_size)
        self.stream, self.iterator = stream, None
        # Rows that were read, from position `first` on: a batch may give some of them back.
        self.first, self.rows = 0, deque[dict]()
        self.places = deque([Place(0, 0, 0)])  # before each of the rows, and behind the last

    def take(self, position: int, prompts: Sequence[int]) -> list[dict]:
        """Returns rows of the next prompts_per_rollout prompts. Every rank must call it.

        Args:
            position: prompts of all epochs before them: those of the latest call, or some of them.
            prompts: which of them, from 0.

        Raises:
            ValueError: a row is invalid, or the stream has changed.
            TrainingError: a row cannot be read.
        """
        count = self.config.prompts_per_rollout
        missing = position + count - self.first - len(self.rows)
        if missing > 0:
            rows, places = self.ranks.from_main(lambda: self._read(missing))
            self.rows += rows
            self.places += places
        while len(self.rows) > count * self.config.dynamic_sampling_rounds:
            self.rows.popleft()
            self.places.popleft()
            self.first += 1
        return [self.rows[position - self.first + prompt] for prompt in prompts]

    def epochs(self, position: int) -> float:
        """Returns how often the stream has ended; how far it is from its end nobody knows."""
        return float(self.places[position - self.first].epoch)

    def state_dict(self, position: int) -> dict[str, int]:
        """Returns the place of a position, which is the same for any number of ranks."""
        return self.places[position - self.first]._asdict()

    def load_state_dict(self, state: dict[str, int], position: int) -> None:
        """Goes to a place in the stream: `state_dict(position)`."""
        self.first, self.rows, self.places = position, deque(), deque([Place(**state)])
        self.iterator = None

    def _read(self, count):
        """Returns the next rows, and the places behind each."""
        (epoch, row, checksum), rows, places = self.places[-1], [], []
        iterator = self.iterator or self._open(epoch, row, checksum)
        self.iterator = None  # if reading fails, it would be behind the place
        while len(rows) < count:
            found = self._next(iterator, epoch, row)
            if found is None:
                if row == 0:
                    raise ValueError(f"data has no rows in epoch {epoch + 1}")
                epoch, row, checksum = epoch + 1, 0, 0
                iterator = self._iterate(epoch)
                continue
            row, checksum = row + 1, _add(checksum, found[0])
            check_row(f"data, epoch {epoch + 1}", row, found[0])
            rows.append(found[0])
            places.append(Place(epoch, row, checksum))
        self.iterator = iterator
        return rows, places

    def _open(self, epoch, rows, expected):
        """Returns the rows from a place on."""
        iterator, checksum = self._iterate(epoch), 0
        for number in range(rows):
            found = self._next(iterator, epoch, number)
            if found is None:
                checksum = -1
                break
            checksum = _add(checksum, found[0])
        if checksum != expected:
            raise ValueError(
                f"resume: the first {rows} rows in epoch {epoch + 1} of data are not "
                "those that the checkpoint has seen; a stream must have the same rows whenever it "
                "is read"
            )
        return iterator

    def _iterate(self, epoch: int) -> Iterator[Any]:
        self.stream.set_epoch(epoch)
        return iter(self.stream)

    def _next(self, iterator, epoch, row):
        """Returns (row,), or None at the end."""
        try:
            for found in iterator:
                return (found,)
        except ValueError:
            raise  # of our readers, or of a format that names the fault
        except Exception as error:  # network and formats raise their own
            raise TrainingError(
                f"data, epoch {epoch + 1}, row {row + 1} (the first is 1) cannot be read: "
                f"{type(error).__name__}: {error}"
            ) from error
        return None


def _add(checksum, row):
    return zlib.crc32(str(checksum_rows([row])).encode(), checksum)


def make_order(data: Any, config: GRPOTrainerConfig, ranks: Ranks) -> SequenceOrder | StreamOrder:
    """Returns the order of data that `check_rows` has accepted."""
    return StreamOrder(data, config, ranks) if is_stream(data) else SequenceOrder(data, config)


def next_rows(trainer) -> list[dict]:
    """Returns this rank's next rows; a group of num_generations rows may straddle ranks."""
    first = trainer.ranks.index * trainer.rows_per_rank
    rows = range(first, first + trainer.rows_per_rank)
    prompts = [row // trainer.config.num_generations for row in rows]
    return trainer.order.take(trainer.data_position, prompts)


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """Returns a permutation of `size` rows that depends on seed and epoch alone."""
    return random.Random(f"{seed} {epoch}").sample(range(size), size)
