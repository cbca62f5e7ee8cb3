"""An objective alone, for `grpo_fused.testing`: one token per program."""

import triton.language as tl

from .launch import kernel, launch_small


@kernel
def _evaluate_kernel(
    logp_ptr,
    log_ratio_ptr,
    advantage_ptr,
    parameters,
    out_ptr,
    n: tl.int32,
    OBJECTIVE: tl.constexpr,
):
    i = tl.program_id(0)
    loss, dlogp, clipped = OBJECTIVE(
        tl.load(logp_ptr + i), tl.load(log_ratio_ptr + i), tl.load(advantage_ptr + i), *parameters
    )
    tl.store(out_ptr + i, loss)
    tl.store(out_ptr + n + i, dlogp)
    tl.store(out_ptr + 2 * n + i, clipped)


def evaluate(per_token, params, logp, log_ratio, advantage, out):
    """Write loss, derivative and clipped of tokens (n,) into out (3, n), contiguous."""
    args = (logp, log_ratio, advantage, tuple(params), out, len(logp))
    launch_small(_evaluate_kernel, len(logp), out, *args, OBJECTIVE=per_token)
