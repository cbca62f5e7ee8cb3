"""A whole training step, model, loss, backward and AdamW, with the loss of different providers.

    pytest benchmarks/bench_step.py --lines runs/step.jsonl

Models are Qwen3-like with random weights, completions of several lengths behind one prompt length.
Before anything is timed the providers' losses must agree. `longest` is the longest completion of a
ladder whose step stays within a budget of memory.
"""

import functools
import importlib

import pytest
import torch

from benchmarks import providers
from benchmarks.record import peaks_in_new_process, record
from grpo_fused import grpo_loss, linear_grpo_loss

PROMPT = 16
CPU_MODEL = {
    **{"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 384},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 32_000},
}
CUDA_MODEL = {  # the sizes of Qwen2.5-0.5B
    **{"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864},
    **{"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 151_936},
}
CPU_LENGTHS, CPU_LADDER, CPU_BUDGET = (256, 128, 64, 32), (64, 128, 256, 512), 256 << 20
CUDA_LENGTHS, CUDA_BUDGET = (1024,) * 8, 24 << 30
CUDA_LADDER = (512, 1024, 2048, 4096, 8192, 16_384)


def make_model(sizes, device, dtype):
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**sizes, use_cache=False, attn_implementation="sdpa")
    return transformers.Qwen3ForCausalLM(config).to(device, dtype)


def make_batch(lengths, V, device):
    """(input_ids, ids, mask, advantages, old_logps) of prompts and completions."""
    generator = torch.Generator(device).manual_seed(0)
    B, T = len(lengths), max(lengths)
    options = {"generator": generator, "device": device}
    input_ids = torch.randint(V, (B, PROMPT + T), **options)
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long().to(device)
    advantages = torch.randn(B, **options)
    old_logps = -torch.log(torch.tensor(float(V))) + 0.1 * torch.randn(B, T, **options)
    return input_ids, input_ids[:, PROMPT:], mask, advantages, old_logps


def hidden_states(model, input_ids, T):
    return model.model(input_ids).last_hidden_state[:, -T - 1 :]


def eager(model, input_ids, ids, *rest):
    logits = model(input_ids, logits_to_keep=ids.shape[1] + 1).logits[:, :-1]
    return providers.eager(logits, ids, *rest)


def trl(model, input_ids, ids, mask, advantages, old_logps):
    """Stock TRL 1.16: its LM head, in chunks, inside of the model's forward."""
    if not hasattr(model, "has_trl_head"):
        importlib.import_module("trl.trainer.utils").add_fused_lm_head(model)
        model.has_trl_head = True
    labels = input_ids.clone()
    labels[:, :PROMPT] = -100
    labels[:, PROMPT:][mask == 0] = -100
    out = model(input_ids, labels=labels, fused_lm_head=True)
    logps = out.log_probs[:, -ids.shape[1] :]
    return providers.surrogate(logps, mask, advantages, old_logps)


def logits(model, input_ids, ids, mask, advantages, old_logps):
    x = model(input_ids, logits_to_keep=ids.shape[1] + 1).logits
    tokens = (ids, mask, advantages)
    return grpo_loss(x, *tokens, old_logps=old_logps, loss_type="grpo", inplace=True).loss


def fused(model, input_ids, ids, mask, advantages, old_logps):
    hidden = hidden_states(model, input_ids, ids.shape[1])
    tokens = (ids, mask, advantages)
    weight = model.lm_head.weight
    return linear_grpo_loss(hidden, weight, *tokens, old_logps=old_logps, loss_type="grpo").loss


PROVIDERS = {"fused": fused, "logits": logits, "eager": eager, "trl": trl}


def build(sizes, lengths, device, dtype):
    """(batch, steps, prepare) of `record`; every provider trains a model of its own."""
    batch = make_batch(lengths, sizes["vocab_size"], device)

    def step_of(loss):
        model = make_model(sizes, device, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step():
            loss(model, *batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # AdamW's state is there from now on
        return step

    steps = {name: functools.cache(functools.partial(step_of, f)) for name, f in PROVIDERS.items()}
    return batch, {name: lambda make=make: make()() for name, make in steps.items()}, lambda: None


def assert_losses_agree(sizes, lengths, device, dtype, tolerance):
    batch = make_batch(lengths, sizes["vocab_size"], device)
    with torch.no_grad():
        model = make_model(sizes, device, dtype)
        found = {name: loss(model, *batch).item() for name, loss in PROVIDERS.items()}
    wanted = found["eager"]
    assert all(abs(x - wanted) < tolerance for x in found.values()), found


def longest(sizes, ladder, device, dtype, budget):
    """{provider: the longest completion of the ladder whose step stays within the budget}."""
    found = dict.fromkeys(PROVIDERS, 0)
    for T in ladder:
        figures = peaks_in_new_process(
            functools.partial(build, sizes, (T,) * 4, device, dtype), device
        )
        for name, info in figures.items():
            if isinstance(info, dict) and info["peak_bytes"] <= budget:
                found[name] = T
    return found


def time_step(benchmark, sizes, lengths, device, dtype, ladder, budget, tolerance):
    assert_losses_agree(sizes, lengths, device, dtype, tolerance)
    make = functools.partial(build, sizes, lengths, device, dtype)
    record(benchmark, f"training step, {str(dtype)[6:]}", device, make, lambda batch: {})
    benchmark.extra_info |= {
        **{"step": sizes, "lengths": lengths, "budget": budget},
        "longest": longest(sizes, ladder, device, dtype, budget),
    }


def bench_step_cpu(benchmark):
    time_step(
        *(benchmark, CPU_MODEL, CPU_LENGTHS, "cpu", torch.float32, CPU_LADDER, CPU_BUDGET, 1e-5)
    )


@pytest.mark.cuda
def bench_step_cuda(benchmark):
    rest = (CUDA_LADDER, CUDA_BUDGET, 1e-2)
    time_step(benchmark, CUDA_MODEL, CUDA_LENGTHS, "cuda", torch.bfloat16, *rest)
