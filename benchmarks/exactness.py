"""Errors of log-probabilities over a bfloat16 head against float64 of the same operands.

    python -m benchmarks.exactness

Prints the table of docs/exactness.md. Every implementation runs as its users run it, on a CPU; the
truth takes the products of the bfloat16 numbers without rounding. Needs TRL, Liger and verl.
"""

import importlib.metadata
from pathlib import Path

import torch
import torch.nn.functional as F

from grpo_fused import linear_selective_log_softmax

ROOT = Path(__file__).parents[1]
TOKENS, H, V, TEMPERATURE = 96, 3584, 16_384, 1.0
CHUNK = 512  # rows of weight in float64 at a time


def make_rows(seed=0):
    """(hidden (1, n, H), weight (V, H), ids (1, n) sampled), logits of standard deviation 2.5."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, TOKENS, H, generator=generator).bfloat16()
    weight = (2.5 * H**-0.5 * torch.randn(V, H, generator=generator)).bfloat16()
    p = (exact_logits(hidden, weight) / TEMPERATURE).softmax(-1)
    return hidden, weight, torch.multinomial(p[0], 1, generator=generator).T


def exact_logits(hidden, weight):
    wide = hidden.double()
    return torch.cat([wide @ part.double().T for part in weight.split(CHUNK)], -1)


def exact(hidden, weight, ids):
    log_p = (exact_logits(hidden, weight) / TEMPERATURE).log_softmax(-1)
    return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def eager(hidden, weight, ids):
    log_p = (F.linear(hidden, weight) / TEMPERATURE).float().log_softmax(-1)
    return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def trl(hidden, weight, ids):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    rest = (TEMPERATURE, 32_768, None, 1.0, ("log_probs", "entropy"))
    rows = ChunkedLogProbFunction.apply(hidden[0], weight, None, ids[0], *rest)
    return rows[0][None], rows[1][None]


def liger(hidden, weight, ids):
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    chunk = LigerFusedLinearPPOBase.chunk_forward
    return chunk(hidden, weight, ids, temperature=TEMPERATURE), None


def verl(hidden, weight, ids):
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO()(hidden, weight, ids, temperature=TEMPERATURE)


def ours(hidden, weight, ids, logits_dtype=None):
    return linear_selective_log_softmax(
        *(hidden, weight, ids),
        temperature=TEMPERATURE,
        compute_entropy=True,
        logits_dtype=logits_dtype,
    )


def ours_rounded(hidden, weight, ids):
    return ours(hidden, weight, ids, torch.bfloat16)


ROWS = {
    "eager PyTorch, bfloat16 logits": eager,
    "TRL, chunked head": trl,
    "Liger, chunked head": liger,
    "verl, FusedLinearForPPO": verl,
    "ours, `logits_dtype=torch.bfloat16`": ours_rounded,
    "ours": ours,
}


def measure(function, inputs, advantages, truth):
    """Errors of log-probability, entropy, ratio (largest) and of the gradients (relative norm)."""
    hidden, weight, ids = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    logps, entropies = function(*leaves, ids)
    (logps.float() * advantages).sum().backward()
    (want, want_entropies), gradients = truth
    difference = (logps.detach().double() - want).abs()
    found = [difference.max(), None, torch.expm1(difference).max()]
    if entropies is not None:
        found[1] = (entropies.detach().double() - want_entropies).abs().max()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        found.append((leaf.grad.double() - gradient).norm() / gradient.norm())
    return found


def exact_gradients(hidden, weight, ids, advantages):
    """Gradients of sum(advantages logps) in hidden states and weight, float64."""
    p = (exact_logits(hidden, weight) / TEMPERATURE).softmax(-1)
    one = F.one_hot(ids, V).double()
    dlogits = (advantages.double()[..., None] * (one - p) / TEMPERATURE)[0]
    columns = dlogits.split(CHUNK, -1)
    parts = weight.split(CHUNK)
    dhidden = sum(d @ part.double() for d, part in zip(columns, parts, strict=True))
    return dhidden[None], dlogits.T @ hidden[0].double()


def main():
    inputs = make_rows()
    advantages = torch.randn(1, TOKENS, generator=torch.Generator().manual_seed(1))
    truth = exact(*inputs), exact_gradients(*inputs, advantages)
    print("| implementation | log-probability | entropy | ratio | dhidden | dweight |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, function in ROWS.items():
        found = measure(function, inputs, advantages, truth)
        print(f"| {name} |", " | ".join("-" if x is None else f"{x:.1e}" for x in found), "|")
    names = ("torch", "trl", "liger-kernel", "verl")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"\n{TOKENS} tokens, H = {H}, V = {V}, CPU; {versions}")


if __name__ == "__main__":
    main()
