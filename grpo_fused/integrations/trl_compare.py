"""Ours against TRL's own numbers, on two sequences, before ours are used with an unknown TRL."""

import contextlib
import copy
import math
import os
import sys
from collections.abc import Callable

import torch

from grpo_fused.integrations.trl_versions import IS_NEWER, VERSION

SWITCH = "GRPO_FUSED_COMPARE"
# Largest relative difference. In half precision both round, in different places: 0.4 % is usual.
FLOAT32, HALF_PRECISION = 1e-3, 5e-2
# Log-ratios that leave the usual bounds of a clip on one side, and stay within it.
DRIFT, SPREAD = 0.35, 0.2


class Comparison:
    """Whether our numbers are those of TRL, decided by all ranks together, once.

    Log-probabilities are compared at their first call, the loss and its gradient in the final
    hidden states at the first micro-batch whose gradient is not 0. Random state, metrics and
    attributes of the trainer are afterwards what they were.

    The sequences are two, of different lengths if the batch allows it: with equal ones, a mean over
    sequences and one over tokens are the same number. Their old log-probabilities are moved so that
    one of them is off policy on the side that a clip stops.

    Args:
        trainer: a `FusedHead`.

    Attributes:
        is_asked_for: whether GRPO_FUSED_COMPARE is 1; agreement is then printed.
        is_open: whether something is still to be compared, and not being compared right now.
        runs_trl: whether TRL's own loss is being computed, which needs TRL's own log-probabilities.

    Raises:
        ValueError: an environment variable GRPO_FUSED_COMPARE other than "0", never, and "1", with
            every version of TRL; without it newer versions than those tested are compared.
    """

    def __init__(self, trainer):
        switch = os.environ.get(SWITCH, "")
        if switch not in ("", "0", "1"):
            raise ValueError(f"{SWITCH} must be 0 or 1, got {switch!r}")
        self.trainer, self.is_comparing, self.runs_trl = trainer, False, False
        self.is_asked_for = switch == "1"
        self.scores_open = self.losses_open = self.is_asked_for or (IS_NEWER and switch != "0")

    @property
    def is_open(self) -> bool:
        return (self.scores_open or self.losses_open) and not self.is_comparing

    def of_scores(self, ours, of_trl, model, ids, mask, length) -> str | None:
        """Compare what both return for two sequences; return how they differ, or None.

        Args:
            ours, of_trl: functions of (model, ids, mask), as the private method of TRL.
            ids, mask: (B, P + T) of prompts and completions.
            length: T.
        """
        if not self.scores_open:
            return None
        self.scores_open = False
        rows = sorted({0, len(ids) - 1})
        ids, mask = ids[rows], mask[rows]
        active, distance = mask[:, -length:] != 0, math.nan
        with self._unchanged(), torch.no_grad():
            theirs = self._run(of_trl, model, ids, mask)
            mine, failure = self._try(ours, model, ids, mask)
        if failure is None:
            failure = _why_structures_differ(mine, theirs)
        if failure is None:
            pairs = [
                (a[active], b[active]) if a.dim() == 2 else (a, b)
                for a, b in zip(mine, theirs, strict=True)
                if a is not None
            ]
            distance = max(_distance(a, b) for a, b in pairs)
        failed, (distance,) = self._of_all_ranks(failure is not None, distance)
        start, bound = (
            f"trl {VERSION} is not as expected: our log-probabilities",
            self._bound(model),
        )
        if failed:
            return f"{start} failed with {failure or 'an error on another rank'}"
        if not distance <= bound:
            return f"{start} differ from its own by {distance:.2%}"
        return None

    def of_losses(self, ours: Callable, of_trl: Callable, model, inputs) -> str | None:
        """Compare losses and gradients on two sequences; return how they differ, or None.

        Args:
            ours, of_trl: functions of (model, inputs) that return a loss and log metrics.
            inputs: of the micro-batch.
        """
        if not self.losses_open:
            return None
        apart, moves = [math.nan, math.nan], False
        with self._unchanged(), torch.enable_grad(), self.trainer.accelerator.no_sync(model):
            inputs = self._drifted(model, two_sequences(inputs, self.trainer))
            self.runs_trl = True
            theirs = self._run(self._differentiate, of_trl, model, inputs)
            self.runs_trl = False
            mine, failure = self._try(self._differentiate, ours, model, inputs)
            if failure is None:
                apart = [_distance(a, b) for a, b in zip(mine, theirs, strict=True)]
                moves = bool((theirs[1] != 0).any() or (mine[1] != 0).any())
        # With a gradient of 0 on all ranks nothing is known yet.
        failed, (moved, *apart) = self._of_all_ranks(failure is not None, float(moves), *apart)
        self.losses_open, start = moved == 0, f"trl {VERSION} is not as expected:"
        if failed:
            return f"{start} our loss failed with {failure or 'an error on another rank'}"
        if not max(apart) <= self._bound(model):
            loss, gradient = apart
            return (
                f"{start} on two sequences our loss differs from its own by {loss:.2%}, "
                f"and the gradient by {gradient:.2%}"
            )
        if moved and self.is_asked_for and self.trainer.accelerator.is_main_process:
            loss, gradient = apart
            print(
                f"{SWITCH}=1: the loss agrees with that of trl {VERSION}, relative differences "
                f"{loss:.1e} (loss) and {gradient:.1e} (gradient)",
                file=sys.stderr,
            )
        return None

    def _random_state(self):
        """Return a context that restores the random state."""
        device = self.trainer.accelerator.device
        if device.type == "cpu":
            return torch.random.fork_rng(devices=[])
        return torch.random.fork_rng(devices=[device], device_type=device.type)

    def _run(self, function, *arguments):
        """Call a function; the next one starts from the same random state."""
        with self._random_state():
            return function(*arguments)

    def _try(self, function, *arguments):
        """Return (the result, None), or (None, what failed)."""
        try:
            return self._run(function, *arguments), None
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"

    @contextlib.contextmanager
    def _unchanged(self):
        """Keep random state, metrics and attributes of the trainer; ours compute uncompared."""
        attributes, self.is_comparing = vars(self.trainer), True
        saved, metrics = dict(attributes), copy.deepcopy(attributes.get("_metrics"))
        try:
            with self._random_state():
                yield
        finally:
            attributes.clear()
            attributes.update(saved)
            if metrics is not None:
                self.trainer._metrics = metrics
            self.is_comparing = self.runs_trl = False

    def _bound(self, model):
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        full = self.trainer.accelerator.mixed_precision in ("no", None)
        return FLOAT32 if full and dtypes == {torch.float32} else HALF_PRECISION

    def _of_all_ranks(self, failed, *values):
        """Return (whether any rank failed, the largest of each value), of one collective call."""
        accelerator = self.trainer.accelerator
        row = torch.tensor([[float(failed), *values]], device=accelerator.device)
        failed, *values = accelerator.gather(row).T.tolist()
        return any(failed), [max(math.inf if x != x else x for x in value) for value in values]

    def _drifted(self, model, inputs):
        """Return inputs whose old log-probabilities are ours, moved by `drift`."""
        prompt_mask, mask = inputs["prompt_mask"], inputs["completion_mask"]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        rows = (model, ids, torch.cat([prompt_mask, mask], dim=1), mask.shape[1])
        with torch.no_grad():
            logps = self.trainer._get_per_token_logps_and_entropies(*rows)[0]
        sums = self.trainer._sums_log_ratios
        logps = logps - drift(mask, inputs["advantages"], total=sums)
        if "old_logps" in inputs:
            return inputs | {"old_logps": (logps * mask).sum(1)}
        return inputs | {"old_per_token_logps": logps}

    def _differentiate(self, function, model, inputs):
        """Return (the loss, its gradient in the hidden states), detached."""
        leaves = []

        def cut(module, arguments, outputs):
            leaves.append(outputs.last_hidden_state.detach().requires_grad_())
            outputs.last_hidden_state = leaves[-1]
            return outputs

        handle = self.trainer._backbone(model).register_forward_hook(cut)
        try:
            loss = function(model, inputs)
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(loss, leaves, allow_unused=True)
        return loss.detach(), torch.zeros_like(leaves[0]) if gradient is None else gradient


