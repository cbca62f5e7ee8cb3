"""The LM head of transformers models fused into their forward: the same numbers, every model."""

import pytest
import torch
from tiny_models import (
    MODELS,
    OPTIONS,
    T,
    V,
    batch,
    fused_loss,
    gradients,
    quantised,
    sharded,
    tiny,
)
from torch import nn

from grpo_fused import grpo_loss, linear_grpo_loss
from grpo_fused.causal_lm import fuse_lm_head, head_scaling


@pytest.mark.parametrize("name", MODELS)
def test_model_with_fused_head_equals_its_logits(name):
    model = tiny(name)
    input_ids, *tokens = batch()
    logits = model(input_ids).logits[:, -T - 1 :]
    expected = grpo_loss(logits, *tokens, num_items_in_batch=18)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.zero_grad()

    fuse_lm_head(model)
    fuse_lm_head(model)  # again is no harm
    output = fused_loss(model)
    output.loss.backward()
    torch.testing.assert_close(output.logps, expected.logps, rtol=1e-5, atol=1e-6)
    assert gradients(model).keys() == expected_gradients.keys()
    for parameter, gradient in gradients(model).items():
        reference = expected_gradients[parameter]
        assert (gradient - reference).norm() <= 2e-5 * reference.norm() + 1e-9, parameter


def test_generation_and_logits_stay_as_they_were():
    model = tiny()
    input_ids = batch()[0]
    expected = model.generate(input_ids, max_new_tokens=3, do_sample=False)
    logits = model(input_ids).logits
    fuse_lm_head(model)
    assert torch.equal(model.generate(input_ids, max_new_tokens=3, do_sample=False), expected)
    assert torch.equal(model(input_ids).logits, logits)
    assert torch.equal(model(input_ids, logits_to_keep=2).logits, logits[:, -2:])


def test_scaling_of_a_config():
    assert head_scaling(tiny("granite").config) == {"logit_scale": 4.0, "logit_softcap": None}
    assert head_scaling(tiny("gemma2").config) == {"logit_scale": 1.0, "logit_softcap": 0.05}


def adapted(model):
    class Adapter(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) + 1

    model.lm_head = Adapter(16, V)


def headless(model):
    model.get_output_embeddings = lambda: None


def scaled_by_hand(model):
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = scaled


@pytest.mark.parametrize(
    "change, reason",
    [
        (quantised, "its weight is quantised"),
        (adapted, "Adapter is no plain linear layer"),
        (headless, "it has none"),
        (scaled_by_hand, "Qwen3ForCausalLM does more to its logits"),
    ],
)
def test_what_cannot_be_fused_is_said(change, reason):
    model = tiny()
    model.train()
    change(model)
    with pytest.raises(ValueError, match=reason):
        fuse_lm_head(model)
    assert model.training, "the check has left the model in evaluation mode"


def test_an_exception_in_the_head_leaves_the_model_whole():
    model = tiny()
    fuse_lm_head(model)
    expected = model(batch()[0]).logits
    with pytest.raises(ValueError, match="advantages"):
        model(batch()[0], head=lambda hidden, weight, **head: linear_grpo_loss(
            hidden, weight, *batch()[:1], None, torch.ones(7), **head))  # fmt: skip
    assert torch.equal(model(batch()[0]).logits, expected)


@pytest.mark.parametrize("own_unit", [True, False])
def test_sharded_by_fsdp2(tmp_path, own_unit):
    """A head that is an FSDP unit of its own too: `full_tensor()` loses the other ranks' part."""
    model = tiny()
    fuse_lm_head(model)
    expected = {}
    for options in OPTIONS:
        model.zero_grad()
        fused_loss(model, **options).loss.backward()
        expected[str(options)] = gradients(model)
    torch.multiprocessing.spawn(sharded, (str(tmp_path), expected, own_unit), nprocs=2)
