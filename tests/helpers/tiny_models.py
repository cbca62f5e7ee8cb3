"""Tiny transformers models of several architectures, a batch for them, and a sharded run."""

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_fused import linear_grpo_loss
from grpo_fused.integrations.transformers import fuse_lm_head

V, T = 61, 5
TINY = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
TINY |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "qwen3": {},
    "llama": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 0.05},
    "granite": {"logits_scaling": 0.25},
    "cohere": {"logit_scale": 3.0},
    "phi": {},  # the head has a bias
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 1},
}


def tiny(name="qwen3", **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **TINY, **MODELS[name], **options)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def quantised(model):
    lm_head = model.lm_head
    lm_head.weight = nn.Parameter(lm_head.weight.data.to(torch.int8), requires_grad=False)


def batch():
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, V, (4, 3 + T), generator=generator)
    mask = torch.ones(4, T)
    mask[1, 3:] = 0
    return input_ids, input_ids[:, 3:], mask, torch.tensor([1.0, -0.5, 0.7, -1.2])


def fused_loss(model, rows=slice(None), **options):
    input_ids, *tokens = (tensor[rows] for tensor in batch())

    def head(hidden, weight, **head):
        return linear_grpo_loss(hidden, weight, *tokens, num_items_in_batch=18, **head, **options)

    return model(input_ids, logits_to_keep=T + 1, head=head)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# The gradient is computed in forward, or in backward, which gathers the weight again.
OPTIONS = {}, {"importance_sampling_level": "sequence", "chunk_bytes": 64}


def fsdp1(model, own_unit):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, but still used
        options = {"device_id": torch.device("cpu"), "use_orig_params": True}
        for n, layer in enumerate(model.model.layers):
            model.model.layers[n] = FullyShardedDataParallel(layer, **options)
        if own_unit:
            model.lm_head = FullyShardedDataParallel(model.lm_head, **options)
        return FullyShardedDataParallel(model, **options)


def fsdp2(model, own_unit):
    for layer in model.model.layers:
        fully_shard(layer)
    if own_unit:
        fully_shard(model.lm_head)
    return fully_shard(model)


def full_gradients(model):
    """Gather (name, gradient) of the parameters of a sharded model."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = gradients(model)
        return [(name.replace("_fsdp_wrapped_module.", ""), found[name]) for name in found]
    found = gradients(model)
    assert all(isinstance(gradient, DTensor) for gradient in found.values())
    return [(name, gradient.full_tensor()) for name, gradient in found.items()]


# (FSDP version, the head is an FSDP unit, the head is fused after wrapping)
SHARDINGS = [
    (fsdp1, True, False),
    (fsdp1, True, True),
    (fsdp1, False, True),
    (fsdp2, True, False),
    (fsdp2, False, True),
]


def sharded(rank, folder, expected):
    """Run one rank of two, each with half of the rows: the mean of their gradients is `expected`.

    Args:
        rank: 0 or 1.
        folder: where the ranks meet.
        expected: {str(options): {parameter: gradient}} of all rows, for each of OPTIONS.
    """
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for shard, own_unit, late in SHARDINGS:
        model = tiny()
        if not late:
            fuse_lm_head(model)
        wrapped = shard(model, own_unit)
        fuse_lm_head(model)
        for options in OPTIONS:
            wrapped.zero_grad()
            output = fused_loss(wrapped, slice(2 * rank, 2 * rank + 2), **options)
            (2 * output.loss).backward()  # FSDP averages
            found = full_gradients(wrapped)
            case = (shard.__name__, own_unit, late, options)
            assert {name for name, _ in found} == expected[str(options)].keys(), case
            for name, gradient in found:
                reference = expected[str(options)][name]
                error = (gradient - reference).norm()
                assert error <= 1e-5 * reference.norm() + 1e-9, (name, error, case)
    dist.barrier()  # no rank may exit while another one still communicates
    dist.destroy_process_group()
