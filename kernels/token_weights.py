"""Per-sequence values and weights, broadcast to tokens in one small launch."""

import triton
import triton.language as tl

from .launch import argument, kernel, launch_small
from .softmax import token_value

BLOCK = 512


@triton.jit
def _weight(weight, sequence, token, inside):
    """coefficient / (max(items, 1) divisor) of a block of tokens."""
    items = tl.maximum(token_value(weight.items, sequence, token, inside), 1.0)
    divisor = items * token_value(weight.divisor, sequence, token, inside)
    return token_value(weight.coefficient, sequence, token, inside) / divisor


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
        advantages = token_value(values.advantages, sequence, token, inside)
        tl.store(outputs.advantages + token, advantages, inside)
    if outputs.w_policy is not None:
        weight = _weight(values.policy, sequence, token, inside)
        if values.policy_mask is not None:  # selects first: a ratio that is off may be NaN
            on = token_value(values.policy_mask, sequence, token, inside) != 0.0
            weight = tl.where(on, weight, 0.0)
        tl.store(outputs.w_policy + token, weight, inside)
    if outputs.w_kl is not None:
        tl.store(outputs.w_kl + token, _weight(values.kl, sequence, token, inside), inside)
    if outputs.w_entropy is not None:
        weight = _weight(values.entropy, sequence, token, inside)
        tl.store(outputs.w_entropy + token, weight, inside)


def _argument(value):
    """As `launch.argument`, of a `Weight` too."""
    return value._make(map(argument, value)) if isinstance(value, tuple) else argument(value)


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
    blocks = -(-num_tokens // BLOCK)
    launch_small(_token_weights_kernel, blocks, like, *args, BLOCK=BLOCK)
