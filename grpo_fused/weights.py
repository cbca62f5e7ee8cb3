"""Reductions: every mean of the family is a sum with weights that mask and counts decide."""

import torch

RULES = (
    "seq-mean-token-mean",
    "token-mean-local",
    "token-mean",
    "seq-mean-token-sum-norm",
    "seq-mean-token-sum",
    "token-sum",
)


def token_weights(
    mask,
    rule,
    *,
    num_items_in_batch=None,
    num_sequences_in_batch=None,
    max_completion_length=None,
):
    """Weights w with which a loss of the family is sum_bt w[b, t] * loss[b, t].

        seq-mean-token-mean       m / max(n_b, 1) / B       GRPO
        token-mean-local          m / max(sum m, 1)         BNPO
        token-mean                m / max(N, 1)             DAPO
        seq-mean-token-sum-norm   m / (B L)                 Dr. GRPO
        seq-mean-token-sum        m / B                     LUSPO
        token-sum                 m

    with m the mask, n_b = sum_t m[b, t], L = max_completion_length and N = num_items_in_batch.
    A micro-batch that is given the divisors of the whole batch contributes its share: the shares'
    losses and gradients add up to the batch's, for every rule but token-mean-local.

    Args:
        mask: (B, T) bool, integer or float, nonzero = active.
        rule: one of RULES.
        num_items_in_batch: number or 0-d tensor, N; None = sum m. Callers fold the world size in
            where gradients are averaged over ranks.
        num_sequences_in_batch: number or 0-d tensor that replaces B; None = mask.shape[0], which
            counts fully masked sequences too.
        max_completion_length: number, L; None = T.
        Divisors that the rule does not use are ignored.

    Returns:
        (B, T) float32, exactly 0 where the mask is 0.

    Raises:
        ValueError: an unknown rule, a mask that is not (B, T), a divisor that is not positive.

    References:
        The papers of LOSSES; the names are verl's loss_agg_mode.
    """
    if rule not in RULES:
        raise ValueError(f"normalizer must be one of {', '.join(RULES)}, got {rule!r}")
    if mask.dim() != 2:
        raise ValueError(f"mask must be (B, T), got shape {tuple(mask.shape)}")
    sequences, length = mask.shape
    _check_divisor("num_items_in_batch", num_items_in_batch, mask, at_least=0)
    _check_divisor("num_sequences_in_batch", num_sequences_in_batch, mask)
    _check_divisor("max_completion_length", max_completion_length, mask)
    sequences = sequences if num_sequences_in_batch is None else num_sequences_in_batch
    length = length if max_completion_length is None else max_completion_length
    active = (mask != 0).float()
    if rule == "seq-mean-token-mean":
        return active / (active.sum(1, keepdim=True).clamp(min=1) * sequences)
    if rule == "token-mean" and num_items_in_batch is not None:
        return active / _at_least_one(num_items_in_batch)
    if rule in ("token-mean", "token-mean-local"):
        return active / active.sum().clamp(min=1)
    if rule == "seq-mean-token-sum-norm":
        return active / (sequences * length)
    if rule == "seq-mean-token-sum":
        return active / sequences
    return active


def _check_divisor(name, value, mask, at_least=None):
    """None, a number or a 0-d tensor; its value is looked at unless that waits for a device."""
    if value is None:
        return
    if isinstance(value, torch.Tensor):
        if value.dim() != 0 or value.device not in (mask.device, torch.device("cpu")):
            found = f"shape {tuple(value.shape)} on {value.device}"
            raise ValueError(f"{name} must be a number or a 0-d tensor, got {found}")
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return
    elif not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {value!r}")
    if not (value > 0 if at_least is None else value >= at_least):
        bound = "> 0" if at_least is None else f">= {at_least}"
        raise ValueError(f"{name} must be {bound}, got {value}")


def _at_least_one(count):
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
