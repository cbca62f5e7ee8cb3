"""Log-probabilities and entropies: for losses nobody has written yet, and to score without one."""

from grpo_fused import validation
from grpo_fused.autograd import Options
from grpo_fused.inputs import prepare_scales, prepare_tokens
from grpo_fused.sources import Logits


def selective_log_softmax(
    logits,
    ids,
    mask=None,
    *,
    temperature=1.0,
    logit_softcap=None,
    logit_scale=1.0,
    compute_entropy=False,
    inplace=False,
    implementation="auto",
):
    """Log-probability of one token per row of logits, and the entropy of the row.

        x = logit_softcap tanh(logit_scale logits / logit_softcap) / temperature
        logp[b, t] = log_softmax(x[b, t])[ids[b, t]]
        H[b, t] = -sum_v p[b, t, v] log p[b, t, v]

    Both are differentiable in the logits with any upstream gradient:

        dx_j = g (1[j = id] - p_j) - h p_j (log p_j + H)

    for g = dL/dlogp and h = dL/dH. The softmax is never stored; backward recomputes it.

    Args:
        logits: (B, T, V), (B, T + 1, V) or (N, V), as in `grpo_loss`.
        ids: (B, T) or (N,) integer.
        mask: of the shape of ids, nonzero = active; None = all active. Masked results are 0.
        temperature: number or 0-d tensor > 0, or one per sequence (B,) or token, as ids.
        logit_softcap: number or 0-d tensor > 0; None = logits are not capped.
        logit_scale: number or 0-d tensor > 0.
        compute_entropy: whether to compute the entropies; they cost nothing when not.
        inplace: write the gradient over the logits in backward, as in `grpo_loss`.
        implementation: as in `grpo_loss`.

    Returns:
        (logps, entropies): float32 of the shape of ids; entropies is None without compute_entropy.

    Raises:
        ValueError: as `grpo_loss`.
        RuntimeError: a second backward with inplace.
    """
    source = Logits(logits, inplace)
    tokens, sequences, shape = prepare_tokens(source, ids, mask, None, ids_name="ids")
    scales = prepare_scales(source, shape, sequences, temperature, logit_scale, logit_softcap)
    implementation = validation.choose_implementation(implementation, logits.device)
    options = Options(bool(compute_entropy), implementation)
    return as_ids(source.log_probabilities(tokens, scales, options), shape)


def as_ids(values, shape):
    """Values (1, N) of ids that came as (N,) in that shape, None as it is."""
    return tuple(t if t is None or len(shape) == 2 else t.squeeze(0) for t in values)
