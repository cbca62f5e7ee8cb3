"""Gradients of one optimizer step, and the checks that run on each of two ranks."""

import os
import random
import signal

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from trainer_runs import HELD_OUT, RewardScores, partial_credit, trainer_of, weights_of

from grpo_fused import GRPOTrainerConfig
from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.collect import collect, score
from grpo_fused.trainer.ranks import Ranks
from grpo_fused.trainer.reference import Reference, trainable_parameters
from grpo_fused.trainer.rewards import Rewards
from grpo_fused.trainer.rollouts.sampler import Sampler
from grpo_fused.trainer.run.checkpoint import list_checkpoints
from grpo_fused.trainer.run.data import split_columns
from grpo_fused.trainer.run.evaluation import evaluate
from grpo_fused.trainer.run.signals import StopSignals

T = 7
# 4 prompts x 4 completions of 1 to 7 tokens; KL, entropy bonus and masked rows are all in it.
STEP = {"max_completion_length": T, "beta": 0.3, "entropy_coef": 0.02, "num_iterations": 2}
STEP |= {"mask_truncated_completions": True, "max_grad_norm": 0.0}


def sampled(prompts, trainer):
    """Draws completions that depend only on the prompt and the position in its group."""
    completions, seen = [], {}
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, -1) + 1
        draw = random.Random(f"{prompt} {seen[prompt]}")
        ids = [draw.randrange(2, 14) for _ in range(draw.randrange(0, T))]
        completions.append(ids + [draw.randrange(1, 3)])  # 1 is the end token
    return {"completion_ids": completions}


def by_length(prompts, completions, completion_ids, columns):
    totals = torch.tensor([float(sum(ids) % 5) for ids in completion_ids])
    return RewardScores(totals, {"mod": totals})


def step_gradients(trainer):
    """(gradients by name, experience, metrics) of one off-policy step that is not applied."""
    experience = collect(trainer)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.unwrapped.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trainer.optimizer.step = trainer.optimizer.zero_grad = lambda: None
    trainer.scheduler.step = lambda: None
    with StopSignals() as signals:
        metrics, _ = trainer.update(experience, signals)
    gradients = {name: p.grad.clone() for name, p in trainer.unwrapped.named_parameters()}
    return gradients, experience, metrics


def gradients_of(folder, loss_type, **options):
    trainer, _ = trainer_of(
        folder,
        rewards=by_length,
        rollout_fn=sampled,
        loss_type=loss_type,
        **{**STEP, **options},
    )
    return *step_gradients(trainer), trainer


def close(gradients, expected, tolerance):
    """Compares gradients relative to the largest of all: those of one tensor may cancel."""
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (gradients[name] - gradient).abs().max()
        assert error <= tolerance * largest, (name, float(error / largest))


def run_rank(rank, folder, port, expected):
    """All checks of two ranks: starting the ranks takes longer than the checks."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for i, loss_type in enumerate(expected):
        gradients, _, metrics, _ = gradients_of(
            f"{folder}/{rank}", loss_type, micro_batch_size=(8, 3)[i % 2]
        )
        close(gradients, expected[loss_type]["gradients"], 1e-6)
        for name, value in expected[loss_type]["metrics"].items():
            if "seconds" not in name:
                assert abs(metrics[name] - value) <= 1e-4 * max(1, abs(value)), name
    refreshes_from_shards()
    keeps_sharded_adapters()
    resumes_alike(rank, folder, accelerator)
    adapters_stay_alike(folder, accelerator)
    supervision_is_shared(rank, folder)
    dist.destroy_process_group()


def refreshes_from_shards():
    """A reference that every rank holds in full is refreshed from a sharded policy."""
    for mix in (1.0, 0.5):
        torch.manual_seed(0)
        policy, new = make_model(make_tokenizer()), make_model(make_tokenizer())
        reference = Reference(policy, mix)
        expected = [
            p + mix * (q - p) for p, q in zip(policy.parameters(), new.parameters(), strict=True)
        ]
        fully_shard(new)
        reference.refresh(new)
        for mine, wanted in zip(reference.model.parameters(), expected, strict=True):
            torch.testing.assert_close(mine.detach(), wanted.detach())


def keeps_sharded_adapters():
    """A refreshed reference keeps a copy of the adapters; each rank holds and saves its shard."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    policy = get_peft_model(make_model(make_tokenizer()), lora)
    with pytest.raises(ValueError, match="model must not be sharded, got .* as a DTensor"):
        Ranks(Accelerator(cpu=True), fully_shard(make_model(make_tokenizer())))
    reference, ids = Reference(policy), torch.arange(5)[None]
    fully_shard(policy)
    before = policy(input_ids=ids).logits.detach()
    reference.refresh(policy)
    with torch.no_grad():
        for parameter in trainable_parameters(policy):
            parameter.mul_(-2.0)
    after = policy(input_ids=ids).logits.detach()
    assert not torch.allclose(after, before)
    again = Reference(policy)
    again.load_state_dict(reference.state_dict(), policy)
    assert all(not isinstance(tensor, DTensor) for tensor in reference.state_dict())
    register_fsdp_forward_method(policy, "generate")  # as the trainer does
    sampler = Sampler(make_tokenizer(), policy, GRPOTrainerConfig(max_completion_length=2))
    assert len(sampler.generate(policy, [[4]], temperature=1.0)) == 1
    for this in (reference, again):
        with this.activate(policy, policy) as model:
            assert torch.equal(model(input_ids=ids).logits, before)
        assert torch.equal(policy(input_ids=ids).logits, after)


