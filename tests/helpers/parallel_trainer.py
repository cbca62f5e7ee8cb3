"""Trainers over ranks, distributed by Accelerate or transformers, against one process.

Rollouts are fixed: completions depend on the prompt and the place in its group. The optimizer is
SGD, for AdamW would turn rounding errors into steps.
"""

import random

import torch
import torch.distributed as dist
from reward_models import first_digit, load_reward_model, pairs_of
from trainer_runs import trainer_of, weights_of
from transformers import AutoModelForCausalLM, DistributedConfig

from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer import Rewards, RewardTraining
from grpo_fused.trainer.order import next_rows
from grpo_fused.trainer.rewards import RewardScores

T = 5
# 12 rows in groups of 4, which straddle two ranks and four.
RUN = {"prompts_per_rollout": 3, "num_generations": 4, "num_iterations": 2, "max_steps": 6}
RUN |= {"max_completion_length": T, "beta": 0.3, "entropy_coef": 0.02, "micro_batch_size": 4}
RUN |= {"reference_refresh_rollouts": 2, "reference_mix": 0.5, "max_grad_norm": 0.05}
RUN |= {"learning_rate": 0.3}
PPO = {"algorithm": "ppo", "loss_type": "ppo", "num_generations": 1, "prompts_per_rollout": 12}
PPO |= {"max_steps": 4, "reference_refresh_rollouts": None, "reference_mix": 1.0}
PPO |= {"critic_learning_rate": 0.03}


def sgd(model, config, learning_rate=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = learning_rate or config.learning_rate
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9, foreach=False)


def fixed(prompts, trainer):
    """Completions of 1 to T tokens."""
    first = trainer.ranks.index * trainer.rows_per_rank
    completions = []
    for place, (prompt, row) in enumerate(zip(prompts, next_rows(trainer), strict=True)):
        assert row["prompt"] == prompt
        draw = random.Random(f"{prompt} {(first + place) % 4}")
        completions.append([draw.randrange(2, 14) for _ in range(draw.randrange(0, T))] + [1])
    return {"completion_ids": completions}


def by_tokens(prompts, completions, completion_ids, columns):
    totals = torch.tensor([float(sum(ids) % 5) for ids in completion_ids])
    return RewardScores(totals, {"mod": totals})


def by_parity(prompts, completions, completion_ids, columns):
    """Rewards of which some groups are equal, by the prompt."""
    pairs = zip(prompts, completion_ids, strict=True)
    totals = torch.tensor([float(len(ids) % 2) * (p[0] > "3") for p, ids in pairs])
    return RewardScores(totals, {"parity": totals})


DYNAMIC = {"rewards": by_parity, "dynamic_sampling_rounds": 4}


def trainer_on(folder, model=None, **options):
    """(trainer, records) of a run; the caller has put `sgd` in the place of AdamW."""
    given = {"rewards": by_tokens, "rollout_fn": fixed, "loss_type": "gspo"} | RUN | options
    return trainer_of(folder, model=model, **given)


def reward_run(folder, kind, output, seed=None, history=None, **options):
    """(trainer, records) of a run whose reward is a reward model that is trained further.

    Args:
        folder: of "start" and "reward", the policy and the reward model.
        kind: as in `load_start`.
        output: folder of the run.
        seed: of other weights of the reward model.
        history: pairs to replay.
    """
    model = load_reward_model(folder / "reward", seed)
    training = RewardTraining(model, first_digit, pairs_of(20) if history is None else history)
    options |= {"rewards": Rewards(model, training=training), "beta": 0.0}
    options |= {"iterations": 3, "reference_refresh_rollouts": None, "reference_mix": 1.0}
    options |= {"reward_learning_rate": 0.1, "reward_batch_size": 5}
    return trainer_on(output, load_start(folder / "start", kind), **options)


def save_start(folder):
    """The model that all runs start from, for `from_pretrained`."""
    torch.manual_seed(3)
    make_model(make_tokenizer()).save_pretrained(folder)


def load_start(folder, kind, dtype=torch.float32):
    config = {
        "one": None,
        "ddp": None,
        "tp": DistributedConfig(tp_size=2),
        "fsdp": DistributedConfig(fsdp_size=2),
        "2x2": DistributedConfig(tp_size=2, fsdp_size=2) if dist.is_initialized() else None,
    }[kind]
    options = {"dtype": dtype, "distributed_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def full_weights(trainer):
    """{name: weight} of the whole model, without the names of wrappers."""
    found = weights_of(trainer)
    return {n: w.full_tensor() if hasattr(w, "full_tensor") else w for n, w in found.items()}


def result(trainer, records):
    """What runs are compared by: {"records": by step, "weights": by name}."""
    return {"records": records, "weights": full_weights(trainer)}
