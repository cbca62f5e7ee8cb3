"""The demo: a tiny language model learns from its own samples which of two digits is larger."""

import copy
import json
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from grpo_fused import grpo_loss, outcome_advantages, selective_log_softmax

ANSWER_LENGTH = 2  # a digit and the end token


class DemoOptions(NamedTuple):
    """The options of `grpo-fused demo`, which explains them and holds their defaults."""

    output_dir: Path
    steps: int
    seed: int
    prompts_per_step: int
    num_generations: int
    loss_type: str
    beta: float
    learning_rate: float
    num_iterations: int
    threads: int


class Rollout(NamedTuple):
    """B completions, those of one prompt side by side; P prompt tokens, T completion tokens."""

    sequences: torch.Tensor  # (B, P + T) int64
    attention_mask: torch.Tensor  # (B, P + T) int64
    completion_ids: torch.Tensor  # (B, T) int64
    completion_mask: torch.Tensor  # (B, T) bool, up to and including the end token
    texts: list[str]


def make_problems() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """All 100 pairs of prompt and answer, as ("7?3=", "7"): 80 to train on and 20 held out."""
    problems = [(f"{a}?{b}=", str(max(a, b))) for a in range(10) for b in range(10)]
    random.Random(0).shuffle(problems)  # the same cut for every seed
    return problems[20:], problems[:20]


def reward_of(text: str, answer: str) -> float:
    """1 if the completion is the answer and then ends, else 0. Behind the end there is padding."""
    return float(text.partition("<eos>")[:2] == (answer, "<eos>"))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, 14 in all."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789?="])}
    characters = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A causal language model of 76,000 random weights that samples from its own distribution."""
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.Qwen3ForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=ANSWER_LENGTH,
        do_sample=True,
        top_k=0,  # the default, 50, would cut what the loss takes for the policy's distribution
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def roll_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    num_generations: int = 1,
    do_sample: bool = True,
) -> Rollout:
    """Completes every prompt `num_generations` times."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    prompt_ids, prompt_mask = inputs["input_ids"], inputs["attention_mask"]
    sequences = model.generate(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        num_return_sequences=num_generations,
        do_sample=do_sample,
    )
    completion_ids = sequences[:, prompt_ids.shape[1] :]
    is_end = (completion_ids == tokenizer.eos_token_id).long()
    completion_mask = is_end.cumsum(dim=1) - is_end == 0  # no end before this token
    prompt_mask = prompt_mask.repeat_interleave(num_generations, dim=0)
    return Rollout(
        sequences=sequences,
        attention_mask=torch.cat([prompt_mask, completion_mask.long()], dim=1),
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        texts=tokenizer.batch_decode(completion_ids),
    )


