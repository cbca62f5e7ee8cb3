"""A GRPO loop in plain PyTorch over a transformers model, without storing its logits.

    pip install ".[train]"
    python examples/hand_written_loop.py

A tiny model with random weights learns to repeat the last token of its prompt, in seconds on a CPU.
To train your own model, replace `make_model`, the prompts and `reward_of`.
"""

from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_fused import linear_grpo_loss, linear_selective_log_softmax, outcome_advantages
from grpo_fused.integrations.transformers import fuse_lm_head

VOCABULARY, PROMPTS, GROUP, PROMPT_LENGTH, T = 12, 16, 8, 2, 4
STEPS, ITERATIONS, BETA, TEMPERATURE = 100, 2, 0.001, 1.0


def make_model():
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config)


def reward_of(prompts, completion_ids, mask):
    """Return the share of the T tokens that repeat the last token of the prompt, (B,)."""
    correct = (completion_ids == prompts[:, -1:]) & mask
    return correct.float().sum(1) / T


@torch.no_grad()
def roll_out(model, prompts):
    """Sample completions; the mask covers the tokens before the first end-of-sequence token.

    Returns:
        (input_ids (B, P + T), completion_ids (B, T), mask (B, T)).
    """
    input_ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=T,
        min_new_tokens=T,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
    )
    completion_ids = input_ids[:, PROMPT_LENGTH:]
    ended = (completion_ids == model.config.eos_token_id).cumsum(1)
    return input_ids, completion_ids, ended == 0


@torch.no_grad()
def score(model, input_ids, completion_ids, mask):
    """Compute the log-probabilities of completions, (B, T)."""
    head = partial(
        linear_selective_log_softmax, ids=completion_ids, mask=mask, temperature=TEMPERATURE
    )
    return model(input_ids, logits_to_keep=T + 1, head=head)[0]


def train(steps=STEPS, seed=0):
    """Train a new model and yield the mean reward of each step."""
    torch.manual_seed(seed)
    policy, reference = make_model(), make_model()
    reference.load_state_dict(policy.state_dict())
    for model in (policy, reference):
        fuse_lm_head(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)

    for _ in range(steps):
        prompts = torch.randint(2, VOCABULARY, (PROMPTS, PROMPT_LENGTH)).repeat_interleave(GROUP, 0)
        input_ids, completion_ids, mask = roll_out(policy, prompts)
        rewards = reward_of(prompts, completion_ids, mask)
        advantages = outcome_advantages(rewards, GROUP)
        ref_logps = score(reference, input_ids, completion_ids, mask)
        old_logps = None  # the first update is on policy

        for _ in range(ITERATIONS):
            loss = partial(
                linear_grpo_loss,
                completion_ids=completion_ids,
                completion_mask=mask,
                advantages=advantages,
                old_logps=old_logps,
                ref_logps=ref_logps,
                beta=BETA,
                temperature=TEMPERATURE,
            )
            out = policy(input_ids, logits_to_keep=T + 1, head=loss)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            old_logps = out.logps if old_logps is None else old_logps
        yield rewards.mean().item()


def main():
    rewards = list(train())
    first, last = rewards[:10], rewards[-10:]
    print(f"mean reward: {sum(first) / len(first):.2f} -> {sum(last) / len(last):.2f}")


if __name__ == "__main__":
    main()
