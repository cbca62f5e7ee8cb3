"""Tiny reward models on the demo's task, and rewards that judge its completions."""

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from grpo_fused.demo import make_tokenizer
from grpo_fused.trainer import RewardModel

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "pad_token_id": 0, "num_labels": 1}


def save_reward_model(folder, seed=0):
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer))
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load_reward_model(folder, seed=None):
    """A RewardModel; with a seed, one of other weights."""
    model = RewardModel(folder)
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in model.model.parameters():
            torch.nn.init.normal_(parameter)
    return model


def first_digit(completions, **columns):
    """The higher the first character, the better."""
    return [float(text[:1]) if text[:1].isdigit() else -1.0 for text in completions]


def pairs_of(number, start=0):
    """Pairs in which the chosen digit is the larger one."""
    rows = [(a, b) for a in range(10) for b in range(a)][start : start + number]
    return [{"prompt": f"{a}?{b}=", "chosen": str(a), "rejected": str(b)} for a, b in rows]
