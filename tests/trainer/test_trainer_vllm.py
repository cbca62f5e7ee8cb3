"""Rollouts from real vLLM servers on a CPU: `make test-vllm`. Figures go to runs/vllm.json."""

import json
import time
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig
from trainer_runs import ROWS, trainer_of
from vllm_process import PYTHON, Process

from grpo_fused import GRPOTrainerConfig
from grpo_fused.demo import make_model, make_tokenizer, reward_of
from grpo_fused.trainer import GRPOTrainer
from grpo_fused.trainer.collect import collect
from grpo_fused.trainer.rollouts.source import GenerateSource
from grpo_fused.trainer.run.checkpoint import list_checkpoints
from grpo_fused.trainer.run.errors import RolloutError

pytestmark = pytest.mark.skipif(PYTHON is None, reason="a vLLM server: make test-vllm")
FIGURES = Path("runs/vllm.json")


def note(**figures):
    """Adds figures to runs/vllm.json."""
    FIGURES.parent.mkdir(exist_ok=True)
    before = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    FIGURES.write_text(json.dumps(before | figures, indent=1))
    print(figures)


def policy(seed=3, **options):
    """The demo's model, with heads of a size that vLLM has on a CPU."""
    config = make_model(make_tokenizer()).config
    for name, value in {"head_dim": 32, "max_position_embeddings": 128, **options}.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config)


