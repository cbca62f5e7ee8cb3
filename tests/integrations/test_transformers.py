"""Models of transformers whose LM head is replaced by a loss give the numbers of their logits."""

import copy

import pytest
import torch
from tiny_models import (
    MODELS,
    T,
    V,
    batch,
    fused_loss,
    gradients,
    quantised,
    tiny,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from grpo_fused import grpo_loss, linear_grpo_loss
from grpo_fused.integrations.transformers import (
    fuse_lm_head,
    head_scaling,
    why_no_router_loss,
    why_not_fused,
)


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
    fuse_lm_head(model)  # a second call has no effect
    output = fused_loss(model)
    output.loss.backward()
    torch.testing.assert_close(output.logps, expected.logps, rtol=1e-5, atol=1e-6)
    assert gradients(model).keys() == expected_gradients.keys()
    for parameter, gradient in gradients(model).items():
        reference = expected_gradients[parameter]
        assert (gradient - reference).norm() <= 2e-5 * reference.norm() + 1e-9, parameter


def test_generation_and_logits_are_unchanged():
    model = tiny()
    input_ids = batch()[0]
    expected = model.generate(input_ids, max_new_tokens=3, do_sample=False)
    logits = model(input_ids).logits
    fuse_lm_head(model)
    assert torch.equal(model.generate(input_ids, max_new_tokens=3, do_sample=False), expected)
    assert torch.equal(model(input_ids).logits, logits)
    assert torch.equal(model(input_ids, logits_to_keep=2).logits, logits[:, -2:])


def test_head_scaling():
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
        (adapted, "Adapter is not a plain linear layer"),
        (headless, "the model has none"),
        (scaled_by_hand, "Qwen3ForCausalLM transforms its logits"),
    ],
)
def test_a_head_that_cannot_be_fused_raises(change, reason):
    model = tiny()
    model.train()
    change(model)
    with pytest.raises(ValueError, match=reason):
        fuse_lm_head(model)
    assert model.training, "the check left the model in evaluation mode"


def test_columns_that_a_bias_takes_out():
    """-inf in the head's bias: what is left of the logits is compared, and the rest is equal."""
    model = tiny("phi")
    with torch.no_grad():
        model.lm_head.bias[50:] = -torch.inf
    assert why_not_fused(model) is None
    fuse_lm_head(model)
    loss = fused_loss(model).loss
    loss.backward()
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(model).values())


def test_an_exception_in_the_head_restores_the_model():
    model = tiny()
    fuse_lm_head(model)
    expected = model(batch()[0]).logits
    with pytest.raises(ValueError, match="advantages"):
        model(batch()[0], head=lambda hidden, weight, **head: linear_grpo_loss(
            hidden, weight, *batch()[:1], None, torch.ones(7), **head))  # fmt: skip
    assert torch.equal(model(batch()[0]).logits, expected)


def test_a_deep_copy_computes_its_own_logits():
    model = tiny()
    fuse_lm_head(model)
    copied, input_ids = copy.deepcopy(model), batch()[0]
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
    torch.testing.assert_close(copied(input_ids).logits, 2 * model(input_ids).logits)
    assert not torch.equal(fused_loss(copied).logps, fused_loss(model).logps)


def test_float32_head_of_a_bfloat16_model():
    """TRL's cast_lm_head_to_fp32 builds such a model."""
    model = tiny().bfloat16()
    lm_head = model.lm_head.float()
    lm_head.forward = lambda hidden: nn.functional.linear(hidden.float(), lm_head.weight)
    input_ids, *tokens = batch()
    expected = grpo_loss(model(input_ids).logits[:, -T - 1 :], *tokens, num_items_in_batch=18)
    expected.loss.backward()
    weight_gradient = lm_head.weight.grad
    model.zero_grad()

    fuse_lm_head(model)
    output = fused_loss(model, upcast=True)
    output.loss.backward()
    assert output.logps.dtype == lm_head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(output.logps, expected.logps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lm_head.weight.grad, weight_gradient, rtol=1e-5, atol=1e-7)


def test_head_sharded_over_unknown_ranks(tmp_path):
    """Only a mesh named "tp" says that the vocabulary is parallel; the weight is not gathered."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    model = tiny()
    mesh = init_device_mesh("cpu", (1,))
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight, mesh, [Shard(0)]))
    reason = why_not_fused(model)
    torch.distributed.destroy_process_group()
    assert reason == "its weight is a DTensor [Shard(dim=0)] on the mesh None"


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 8, "n_routed_experts": 4}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "granitemoe"])
def test_loss_of_the_router(name):
    """Beside the head, as the model's own forward computes it; its gradient reaches the router."""
    model = tiny(name, **EXPERTS)
    reason = why_no_router_loss(model)
    if name == "granitemoe" and "has 0 as load-balancing loss" in (reason or ""):
        pytest.skip(f"transformers of this version: {reason}")
    assert why_not_fused(model) is None and reason is None
    input_ids, *tokens = batch()
    mask = torch.ones_like(input_ids)
    mask[:2, 0] = 0
    call = {"attention_mask": mask, "output_router_logits": True}
    expected = model(input_ids, **call)
    expected.aux_loss.backward()
    wanted = {name: g for name, g in gradients(model).items() if g.any()}
    model.zero_grad()

    fuse_lm_head(model)
    shapes, aux_loss = model(input_ids, **call, head=lambda hidden, weight, **head: weight.shape)
    aux_loss.backward()
    assert shapes == (V, 16)
    assert torch.equal(aux_loss, expected.aux_loss)
    found = {name: g for name, g in gradients(model).items() if g.any()}
    assert found.keys() == wanted.keys() and wanted
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("nothing", [0, None])
def test_a_router_without_a_loss(nothing, monkeypatch):
    """As that of GraniteMoe in transformers 5.0: its function has no logits to make one of."""
    function = "transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func"

    def load_balancing_loss(gate_logits, num_experts, top_k, attention_mask):
        return nothing

    monkeypatch.setattr(function, load_balancing_loss)
    reason = why_no_router_loss(tiny("mixtral", **EXPERTS))
    assert f"MixtralForCausalLM has {nothing} as load-balancing loss" in reason


def test_a_model_without_a_router():
    assert "load-balancing loss of Qwen3ForCausalLM is not known" in why_no_router_loss(tiny())