def completion_logits(model: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """The logits (B, T + 1, V) that predict the completion; the loss ignores the last position."""
    return model(
        input_ids=rollout.sequences,
        attention_mask=rollout.attention_mask,
        logits_to_keep=rollout.completion_ids.shape[1] + 1,
        use_cache=False,
    ).logits


def train(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[tuple[str, str]],
    options: DemoOptions,
) -> Iterator[dict[str, float]]:
    """GRPO: trains `model` in place and yields the metrics of each step."""
    reference = copy.deepcopy(model).to(accelerator.device).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, options.steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    policy = accelerator.unwrap_model(model)
    chooser = random.Random(options.seed)

    for step in range(1, options.steps + 1):
        started = time.perf_counter()

        prompts, answers = zip(*chooser.choices(problems, k=options.prompts_per_step), strict=True)
        rollout = roll_out(policy, tokenizer, prompts, options.num_generations)

        answers = [answer for answer in answers for _ in range(options.num_generations)]
        rewards = [reward_of(*pair) for pair in zip(rollout.texts, answers, strict=True)]
        rewards = torch.tensor(rewards, device=accelerator.device)  # (B,)
        advantages = outcome_advantages(rewards, options.num_generations)  # (B,)

        with torch.no_grad():
            ref_logps, _ = selective_log_softmax(
                completion_logits(reference, rollout),
                rollout.completion_ids,
                rollout.completion_mask,
            )
        old_logps = None  # the first update is on policy, later ones clip ratios to its logps
        updates = []
        for _ in range(options.num_iterations):
            out = grpo_loss(
                completion_logits(model, rollout),
                rollout.completion_ids,
                rollout.completion_mask,
                advantages,
                old_logps=old_logps,
                ref_logps=ref_logps,
                loss_type=options.loss_type,
                beta=options.beta,
                max_completion_length=ANSWER_LENGTH,
                compute_entropy=True,
            )
            accelerator.backward(out.loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            old_logps = out.logps if old_logps is None else old_logps
            updates.append({"loss": out.loss.detach(), **out.metrics})
        schedule.step()

        metrics = {
            "step": step,
            "reward": rewards.mean().item(),
            "reward_std": rewards.view(-1, options.num_generations).std(dim=1).mean().item(),
        }
        for name in ("loss", "kl", "entropy", "clip_ratio/region_mean"):
            metrics[name] = torch.stack([update[name] for update in updates]).mean().item()
        metrics["seconds"] = time.perf_counter() - started
        yield metrics


def run_demo(options: DemoOptions) -> int:
    """Trains; writes metrics.jsonl as it goes, then reward.png and checkpoint/.

    Returns:
        The exit code: 0, or 130 if Ctrl-C ended the training (then all is saved as it stood).
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    set_seed(options.seed)
    accelerator = Accelerator()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train_problems, held_out_problems = make_problems()
    print(f"{model.num_parameters():,} weights on {accelerator.device}, loss {options.loss_type}")

    output_dir = options.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    history: list[dict[str, float]] = []
    interrupted = False
    try:
        with (
            open(output_dir / "metrics.jsonl", "w", buffering=1) as log,  # a crash loses no line
            tqdm(total=options.steps, dynamic_ncols=True) as bar,
        ):
            for metrics in train(accelerator, model, tokenizer, train_problems, options):
                log.write(json.dumps(metrics) + "\n")
                history.append(metrics)
                bar.set_postfix_str(
                    "reward {reward:.2f}, loss {loss:+.3f}, KL {kl:.2f}, entropy {entropy:.2f}, "
                    "clipped {clip_ratio/region_mean:.1%}".format_map(metrics),
                    refresh=False,
                )
                bar.update()
    except KeyboardInterrupt:
        interrupted = True

    save_checkpoint(model, tokenizer, output_dir / "checkpoint")
    plot(history, output_dir / "reward.png", f"larger digit, {options.loss_type} loss")
    saved = f"saved metrics.jsonl, reward.png and checkpoint/ in {output_dir}"
    if interrupted:
        print(f"interrupted after {len(history)} of {options.steps} steps; {saved}")
        return 130

    prompts, answers = zip(*held_out_problems, strict=True)
    texts = roll_out(model, tokenizer, prompts, do_sample=False).texts
    right = [reward_of(*pair) for pair in zip(texts, answers, strict=True)]
    first, last = history[:10], history[-10:]
    print(saved)
    print(f"held-out accuracy: {sum(right) / len(right):.2f} ({len(right)} prompts, greedy)")
    print(
        f"mean reward: {mean_reward(first):.2f} (first {len(first)} steps)"
        f" -> {mean_reward(last):.2f} (last {len(last)} steps)"
    )
    return 0


def save_checkpoint(model: PreTrainedModel, tokenizer, directory: Path) -> None:
    """Writes what `from_pretrained` loads; an older checkpoint stays until the new one is whole."""
    unfinished = directory.with_name(directory.name + ".tmp")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(unfinished, directory)


def mean_reward(history: list[dict[str, float]]) -> float:
    return sum(metrics["reward"] for metrics in history) / len(history)


def plot(history: list[dict[str, float]], path: Path, title: str, window: int = 20) -> None:
    """Draws reward and entropy by step."""
    names = ("step", "reward", "entropy")
    steps, rewards, entropies = ([metrics[name] for metrics in history] for name in names)
    running = [mean_reward(history[max(0, i - window) : i]) for i in range(1, len(history) + 1)]

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot(steps, rewards, color="#9ecae1", linewidth=1, label="one step")
    top.plot(steps, running, color="#08519c", linewidth=2, label=f"mean of the last {window} steps")
    top.set(ylabel="mean reward", ylim=(-0.02, 1.02))
    top.set_title(title, loc="left")
    top.legend(loc="lower right", frameon=False)
    bottom.plot(steps, entropies, color="#a63603")
    bottom.set(xlabel="step", ylabel="entropy (nats)")
    bottom.set_ylim(bottom=0)
    figure.align_ylabels()
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)

    unfinished = path.with_name(path.name + ".tmp")
    figure.savefig(unfinished, format="png", dpi=150)
    os.replace(unfinished, path)
