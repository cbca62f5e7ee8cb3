"""Tiny transformers models of several architectures, and a batch for them."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_fused import linear_grpo_loss

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
    config = AutoConfig.for_model(name, **TINY | MODELS.get(name, {}) | options)
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
