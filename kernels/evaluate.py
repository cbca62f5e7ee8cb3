"""An objective alone, for `grpo_fused.testing`: one token a program."""

import triton.language as tl

from . import launch


@launch.kernel
def _evaluate_kernel(
    logp_ptr,
    log_ratio_ptr,
    advantage_ptr,
    knobs,
    out_ptr,
    stride_output: tl.int64,
    OBJECTIVE: tl.constexpr,
):
    i = tl.program_id(0)
    loss, dlogp, clipped = OBJECTIVE(
        tl.load(logp_ptr + i), tl.load(log_ratio_ptr + i), tl.load(advantage_ptr + i), *knobs
    )
    tl.store(out_ptr + i, loss)
    tl.store(out_ptr + stride_output + i, dlogp)
    tl.store(out_ptr + 2 * stride_output + i, clipped)


def evaluate(per_token, knobs, logp, log_ratio, advantage, out):
    """Write loss, derivative and clipped of tokens (n,) into out (3, n)."""
    with launch.on_device(out):
        launch.launch(
            _evaluate_kernel,
            len(logp),
            *(logp, log_ratio, advantage, tuple(knobs), out, out.stride(0)),
            OBJECTIVE=per_token,
        )
