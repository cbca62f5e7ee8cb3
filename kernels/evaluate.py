"""An objective alone, for `grpo_fused.testing`: one token per program."""

import triton.language as tl

from .launch import kernel, launch_small


@kernel
def _evaluate_kernel(
    logp_ptr,
    log_ratio_ptr,
    advantage_ptr,
    sampling_ptr,
    parameters,
    out_ptr,
    n: tl.int32,
    OBJECTIVE: tl.constexpr,
):
    i = tl.program_id(0)
    logp = tl.load(logp_ptr + i)
    log_ratio = tl.load(log_ratio_ptr + i)
    advantage = tl.load(advantage_ptr + i)
    if sampling_ptr is None:
        loss, dlogp, clipped = OBJECTIVE(logp, log_ratio, advantage, *parameters)
    else:
        sampling_logp = tl.load(sampling_ptr + i)
        loss, dlogp, clipped = OBJECTIVE(logp, log_ratio, advantage, sampling_logp, *parameters)
    tl.store(out_ptr + i, loss)
    tl.store(out_ptr + n + i, dlogp)
    tl.store(out_ptr + 2 * n + i, clipped)


def evaluate(per_token, params, logp, log_ratio, advantage, sampling_logp, out):
    """Write loss, derivative and clipped of tokens (n,) into out (3, n), contiguous.

    sampling_logp is None for objectives that do not take it.
    """
    args = (logp, log_ratio, advantage, sampling_logp, tuple(params), out, len(logp))
    launch_small(_evaluate_kernel, len(logp), out, *args, OBJECTIVE=per_token)