def save(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """(float32, bfloat16): two servers of a model that is not the policy."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("vllm")
    model = save(policy(seed=9), folder / "model")
    lora = ("--enable-lora", "--max-lora-rank", "8")
    pair = [
        Process(model, folder / "float32", "--dtype", "float32", *lora),
        Process(model, folder / "bfloat16", "--dtype", "bfloat16"),
    ]
    yield pair
    for server in pair:
        server.stop()


def served(folder, servers, **options):
    options = {"model": policy(), "vllm_servers": [s.url for s in servers], **options}
    options["vllm_start_timeout"] = 900.0  # a minute, if nothing else runs
    return trainer_of(folder, rollout_source="vllm", **options)


def far(trainer, batch):
    """The largest difference between log-probabilities of a server and of the policy."""
    own = trainer.policy.logps(trainer.unwrapped, batch, over_support=True)
    return (batch.sampling_logps - own)[batch.completion_mask].abs().max().item()


@pytest.mark.parametrize(
    "options",
    [
        {"vllm_sync": "adapter"},  # first: it needs the model that the server started with
        {},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_log_probabilities_are_those_of_transformers_after_every_sync(tmp_path, servers, options):
    began = time.perf_counter()
    if "vllm_sync" in options:
        lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        # Only the adapters travel: the model is that of the server.
        options = {**options, "peft_config": lora, "model": policy(seed=9)}
    trainer, records = served(tmp_path, servers[:1], max_completion_length=16, **options)
    trainer.source.start()
    if "peft_config" in options:
        note(seconds_to_start_two_servers=round(time.perf_counter() - began, 1))
    largest = []
    for trainer.step in range(3):
        largest.append(far(trainer, collect(trainer).batch))
        with torch.no_grad():
            for parameter in trainer.unwrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    kind = {k: v for k, v in options.items() if k not in ("peft_config", "model")}
    note(**{f"largest difference, float32, {kind}": max(largest)})
    assert max(largest) < 2e-5
    assert collect(trainer).batch.versions.max() == 2, "recorded"
    stale = trainer.source.version
    trainer.step = stale  # no sync: the weights are others by now
    assert far(trainer, collect(trainer).batch) > 1e-3


def test_a_server_in_bfloat16(tmp_path, servers):
    trainer, records = served(tmp_path, servers[1:], max_completion_length=16, max_steps=4)
    trainer.train()
    differences = [metrics["rollout/logp_difference"] for metrics in records.values()]
    note(mean_difference_bfloat16=max(differences))
    assert max(differences) < 0.03
    assert records[1]["rollout/weight_mean"] == pytest.approx(1, abs=0.02)


def test_a_policy_with_a_tied_head(tmp_path, servers):
    """The servers serve an untied model, which gets an explicit head."""
    model = policy(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    trainer, records = served(tmp_path, servers[:1], model=model, max_steps=4)
    trainer.train()
    assert max(metrics["rollout/logp_difference"] for metrics in records.values()) < 1e-5


def test_the_task_of_the_demo_is_learned(tmp_path, servers):
    """Through both servers, at 16 prompts of 16 completions."""
    tokenizer = make_tokenizer()

    def reward(completion_ids, answer, **columns):
        return list(map(reward_of, tokenizer.batch_decode(completion_ids), answer))

    config = GRPOTrainerConfig(
        output_dir=str(tmp_path),
        max_steps=300,
        num_iterations=2,
        prompts_per_rollout=16,
        num_generations=16,
        micro_batch_size=256,
        max_completion_length=2,
        learning_rate=1e-3,
        adam_betas=[0.9, 0.99],
        rollout_source="vllm",
        vllm_servers=[server.url for server in servers],
        save_steps=None,
        report_to=[],
        progress_bar=False,
    )
    began = time.perf_counter()
    trainer = GRPOTrainer(policy(), reward, config, ROWS, tokenizer=tokenizer)
    trainer.train()
    history = trainer.run_log.history
    rewards = [line["reward"] for line in history][::2]
    first, last = sum(rewards[:20]) / 20, sum(rewards[-20:]) / 20
    syncs = sorted(line["seconds/sync"] for line in history[::2])
    rollouts = sorted(line["seconds/rollout"] for line in history[::2])
    note(
        demo={
            "reward of the first and last 20 of 150 rollouts": [round(first, 3), round(last, 3)],
            "seconds": round(time.perf_counter() - began, 1),
            "median seconds of a sync": round(syncs[75], 3),
            "median seconds of a rollout with its sync and scoring": round(rollouts[75], 3),
            "largest mean difference": max(line["rollout/logp_difference"] for line in history),
        }
    )
    assert first < 0.2 and last > 0.8


def test_seconds_per_rollout_by_source(tmp_path, servers):
    """64 completions of 32 tokens: 8 prompts of 8."""
    options = {"prompts_per_rollout": 8, "num_generations": 8, "max_completion_length": 32}
    measure(tmp_path, servers[:1], policy(), "76,000 weights", options)


@pytest.mark.slow
def test_seconds_per_rollout_of_a_model_of_135_million_weights(tmp_path):
    size = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, vocab_size=49152)
    size |= dict(num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    size |= dict(layer_types=["full_attention"] * 30, max_window_layers=30)
    model = policy(**size)
    server = Process(save(model, tmp_path / "model"), tmp_path / "log", "--dtype", "float32")
    try:
        options = {"prompts_per_rollout": 8, "num_generations": 8, "max_completion_length": 32}
        measure(tmp_path, [server], model, "163 million weights, untied", options, rounds=2)
    finally:
        server.stop()


def measure(tmp_path, servers, model, name, options, rounds=4):
    """Notes the seconds of both sources, with the policy's threads as the server's: one."""
    trainer, _ = served(tmp_path, servers, model=model, **options)
    trainer.source.start()
    prompts = [ids for ids in trainer.sampler.encode([row["prompt"] for row in ROWS[:8]])] * 8
    trainer.sampler.eos_ids.clear()  # all completions have 32 tokens
    seconds, syncs = {}, []
    for kind, source in (("vllm", trainer.source), ("generate", GenerateSource(trainer))):
        times = []
        for version in range(rounds):
            began = time.perf_counter()
            source.sync(version)
            synced = time.perf_counter()
            found = source.sample(sorted(prompts))
            times.append(time.perf_counter() - synced)
            if kind == "vllm":
                syncs.append(synced - began)
        seconds[kind] = round(min(times[1:]), 2)
        assert [len(ids) for ids in found.completion_ids] == [32] * 64
    seconds["sync"] = round(min(syncs[1:]), 3)
    note(**{f"seconds of a rollout of 64 x 32, {name}": seconds})


def test_a_server_that_is_killed_in_a_rollout(tmp_path, servers):
    """The other takes its prompts; with none left, the steps are in a checkpoint."""
    float32, bfloat16 = servers
    trainer, records = served(tmp_path, servers, max_steps=8, vllm_retries=1)
    complete = trainer.source._ask

    def kill(server, numbers):
        if trainer.step == 2 and server.url == bfloat16.url:
            bfloat16.kill()
        if trainer.step == 5:
            float32.kill()
        return complete(server, numbers)

    trainer.source._ask = kill
    with pytest.warns(UserWarning, match=f"vLLM server {bfloat16.url} is lost: the connection"):
        with pytest.raises(RolloutError, match="no vLLM server is left"):
            trainer.train()
    assert sorted(records) == [1, 2, 3, 4, 5]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5"]
