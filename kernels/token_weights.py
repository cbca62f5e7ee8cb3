"""Per-sequence values and weights, broadcast to tokens in one small launch."""

import torch
import triton
import triton.language as tl

from .launch import argument, kernel, launch_small
from .softmax import scalar

BLOCK = 512


@triton.jit
def _value(value, sequence, token, inside):
    """A number, 0-d tensor, or value per sequence or per token, of a block of tokens."""
    if hasattr(value, "__len__"):
        if len(value) == 2:
            return tl.load(value[0] + sequence, inside, 1).to(tl.float32)
        else:
            return scalar(value)
    elif hasattr(value, "dtype"):
        if value.dtype.is_ptr():
            return tl.load(value + token, inside, 1).to(tl.float32)
        else:
            return scalar(value)
    else:
        return value


@triton.jit
def _weight(weight, sequence, token, inside):
    """coefficient / (max(items, 1) divisor) of a block of tokens."""
    items = tl.maximum(_value(weight.items, sequence, token, inside), 1.0)
    divisor = items * _value(weight.divisor, sequence, token, inside)
    return _value(weight.coefficient, sequence, token, inside) / divisor


@kernel
def _token_weights_kernel(
    values, index_ptr, length: tl.int32, num_tokens: tl.int32, outputs, BLOCK: tl.constexpr
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    if index_ptr is None:
        sequence = token // length
    else:
        sequence = tl.load(index_ptr + token, inside, 0)
    if outputs.advantages is not None:
        advantages = _value(values.advantages, sequence, token, inside)
        tl.store(outputs.advantages + token, advantages, inside)
    if outputs.w_policy is not None:
        weight = _weight(values.policy, sequence, token, inside)
        if values.policy_mask is not None:  # selects first: a ratio that is off may be NaN
            on = _value(values.policy_mask, sequence, token, inside) != 0.0
            weight = tl.where(on, weight, 0.0)
        tl.store(outputs.w_policy + token, weight, inside)
    if outputs.w_kl is not None:
        tl.store(outputs.w_kl + token, _weight(values.kl, sequence, token, inside), inside)
    if outputs.w_entropy is not None:
        weight = _weight(values.entropy, sequence, token, inside)
        tl.store(outputs.w_entropy + token, weight, inside)


def _argument(value):
    """As `launch.argument`; a tensor (B,) is a tuple that has it twice, not None (Triton 3.6).

    Not a NamedTuple: Triton's cache compares tuples, and those with equal fields are equal.
    """
    if isinstance(value, tuple):  # a `Weight`
        return value._make(map(_argument, value))
    value = argument(value)
    return (value, value) if isinstance(value, torch.Tensor) and value.dim() == 1 else value


def token_weights(values, index, outputs):
    """Write advantages and weights (B, T) float32.

        weight = coefficient / (max(items, 1) divisor), 0 where the policy mask is 0

    Args:
        values: `grpo_fused.bundles.TokenValues`; each is a number, 0-d, (B,) or (B, T).
        index: (N,) int64, the sequence of every token of a packed batch, or None.
        outputs: `grpo_fused.bundles.TokenWeights`; None = not computed.
    """
    like = next(output for output in outputs if output is not None)
    advantages, w_policy, w_kl, w_entropy = outputs
    written = (advantages, w_policy, w_policy, w_kl, w_entropy)  # of each value
    values = values._make(
        None if output is None else _argument(value)
        for value, output in zip(values, written, strict=True)
    )
    num_tokens = like.numel()
    args = (values, index, like.shape[-1], num_tokens, outputs)
    launch_small(_token_weights_kernel, triton.cdiv(num_tokens, BLOCK), like, *args, BLOCK=BLOCK)