def two_sequences(inputs, trainer):
    """Inputs of the sequence with the largest advantage, and one of its sign and another length.

    Without such a one they are the first one's, twice: TRL gathers numbers per sequence, and a rank
    with fewer of them would end the run.
    """
    mask, advantages = inputs["completion_mask"], inputs["advantages"]
    lengths, number = mask.sum(1), len(mask)
    values = advantages if advantages.dim() == 1 else (advantages * mask).sum(1)
    sizes = torch.where(lengths > 0, values.abs().float(), -1.0)
    first = int(sizes.argmax())
    alike = (values.sign() == values[first].sign()) & (sizes >= 0)
    apart = torch.where(alike, (lengths - lengths[first]).abs() + 1, 0)
    apart[first] = 0
    second = int(apart.argmax())
    rows = [first, second if apart[second] > 0 else first]

    def of_rows(value):
        per_sequence = isinstance(value, torch.Tensor) and value.dim() and len(value) == number
        return value[rows] if per_sequence else value

    return {name: of_rows(value) for name, value in inputs.items()}


def drift(mask, advantages, *, total):
    """Log-ratios (B, T): of the first sequence on the side where no clip stops the gradient.

    Args:
        total: whether the ratio is that of the sum over a sequence, which `DRIFT` is then.
    """
    signs = advantages if advantages.dim() == 1 else (advantages * mask).sum(1)
    sides = torch.where(signs < 0, 1.0, -1.0)
    sides[1:] = -sides[1:]
    lengths = mask.sum(1).clamp(min=1) if total else 1.0
    alternating = torch.ones(mask.shape[1], device=mask.device)
    alternating[1::2] = -1.0
    return (DRIFT * sides / lengths)[:, None] + SPREAD * alternating


def _why_structures_differ(mine, theirs):
    if not isinstance(theirs, tuple) or len(mine) != len(theirs):
        found = f"{len(theirs)} values" if isinstance(theirs, tuple) else type(theirs).__name__
        return f"TRL returns {found}, expected {len(mine)} values"
    shapes = [[None if x is None else tuple(x.shape) for x in values] for values in (mine, theirs)]
    return None if shapes[0] == shapes[1] else f"shapes {shapes[0]}, where TRL has {shapes[1]}"


def _distance(mine, theirs):
    """Norm of the difference over the norm of TRL's values; NaN counts as equal to NaN."""
    mine, theirs = mine.detach().double(), theirs.detach().double()
    if mine.shape != theirs.shape:
        return math.inf
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    difference = torch.where(same, 0.0, mine - theirs).norm().item()
    return difference / theirs.norm().item() if difference and theirs.norm() else difference
