"""Dynamic sampling: prompts are drawn until enough groups have rewards that differ."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch

from grpo_fused.trainer.ranks import Ranks
from grpo_fused.trainer.rewards import RewardScores
from grpo_fused.trainer.rollouts.rollout import Rollout
from grpo_fused.trainer.run.errors import any_rank, together
from grpo_fused.trainer.run.metrics import find_equal_groups


class Round(NamedTuple):
    """This rank's completions of prompts_per_rollout prompts, and their rewards."""

    rollout: Rollout
    scores: RewardScores


def draw_rounds(
    trainer, draw: Callable[[Any], Round]
) -> tuple[list[Round], list[int], dict[str, float]]:
    """Draws rounds of prompts until prompts_per_rollout groups have rewards that differ.

    The batch are the first of these groups in the order of the data. Prompts behind the last of
    them are given back, to be drawn again for the next batch: every prompt is trained on, or left
    out because its rewards are equal, once an epoch. After dynamic_sampling_rounds rounds, the
    first groups of equal rewards fill the batch up, as if there were no dynamic sampling. They have
    no policy gradient, but count where the loss divides by tokens or sequences.

    Args:
        trainer: of the run; `trainer.data_position` is moved behind the last prompt of the batch.
        draw: samples and scores the next prompts, and moves `trainer.data_position` behind them.

    Returns:
        (rounds, groups, metrics): all rounds; the groups of the batch, counted over all rounds and
        ranks in the order of the data.

    Raises:
        ValueError: a reward function scored steps.

    References:
        DAPO, https://arxiv.org/abs/2503.14476, section 3.2.
    """
    config, ranks = trainer.config, trainer.ranks
    wanted, limit = config.prompts_per_rollout, config.dynamic_sampling_rounds
    rounds: list[Round] = []
    differing: list[int] = []
    equal: list[int] = []
    while not rounds or (len(differing) < wanted and len(rounds) < limit):
        first = len(rounds) * wanted
        rounds.append(draw(trainer))
        if limit == 1:
            return rounds, list(range(wanted)), {}
        scores = rounds[-1].scores
        if any_rank(ranks.accelerator, scores.steps is not None):
            raise ValueError(
                "dynamic_sampling_rounds must be 1 for process rewards, whose groups differ by "
                f"their steps, got {limit}"
            )
        rewards = ranks.gather(scores.total.float().to(ranks.accelerator.device)).cpu()
        for group, is_equal in enumerate(find_equal_groups(rewards, config.num_generations), first):
            (equal if is_equal else differing).append(group)
    drawn = len(rounds) * wanted
    metrics = {
        "dynamic_sampling/rounds": float(len(rounds)),
        "dynamic_sampling/kept_ratio": len(differing) / drawn,
        "dynamic_sampling/filled_ratio": max(wanted - len(differing), 0) / wanted,
    }
    if len(differing) < wanted:
        return rounds, sorted(differing + equal[: wanted - len(differing)]), metrics
    groups = differing[:wanted]
    trainer.data_position -= drawn - (groups[-1] + 1)
    return rounds, groups, metrics


def take_rows(ranks: Ranks, rounds: Sequence[Round], rows: Sequence[int]) -> Round:
    """Returns this rank's part of a batch; the ranks exchange the completions that move.

    Args:
        ranks: of the run.
        rounds: of this rank.
        rows: of the whole batch, counted over the rows of all ranks, round after round.
    """
    share = len(rounds[0].rollout.prompts)  # of a rank in a round, and in the batch
    mine = rows[ranks.index * share : (ranks.index + 1) * share]

    def pick():
        own = {}
        for row in rows:
            number, rest = divmod(row, share * ranks.size)
            if rest // share == ranks.index:
                own[row] = _pick(*rounds[number], rest % share)
        return own

    found = together(ranks.accelerator, pick)
    moved = {row: found[row] for row in found.keys() - set(mine)}
    for of_rank in ranks.gather_objects(moved):
        found |= of_rank
    return together(
        ranks.accelerator, lambda: _join([found[row] for row in mine], rounds[0].scores)
    )


def _pick(rollout, scores, row):
    """Returns the fields of Rollout and of RewardScores of one completion."""
    every = {field.name: getattr(rollout, field.name) for field in fields(Rollout)}
    columns = every.pop("columns")
    found = {name: None if values is None else values[row] for name, values in every.items()}
    found["columns"] = {name: values[row] for name, values in columns.items()}
    each = {name: float(values[row]) for name, values in scores.each.items()}
    extra = {name: values[row] for name, values in scores.extra.items()}
    return found, {"total": float(scores.total[row]), "each": each, "extra": extra}


def _join(rows, like):
    """Returns a Round of what `_pick` returned; the weights of rewards are those of `like`."""
    found, scores = zip(*rows, strict=True)
    rollout = {name: [one[name] for one in found] for name in found[0]}
    rollout["columns"] = _by_name(rollout["columns"])
    if any(mask is not None for mask in rollout["completion_mask"]):
        pairs = zip(rollout["completion_mask"], rollout["completion_ids"], strict=True)
        rollout["completion_mask"] = [[1] * len(i) if m is None else m for m, i in pairs]
    for name, values in rollout.items():
        if any(value is None for value in values):
            if not all(value is None for value in values):
                raise ValueError(
                    f"rollout_fn must return {name} whenever it is called, or never: with "
                    "dynamic_sampling_rounds a batch has completions of several calls"
                )
            rollout[name] = None
    each = {name: torch.tensor([one["each"][name] for one in scores]) for name in like.each}
    return Round(
        Rollout(**rollout),
        RewardScores(
            torch.tensor([one["total"] for one in scores]),
            each,
            weights=like.weights,
            extra=_by_name([one["extra"] for one in scores]),
        ),
    )


def _by_name(rows):
    """Returns the lists of the values of rows by name; None where a row lacks the name."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
