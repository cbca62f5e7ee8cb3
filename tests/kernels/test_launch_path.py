"""Every public function through Triton's own launch path, up to the driver's call.

The interpreter binds arguments in another way, and offline compilation ends before it launches.
Here Triton's JIT and its C launcher run for sm_90, and a stand-in for libcuda takes what the GPU
would get: pointers, strides, numbers, bundles with None in them.
"""

import tempfile
from collections import Counter

import offline
import pytest
import standin
import torch
from batches import make_batch
from heads import make_head_batch
from launch_counter import FULL, PLAIN, TOKEN_LEVEL, options_of
from packing import cu_seqlens, pack

from grpo_fused import (
    LOSSES,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
)

TRITON = {"implementation": "triton"}
HALF = {"dtype": torch.bfloat16}  # one dtype: fewer variants to compile


def take(launches):
    """Check the parameters of all launches since the last call, and count them by their kernels."""
    for found in launches:
        assert found.parameters == found.wanted, found
    counts = Counter(found.name for found in launches)
    launches.clear()
    return counts


def check_losses(launches, losses, selections):
    """Over logits and a head; few options and all; in place and not."""
    batch, head = make_batch(**HALF), make_head_batch(V=97, **HALF)
    head_inputs = head.leaves()
    for loss_type in losses:
        for names in selections:
            options = options_of(batch, *names) | TRITON | {"loss_type": loss_type}
            inplace = "entropy_coef" in names
            if inplace:
                options |= {"temperature": torch.ones(4, 6), "grad_scale": torch.tensor(2.0)}
            logits = batch.leaf() * 1.0 if inplace else batch.leaf()
            inputs = (batch.ids, batch.mask, batch.advantages)
            grpo_loss(logits, *inputs, inplace=inplace, **options).loss.backward()
            counts = take(launches)
            if loss_type in TOKEN_LEVEL:
                assert counts.pop("_token_weights_kernel", 1) == 1
                kernels = ("_fused_loss_kernel", "_reduce_kernel", "_rescale_kernel")
                assert counts == dict.fromkeys(kernels, 1)
            else:
                assert counts == {"_logprob_fwd_kernel": 1, "_logprob_bwd_kernel": 1}
            hidden, weight, bias = head_inputs
            linear_grpo_loss(hidden, weight, *inputs, bias=bias, **options).loss.backward()
            assert take(launches)


def check_log_probabilities(launches):
    """With a mask, softcapped, in place; with entropies; without a gradient; over a head."""
    batch, head = make_batch(**HALF), make_head_batch(V=97, **HALF)
    ids = batch.ids.clamp(min=0)
    capped = {"logit_softcap": 30.0, "logit_scale": torch.tensor(0.5), "inplace": True}
    for options, mask in ((capped, batch.mask), ({"compute_entropy": True}, None)):
        logits = batch.leaf()[:, :-1] * 1.0
        found = selective_log_softmax(logits, ids, mask, **TRITON, **options)
        sum(x.sum() for x in found if x is not None).backward()
        assert take(launches) == {"_logprob_fwd_kernel": 1, "_logprob_bwd_kernel": 1}
    with torch.no_grad():
        selective_log_softmax(batch.logits, ids, **TRITON)
    assert take(launches) == {"_logprob_fwd_kernel": 1}
    hidden, weight, bias = head.leaves()
    found = linear_selective_log_softmax(hidden, weight, ids, batch.mask, bias=bias, **TRITON)
    found[0].sum().backward()
    assert take(launches) == {"_logprob_fwd_kernel": 1, "_logprob_bwd_kernel": 1}


def check_packed(launches):
    """Packed sequences, and a batch whose sums take two stages."""
    batch, lengths = make_batch(**HALF), (6, 1, 0, 4)
    logits, ids, mask = pack(lengths, batch.logits[:, :-1], batch.ids.clamp(min=0), batch.mask)
    grpo_loss(
        *(logits.requires_grad_(), ids, mask, batch.advantages),
        cu_seqlens=cu_seqlens(lengths, "cpu"),
        **TRITON,
    ).loss.backward()
    assert take(launches)["_locate_kernel"] == 1
    many = make_batch(B=64, T=80, V=8, **HALF)
    with torch.no_grad():
        grpo_loss(many.logits, many.ids, many.mask, many.advantages, **TRITON)
    assert take(launches)["_reduce_parts_kernel"] == 1


@offline.offline
def launch_path(losses, selections):
    with tempfile.TemporaryDirectory() as directory:
        launches = standin.install(directory)
        check_losses(launches, losses, selections)
        check_log_probabilities(launches)
        check_packed(launches)


@pytest.mark.parametrize(
    ("losses", "selections"),
    [
        (("dapo",), (FULL,)),
        pytest.param(tuple(LOSSES), (PLAIN, FULL), marks=pytest.mark.slow),
    ],
    ids=["one", "all"],
)
def test_launch_path(losses, selections):
    if reason := standin.missing():
        pytest.skip(reason)
    launch_path(losses=losses, selections=selections)


if __name__ == "__main__":
    offline.main(globals())