def evaluates_each_row_once(trainer):
    """Five rows on two ranks: the repeated row, which balances the ranks, does not count."""
    trainer.eval_data, trainer.config.eval_batch_size = HELD_OUT[:5], 2
    prompts, columns = split_columns(trainer.eval_data)
    rollout = trainer.sampler.rollout(trainer.unwrapped, prompts, columns, temperature=0.0)
    expected = score(trainer, rollout).total.mean().item()
    assert abs(evaluate(trainer)["eval/reward"] - expected) < 1e-6


def adapters_stay_alike(folder, accelerator):
    """Adapters are equal on both ranks after the reference has switched them off and on."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    options = {"beta": 0.1, "num_iterations": 2, "reference_refresh_rollouts": 1}
    trainer, records = trainer_of(f"{folder}/lora", peft_config=lora, **options)
    trainer.train()
    for name, weight in weights_of(trainer).items():
        assert torch.equal(accelerator.gather(weight[None].contiguous())[0], weight), name
    assert records[1]["kl"] > 0 == records[3]["kl"] and records[4]["kl"] > 0


def supervision_is_shared(rank, folder):
    """If one rank alone scores steps, both ranks compute advantages per token."""

    def steps(completion_ids):
        if rank == 0:
            return [float(len(ids)) for ids in completion_ids]
        return [[(0, 1.0), (len(ids) - 1, float(len(ids)))] for ids in completion_ids]

    trainer, _ = trainer_of(f"{folder}/steps", rewards=Rewards(steps))
    batch = collect(trainer).batch
    assert batch.advantages.shape == batch.completion_ids.shape


def resumes_alike(rank, folder, accelerator):
    """Resumes each rank's own experience, also after a signal that one rank received."""
    options = {"num_iterations": 2, "minibatches": 2, "beta": 0.04, "max_steps": 7}
    options |= {"reference_refresh_rollouts": 1}
    whole, expected = trainer_of(f"{folder}/whole", save_steps=1, save_total_limit=None, **options)
    whole.train()
    mine = whole.unwrapped.lm_head.weight.detach().clone()
    assert torch.equal(accelerator.gather(mine[None])[0], mine), "ranks have different weights"
    evaluates_each_row_once(whole)
    for path in list_checkpoints(f"{folder}/whole")[1:6:2]:
        resumed, records = trainer_of(f"{folder}/again", resume=str(path), seed=99, **options)
        resumed.train()
        for step, metrics in records.items():
            assert metrics == expected[step], (path.name, step)
        assert all(torch.equal(weights_of(resumed)[n], w) for n, w in weights_of(whole).items())

    def interrupting(*arguments):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return partial_credit(*arguments)

    stopped, _ = trainer_of(f"{folder}/stopped", rewards=interrupting, **options)
    assert stopped.train()[:2] == (1, signal.SIGTERM)
    resumed, records = trainer_of(f"{folder}/stopped", resume="latest", seed=99, **options)
    resumed.train()
    assert all(records[step] == expected[step] for step in range(2, 8))
