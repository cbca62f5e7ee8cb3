"""Launchers: plain calls in eager mode, torch.library ops under torch.compile.

A launcher writes into outputs that its caller allocated and returns nothing. The op boundary keeps
Inductor out of the kernels (it would type Python floats as float64 and retrace per value); eager
calls skip it because the dispatcher costs more than the smaller kernels take.
"""

import functools
import re

import torch


def launcher(signature, suffix=""):
    """Register `grpo_fused::<name><suffix>` with this schema; `(a!)` marks an output.

    Arguments that the schema calls `Tensor` but that eager callers may give as Python floats
    (temperature, beta, grad_scale) become 0-d tensors on the way into the op, so that a new value
    is new data and not a new graph.
    """
    parameters = [parameter.strip() for parameter in signature.split(",")]
    outputs = [p.split()[-1] for p in parameters if "!" in p]
    is_tensor = [re.match(r"Tensor\b(?!\?)", parameter) is not None for parameter in parameters]

    def decorate(function):
        op = torch.library.custom_op(
            f"grpo_fused::{function.__name__}{suffix}",
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
                    torch.full((), value, device=device)
                    if tensor and isinstance(value, float)
                    else value
                    for value, tensor in zip(args, is_tensor, strict=True)
                )
            )

        call.op = op
        return call

    return decorate
