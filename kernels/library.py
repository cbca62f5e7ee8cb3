"""Launchers: plain calls in eager mode, torch.library ops under torch.compile.

A launcher writes into outputs that its caller allocated and returns nothing. The op boundary keeps
Inductor out of the kernels (it would type Python floats as float64 and retrace per value); eager
calls skip it because the dispatcher costs more than the smaller kernels take.
"""

import functools

import torch

# What a head makes logits of, and the gradients that come back to it: `linear.Head`.
HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, ScalarType dtype, Tensor? order, Tensor? counts, "
)
DHEAD = "Tensor(x!)? dhidden, Tensor(y!)? dweight, Tensor(z!)? dbias"
SCALES = "Tensor temperature, Tensor logit_scale, Tensor? logit_softcap, "
LOSS = (
    "Tensor advantages, Tensor? old_logps, Tensor? ref_logps, Tensor? ratios, "
    "Tensor? policy_mask, Tensor items, Tensor divisor, Tensor kl_items, Tensor kl_divisor, "
    f"Tensor? entropy_items, Tensor? entropy_coef, {SCALES}Tensor beta, Tensor grad_scale, "
    "str objective, float[] knobs, str divergence, bool bias_correction, "
)
LOSS_OUTPUTS = "Tensor(a!) terms, Tensor(b!) logps, Tensor(c!)? entropies, "
LOGPROB_OUTPUTS = "Tensor(a!) logps, Tensor(b!)? entropies, Tensor(c!)? maxima, Tensor(d!)? totals"
LOGPROB_GRADIENTS = (
    "Tensor logps, Tensor? entropies, Tensor maxima, Tensor totals, "
    "Tensor dlogps, Tensor? dentropies, "
)

# What every implementation's launchers take, in the notation of torch.library: `(a!)` marks an
# output. In eager calls a number may stand for a 0-d tensor.
SIGNATURES = {
    "logprob_fwd": f"Tensor logits, Tensor ids, Tensor? active, {SCALES}{LOGPROB_OUTPUTS}",
    "logprob_bwd": (
        f"Tensor logits, Tensor ids, Tensor? active, {SCALES}{LOGPROB_GRADIENTS}Tensor(a!) dlogits"
    ),
    "fused_loss": (
        f"Tensor logits, Tensor ids, Tensor? active, {LOSS}{LOSS_OUTPUTS}Tensor(d!)? dlogits"
    ),
    "linear_loss": f"{HEAD}Tensor ids, {LOSS}int chunk_bytes, {LOSS_OUTPUTS}{DHEAD}",
    "linear_logprob_fwd": (
        f"{HEAD}Tensor ids, {SCALES}int chunk_bytes, {LOGPROB_OUTPUTS}, Tensor(e!)? logits"
    ),
    "linear_logprob_bwd": (
        f"{HEAD}Tensor ids, {SCALES}int chunk_bytes, {LOGPROB_GRADIENTS}bool accumulate, "
        f"Tensor(a!)? logits, {DHEAD}"
    ),
    "locate": ("Tensor cu_seqlens, Tensor? active, Tensor(a!) index, Tensor(b!) counts"),
    "reduce": (
        "Tensor terms, Tensor? active, Tensor? entropies, "
        "Tensor(a!) loss, Tensor(b!) sums, Tensor(c!) metrics"
    ),
    "rescale": "Tensor(a!) dlogits, Tensor grad_output, Tensor grad_scale",
}


def launcher(function, name=None, suffix=""):
    """Register a function named in SIGNATURES as `grpo_fused::<name><suffix>`.

    Floats become 0-d tensors on the way into the op, so that a new value is new data and not a new
    graph.
    """
    name = name or function.__name__
    signature = SIGNATURES[name]
    parameters = [parameter.strip() for parameter in signature.split(",")]
    outputs = [parameter.split()[-1] for parameter in parameters if "!" in parameter]
    is_tensor = [parameter.startswith("Tensor") for parameter in parameters]
    op = torch.library.custom_op(
        f"grpo_fused::{name}{suffix}",
        function,
        mutates_args=outputs,
        schema=f"({signature}) -> ()",
    )
    op.register_fake(lambda *args: None)

    @functools.wraps(function)
    def call(*args):
        if not torch.compiler.is_compiling():
            return function(*args)
        device = args[0].device
        return op(
            *(
                torch.full((), value, dtype=torch.float32, device=device)
                if tensor and isinstance(value, (int, float))
                else value
                for value, tensor in zip(args, is_tensor, strict=True)
            )
        )

    call.op = op
    return call
