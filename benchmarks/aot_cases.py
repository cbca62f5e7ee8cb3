"""Launches of every kernel with every optional input, on zeros: what `benchmarks.aot` compiles."""

import functools

import torch

from grpo_fused import Clip
from grpo_fused.bundles import (
    Derivatives,
    Formula,
    Outputs,
    OverSupport,
    Scales,
    Statistics,
    Support,
    Tokens,
    TokenValues,
    TokenWeights,
    Weight,
)
from grpo_fused.ops import BACKENDS

launchers = BACKENDS["triton"]


def make_tokens(B=2, T=3, *, scale=1.0, temperature=1.0, bonus=False, kept=False):
    """`Tokens` with every optional input: zeros, one value per token; with a support if `kept`."""
    values = torch.zeros(B, T)
    support = Support(values.long(), values.long(), torch.zeros(1, dtype=torch.int32))
    return Tokens(
        ids=values.long(),
        active=values.bool(),
        temperature=temperature,
        advantages=values,
        old_logps=values,
        ref_logps=values,
        w_policy=values,
        w_kl=values,
        w_entropy=values if bonus else None,
        support=support if kept else None,
    )


def launch_fused_loss(
    dtype,
    V,
    B=2,
    T=3,
    *,
    gradient=True,
    entropy=False,
    bonus=False,
    softcap=None,
    scale=1.0,
    temperature=1.0,
    objective=None,
    kl_estimator="k3",
    bias_correction=True,
    over=None,
    upcast=False,
):
    """Launch the fused loss on (B, T + 1, V) zeros with every optional input of a token present.

    Args:
        scale, temperature: factors of the loss that may change from step to step.
        over: `OverSupport`, with a support; None: without one.
        upcast: logits in float32, whose gradient has memory of its own in the dtype.
    """
    objective = objective or Clip(0.2, 0.2 * scale, 4.0 * scale)
    logits = dlogits = torch.zeros(B, T + 1, V, dtype=torch.float32 if upcast else dtype)
    if upcast:
        dlogits = torch.zeros(B, T + 1, V, dtype=dtype)
    values = torch.zeros(B, T)
    names = (objective.name(), objective.params(), kl_estimator, bias_correction)
    uses_sampling = objective.uses_sampling_logps
    tokens = make_tokens(B, T, temperature=temperature, bonus=bonus, kept=over is not None)
    launchers.fused_loss(
        logits,
        tokens._replace(sampling_logps=values if uses_sampling else None),
        Scales(scale, softcap),
        Formula(*names, scale, OverSupport() if over is None else over, uses_sampling),
        Outputs(
            *(values for _ in range(5)),
            entropies=values if entropy or bonus else None,
            dlogits=dlogits if gradient else None,
        ),
    )


def launch_logprob(
    dtype,
    V,
    B=2,
    T=3,
    *,
    gradient=False,
    entropy=False,
    softcap=None,
    padding=0,
    shard=False,
    kept=False,
):
    """Launch the log-probabilities, or their gradient, on (B, T, V - padding) zeros, V apart."""
    logits = torch.zeros(B, T, V, dtype=dtype)[..., : V - padding]
    values = torch.zeros(B, T)
    optional = values if entropy else None
    inputs = (logits, make_tokens(B, T, kept=kept).of_softmax(), Scales(1.0, softcap))
    statistics = (values, optional, values, values)
    statistics = Statistics(*statistics, *(statistics if kept else ()))
    if gradient:
        upstream = (values, optional) if kept else ()
        launchers.logprob_bwd(*inputs, statistics, Derivatives(values, optional, logits, *upstream))
    else:
        launchers.logprob_fwd(*inputs, statistics, shard)


def launch_reduce(dtype, V, num_tokens=3):
    """Launch the reduction of what the tokens of a batch report."""
    values = torch.zeros(2, num_tokens)
    outputs = Outputs(*(values for _ in range(6)))
    launchers.reduce(outputs, values.bool(), *(torch.zeros(n) for n in (1, 8, 7)))


def launch_token_weights(dtype, V):
    """Launch the broadcast with every output and values of every kind."""
    number, sequences, values = torch.zeros(()), torch.zeros(2), torch.zeros(2, 3)
    policy, other = Weight(values, sequences, 2.0), Weight(number, sequences, number)
    token_values = TokenValues(sequences, values, policy, other, Weight(0.1, number, 1.0))
    launchers.token_weights(token_values, None, TokenWeights(*(values for _ in range(4))))


def launch_locate(dtype, V):
    """Launch the search for the sequence of every packed token."""
    tokens = torch.zeros(6)
    ends = torch.zeros(3, dtype=torch.int32)
    launchers.locate(ends, tokens.bool(), tokens.long(), torch.zeros(2))


CASES = {
    "statistics": launch_logprob,
    "statistics, entropy": functools.partial(launch_logprob, entropy=True),
    "statistics, padded rows": functools.partial(launch_logprob, padding=7),
    "statistics of a shard, entropy": functools.partial(launch_logprob, entropy=True, shard=True),
    "gradient": functools.partial(launch_logprob, gradient=True),
    "gradient, entropy": functools.partial(launch_logprob, gradient=True, entropy=True),
    "gradient, padded rows": functools.partial(launch_logprob, gradient=True, padding=7),
    "loss + gradient": launch_fused_loss,
    "loss + gradient, entropy": functools.partial(launch_fused_loss, entropy=True),
    "loss + gradient, entropy bonus": functools.partial(launch_fused_loss, bonus=True),
    "loss + gradient, softcap": functools.partial(launch_fused_loss, softcap=30.0),
    "loss + gradient, float32 logits": functools.partial(launch_fused_loss, upcast=True),
    "loss": functools.partial(launch_fused_loss, gradient=False),
    "statistics, support": functools.partial(launch_logprob, entropy=True, kept=True),
    "gradient, support": functools.partial(launch_logprob, gradient=True, entropy=True, kept=True),
    "loss + gradient, support": functools.partial(
        launch_fused_loss, entropy=True, over=OverSupport(True, False, True)
    ),
    "loss + gradient, support alone": functools.partial(
        launch_fused_loss, bonus=True, over=OverSupport(True, True, True)
    ),
    "rescale": lambda dtype, V: launchers.rescale(torch.zeros(2, 3, V, dtype=dtype), 1.0, 1.0),
    "reduce": launch_reduce,
    "reduce, many tokens": functools.partial(launch_reduce, num_tokens=10_000),
    "token_weights": launch_token_weights,
    "locate": launch_locate,
}
