"""Pictures of every objective and its gradient against the ratio, for docs/losses.md.

python -m benchmarks.plot_losses [FOLDER] writes losses.png and loss-gradients.png, into docs by
default. Values are those of `evaluate` in float64, gradients those of autograd.
"""

import math
import sys
from typing import NamedTuple

import torch

from benchmarks import plots
from grpo_fused import LOSSES, Clip
from grpo_fused.losses.objectives import Objective
from grpo_fused.sequences import Padded

LOWEST, HIGHEST, POINTS = 0.2, 5.0, 241
COLUMNS = 4
SIGNS = {1.0: ("A = 1", "#0072B2", "-"), -1.0: ("A = -1", "#D55E00", "--")}


class Panel(NamedTuple):
    """What a panel draws: a token, for objectives that couple a batch beside others in one.

    `others` are those where A = 1; where A = -1 all three are negated.
    """

    objective: Objective
    held: str = ""  # what is held fixed, for the title
    p_old: float = 0.2
    others: tuple[float, float, float] | None = None  # A, log-ratio, logp - log p_old
    number: int = 0  # of others in the batch
    dotted: Objective | None = None  # a variant, for A = -1


def row(name):
    return LOSSES[name].objective


PANELS = [
    Panel(row("dapo"), "dotted: delta = 3", dotted=Clip(0.2, 0.28, 3.0)),
    Panel(row("cispo")),
    Panel(row("sapo")),
    Panel(row("gpg")),
    Panel(row("importance_sampling")),
    Panel(row("dppo_tv"), "p_old = 0.5", p_old=0.5),
    Panel(row("dppo_kl"), "p_old = 0.5", p_old=0.5),
    Panel(row("dro")),
    Panel(row("ipo"), "q = p_old"),
    Panel(row("rollout_is"), "q = p_old"),
    Panel(row("vespo"), "one token"),
    Panel(row("gmpo"), "one token"),
    Panel(row("topr"), "one token"),
    Panel(row("fipo"), "one token"),
    # The mean of A is 0; that of logp lies 1.4 from log p_old, on the other side for the other A.
    Panel(row("clip_cov"), "logp 1.4 off the mean", others=(0.0, 0.0, -1.4), number=99),
    Panel(row("kl_cov"), "logp 1.4 off the mean", others=(0.0, 0.0, -1.4), number=99),
    Panel(row("m2po"), "beside 9 of log-ratio 0.1", others=(1.0, 0.1, 0.0), number=9),
]


def ratios(panel):
    """(N,) float64, evenly spaced logarithms, as far as probabilities of at most 1 go."""
    highest = min(HIGHEST, 1 / panel.p_old)
    return torch.linspace(math.log(LOWEST), math.log(highest), POINTS, dtype=torch.float64).exp()


def curve(panel, sign, objective=None):
    """(loss, d loss / d logp), (N,) each, of a token of that advantage at every one of `ratios`."""
    objective = objective or panel.objective
    old_logp = torch.full((POINTS, 1), math.log(panel.p_old), dtype=torch.float64)
    logp = (old_logp + ratios(panel).log()[:, None]).requires_grad_(True)
    advantage = torch.full_like(old_logp, sign)
    if objective.couples == "batch":
        tokens = zip(logp, old_logp, advantage, strict=True)
        loss = torch.cat([_in_batch(panel, sign, *token) for token in tokens])
    elif objective.couples == "sequence":
        sequences = Padded(logp.shape, None, logp.device)
        loss = objective.evaluate(logp, logp - old_logp, advantage, None, sequences)[0]
    else:
        loss = objective.of_tokens(logp, logp - old_logp, advantage, old_logp)[0]
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    return loss.detach().flatten(), gradient.flatten()


def _in_batch(panel, sign, logp, old_logp, advantage):
    """Loss (1,) of one token beside the others of the panel."""
    A, log_ratio, offset = panel.others
    others = torch.full((panel.number,), sign, dtype=torch.float64)
    tokens = (
        torch.cat([logp, old_logp + offset * others]),
        torch.cat([logp - old_logp, log_ratio * others]),
        torch.cat([advantage, A * others]),
    )
    loss, _ = panel.objective.evaluate(*(values[None] for values in tokens), None)
    return loss[0, :1]


def without_jumps(values):
    """Values with a NaN where they jump, so that no line joins the two sides."""
    values = values.clone()
    values[1:][values.diff().abs() > 0.15] = math.nan
    return values


def curves(panel):
    """[(style of the line, loss, gradient), ...] of a panel."""
    lines = []
    for sign, (label, colour, dashes) in SIGNS.items():
        style = {"label": label, "color": colour, "linestyle": dashes}
        lines.append((style, *curve(panel, sign)))
    if panel.dotted is not None:
        style = {"color": "black", "linestyle": ":"}
        lines.append((style, *curve(panel, -1.0, panel.dotted)))
    return lines


def draw(drawn, which, title, path):
    """Losses (which = 0) or gradients (1) of `curves`, a panel beside the other."""
    rows = -(-len(PANELS) // COLUMNS)
    figure, grid = plots.start(rows, COLUMNS, height=1.9 * rows + 0.6)
    for axes, panel, lines in zip(grid.flat, PANELS, drawn, strict=False):
        axes.axhline(0.0, color="0.7", linewidth=0.8)
        axes.axvline(1.0, color="0.7", linewidth=0.8)
        for style, *values in lines:
            axes.plot(ratios(panel), without_jumps(values[which]), linewidth=1.7, **style)
        name = type(panel.objective).__name__
        axes.set_title(f"{name}\n{panel.held}".strip(), fontsize=9, linespacing=1.1)
        axes.set_xscale("log")
        axes.set_xlim(LOWEST, HIGHEST)
        axes.set_xticks([0.2, 0.5, 1, 2, 5])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_ylim(-3.3, 3.3)
        axes.set_yticks([-3, -2, -1, 0, 1, 2, 3])
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    for axes in grid.flat[len(PANELS) :]:
        axes.set_axis_off()
    plots.finish(figure, *grid[0][0].get_legend_handles_labels(), title, path)


def main(folder="docs"):
    drawn = [curves(panel) for panel in PANELS]
    draw(drawn, 0, "loss of a token by its ratio", f"{folder}/losses.png")
    draw(drawn, 1, "d loss / d logp of a token by its ratio", f"{folder}/loss-gradients.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
