"""Trains a reward model further on pairs of the policy's own samples, for iterative GRPO."""

import heapq
import itertools
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast

from grpo_fused.trainer.optimizer import make_optimizer
from grpo_fused.trainer.reference import trainable_parameters
from grpo_fused.trainer.rewards import Rewards, RewardScores
from grpo_fused.trainer.rewards.reward_model import RewardModel
from grpo_fused.trainer.rewards.weighted import RewardFunction, TrainerState
from grpo_fused.trainer.rollouts.rollout import Prompt, Rollout
from grpo_fused.trainer.run.errors import shorten
from grpo_fused.trainer.run.resume_checks import checksum_rows

Pair = dict[str, Any]  # "prompt", "chosen" and "rejected", as the trainer passes them to rewards


class RewardTraining:
    """Keeps a reward model true to what the policy samples, which it was not trained on.

    A judge, the preference, scores the completions of every rollout, and completions of the same
    prompt become pairs of a chosen and a rejected one. At the end of an iteration the model is
    trained on the pairs of the iteration, mixed with some of earlier iterations, by the
    Bradley-Terry loss -log sigmoid(r_chosen - r_rejected). It goes on from where the last iteration
    left it, optimizer included. Ranks divide every batch of pairs among themselves and sum the
    gradients, so that their models stay equal; nothing is drawn from the random states that
    sampling uses.

    Args:
        model: trained in place; it must also be one of the trainer's rewards.
        preference: a reward function, the name of one, or a `Rewards`: the higher a completion
            scores, the better. Completions that it scores None are in no pair.
        history: pairs that the model was trained on before, the first to be replayed: rows with
            "prompt", "chosen" and "rejected", text or, of a chat, lists of messages.

    Attributes:
        pairs: those of this iteration so far.
        history: [key, pair] of earlier ones: those with the replay_size lowest of random keys.
        trainings: how often the model has been trained.

    Raises:
        ValueError: the model is no RewardModel; a row of the history is no pair.

    References:
        DeepSeekMath, https://arxiv.org/abs/2402.03300, Algorithm 1, line 12.
    """

    def __init__(
        self,
        model: RewardModel,
        preference: Rewards | RewardFunction | str,
        history: Sequence[Pair] = (),
    ):
        if not isinstance(model, RewardModel):
            raise ValueError(
                f"RewardTraining: model must be a RewardModel, got {type(model).__name__}"
            )
        self.model = model
        self.judge = preference if isinstance(preference, Rewards) else Rewards(preference)
        self.given_history = [check_pair(i, row) for i, row in enumerate(history)]
        self.history: list[tuple[float, Pair]] = []
        self.pairs: list[Pair] = []
        self.trainings = 0
        self.metrics: dict[str, float] = {}  # of the last training, until they are logged

    def start(self, trainer) -> None:
        """Prepares training with the settings and ranks of a trainer.

        Raises:
            ValueError: the model is none of the trainer's rewards; it would never be trained;
                ranks have different histories.
        """
        functions = getattr(trainer.rewards, "functions", {})
        names = [name for name, function in functions.items() if function is self.model]
        if not names:
            raise ValueError(
                "training: its model must be one of the rewards, "
                f"got {', '.join(functions) or 'others'}"
            )
        self.name, self.config, self.ranks = names[0], trainer.config, trainer.ranks
        if not self.config.refresh_rollouts:
            raise ValueError(
                "training requires iterations above 1 or reference_refresh_rollouts, "
                f"got iterations {self.config.iterations}: the reward model would not be trained"
            )
        if self.config.dynamic_sampling_rounds > 1:
            raise ValueError(
                "dynamic_sampling_rounds must be 1 with the training of a reward model, whose "
                f"scores are hardly ever equal, got {self.config.dynamic_sampling_rounds}"
            )
        self.judge.trainer_state = TrainerState(trainer)
        self.ranks.check_agreement({"the history of pairs": checksum_rows(self.given_history)})
        self.model.model.to(trainer.accelerator.device)
        for tensor in self.model.model.state_dict().values():
            tensor.copy_(broadcast(tensor))
        options = replace(self.config, learning_rate=self.config.reward_learning_rate)
        self.optimizer = make_optimizer(self.model.model, options)
        self._remember(self.given_history)

    def add_rollout(
        self, rollout: Rollout, completions: list[Prompt], scores: RewardScores
    ) -> dict[str, float]:
        """Judges the completions of this rank's rollout; adds the pairs of all ranks.

        Returns:
            metrics over all ranks: how the judge scores the policy, and which share of the pairs
            the reward model orders alike; after a training also its loss and number of pairs.

        Raises:
            ValueError, TrainingError: the judge returned something invalid, or raised.
        """
        given = (rollout.prompts, completions, rollout.completion_ids, rollout.columns)
        judged = self.ranks.share(lambda: self.judge(*given)).total
        own = (rollout.prompts, completions, judged.tolist(), scores.each[self.name].tolist())
        gathered = zip(*self.ranks.gather_objects(own), strict=True)
        prompts, texts, preferences, rewards = (list(itertools.chain(*parts)) for parts in gathered)
        places = select_pairs(texts, preferences, self.config.num_generations)
        self.pairs += [
            {"prompt": prompts[better], "chosen": texts[better], "rejected": texts[worse]}
            for better, worse in places
        ]
        metrics, self.metrics = self.metrics, {}
        known = [value for value in preferences if not math.isnan(value)]
        if known:
            metrics["reward_model/preference"] = sum(known) / len(known)
        if places:
            right = sum(rewards[better] > rewards[worse] for better, worse in places)
            metrics["reward_model/accuracy"] = right / len(places)
        return metrics

    def train(self) -> None:
        """Trains the model on the pairs of this iteration and some of the history.

        Warns if there are no pairs, or fewer earlier ones than replay_fraction asks for.

        Raises:
            FloatingPointError: a gradient is not finite; the step is not applied.
        """
        config, new = self.config, self.pairs
        draw = random.Random(f"{config.seed} {self.trainings}")
        wanted = round(len(new) * config.replay_fraction / (1 - config.replay_fraction))
        earlier = [pair for _, pair in self.history]
        replayed = draw.sample(earlier, min(wanted, len(earlier)))
        self._warn(len(new), wanted, len(replayed))
        pairs, total, steps = new + replayed, 0.0, 0
        for _ in range(config.reward_epochs if new else 0):
            draw.shuffle(pairs)
            for first in range(0, len(pairs), config.reward_batch_size):
                total = total + self._step(pairs[first : first + config.reward_batch_size])
                steps += 1
        self.trainings += 1
        self._remember(new)
        self.pairs = []
        self.metrics = {
            "reward_model/pairs": float(len(new)),
            "reward_model/replayed": float(len(replayed)),
        }
        if steps:
            self.metrics["reward_model/loss"] = float(self.ranks.sum(total)) / steps

    def _step(self, pairs):
        """Takes an optimizer step; returns this rank's share of the loss."""
        ranks, config = self.ranks, self.config
        own = pairs[ranks.index :: ranks.size]
        total = torch.zeros((), device=self.model.model.device)
        size = max(1, self.model.batch_size // 2)
        for first in range(0, len(own), size):
            part = own[first : first + size]
            texts = [
                self.model.text_of(pair["prompt"], pair[which])
                for which in ("chosen", "rejected")
                for pair in part
            ]
            chosen, rejected = self.model.score(texts).chunk(2)
            loss = -F.logsigmoid(chosen - rejected).sum() / len(pairs)
            loss.backward()
            total += loss.detach()
        parameters = trainable_parameters(self.model.model)
        for parameter in parameters:
            if parameter.grad is None:  # another rank may have one
                parameter.grad = torch.zeros_like(parameter)
            summed = ranks.accelerator.reduce(parameter.grad, reduction="sum")
            parameter.grad = summed / ranks.tensor_size  # which ranks have the same share
        limit = config.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise FloatingPointError(
                f"grad_norm of reward model {self.name} is {norm} in its training "
                f"{self.trainings + 1}; the step is not applied"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _warn(self, new, wanted, replayed):
        if not new:
            warnings.warn(
                f"reward model {self.name} is not trained: in this iteration, no two completions "
                "of a prompt differ in preference",
                stacklevel=3,
            )
        elif replayed < wanted:
            first = "" if replayed else "; a history (reward_data) gives the first training some"
            warnings.warn(
                f"replay_fraction {self.config.replay_fraction} asks for {wanted} pairs of earlier "
                f"iterations beside {new} new ones, but there are {replayed}{first}",
                stacklevel=3,
            )

    def _remember(self, pairs):
        """Adds pairs to the history, which stays a uniform sample of all there were."""
        draw = random.Random(f"{self.config.seed} {self.trainings} history")
        keyed = self.history + [(draw.random(), pair) for pair in pairs]
        self.history = heapq.nsmallest(self.config.replay_size, keyed, key=lambda item: item[0])

    def state_dict(self) -> dict[str, Any]:
        """Returns all that later steps depend on, equal on all ranks."""
        return {
            "model": self.model.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "pairs": self.pairs,
            "trainings": self.trainings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.model.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history, self.pairs = state["history"], state["pairs"]
        self.trainings = state["trainings"]

    def save_pretrained(self, folder: Path) -> None:
        """Writes the model and its tokenizer for `from_pretrained`."""
        self.model.model.save_pretrained(folder)
        self.model.tokenizer.save_pretrained(folder)


def select_pairs(
    completions: Sequence[Prompt], preferences: Sequence[float], group_size: int
) -> list[tuple[int, int]]:
    """Pairs the best completion of a group with its worst, the second best with the second worst.

    Args:
        completions: of groups of `group_size` neighbours.
        preferences: their scores; NaN = not judged.
        group_size: completions per prompt.

    Returns:
        Indices (chosen, rejected); each is in one pair at most, and two completions that are
        equal in text or in score are none.
    """
    pairs = []
    for first in range(0, len(completions), group_size):
        group = range(first, min(first + group_size, len(completions)))
        ranked = sorted(
            (i for i in group if not math.isnan(preferences[i])), key=lambda i: preferences[i]
        )
        for worse, better in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
            differ = completions[better] != completions[worse]
            if differ and preferences[better] > preferences[worse]:
                pairs.append((better, worse))
    return pairs


def check_pair(row: int, pair: Pair) -> Pair:
    """Returns the three columns of a pair.

    Raises:
        ValueError: naming the row and what it lacks.
    """
    names = ("prompt", "chosen", "rejected")
    values = [pair.get(name) for name in names] if isinstance(pair, dict) else [None]
    for kind in (str, list):
        if all(isinstance(value, kind) for value in values):
            return dict(zip(names, values, strict=True))
    raise ValueError(
        f"row {row} of the history of a reward model must have prompt, chosen and rejected, all "
        f"text or all lists of messages, got {shorten(pair)}"
    )
