"""Every setting of a training run: its unit, what it means, which values it takes."""

from dataclasses import dataclass, fields, replace

from grpo_fused import LOSSES
from grpo_fused.advantages import SCALES
from grpo_fused.checks import nearest
from grpo_fused.corrections import LEVELS, MODES
from grpo_fused.divergences import DIVERGENCES
from grpo_fused.objectives import LEVELS as RATIO_LEVELS
from grpo_fused.trainer.options import check_field, option
from grpo_fused.validation import check_objective

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class GRPOTrainerConfig:
    """What `GRPOTrainer` does, apart from the model, data and rewards that it is given.

    A rollout is `prompts_per_rollout` prompts with `num_generations` completions each, over all
    ranks. It is cut into `minibatches`, each one optimizer step, `num_iterations` times over; a
    minibatch is cut into micro-batches of `micro_batch_size` sequences per rank, which changes
    memory and time, not the gradient. Fields that bear a peer's name mean what they mean there.

    Raises:
        ValueError: a value that a field does not take, named with what it takes; fields that do
            not fit each other.
    """

    # The run
    output_dir: str = option("runs/train", "folder of checkpoints, metrics and trackers", free=True)
    max_steps: int = option(500, "optimizer steps in all", low=1)
    seed: int = option(0, "of new weights, order of prompts, samples", low=0, high=2**32 - 1)

    # The batch
    prompts_per_rollout: int = option(8, "prompts per rollout, of all ranks together", low=1)
    num_generations: int = option(8, "completions per prompt: the group", low=1)
    minibatches: int = option(1, "optimizer steps that one pass over a rollout is cut into", low=1)
    num_iterations: int = option(1, "passes over each rollout (mu of the GRPO paper)", low=1)
    micro_batch_size: int = option(8, "sequences per rank in one forward and backward", low=1)
    generation_batch_size: int | None = option(
        None, "sequences per rank that are sampled at once; none: all of a rollout", low=1
    )

    # Sampling
    max_prompt_length: int | None = option(
        None, "tokens; longer prompts lose their beginning; none: they are an error", low=1
    )
    max_completion_length: int = option(256, "tokens sampled at most", low=1)
    temperature: float = option(1.0, "of sampling and of the policy in the loss", above=0)
    top_p: float = option(1.0, "nucleus sampling: kept probability; 1: all", above=0, high=1)
    top_k: int = option(0, "tokens kept; 0: all", low=0)
    min_p: float | None = option(
        None, "least probability relative to the most probable token; none: off", low=0, high=1
    )
    mask_truncated_completions: bool = option(
        False, "leave completions that hit max_completion_length out of the loss (DAPO)"
    )

    # Rewards and advantages
    scale_rewards: str = option(
        "group", "what centred rewards are divided by: std of group or batch, none", choices=SCALES
    )

    # The loss
    loss_type: str = option("dapo", "row of grpo_fused.LOSSES", choices=tuple(LOSSES))
    objective: dict[str, float] = option(
        {}, "knobs of the loss's objective that are not its default, as {epsilon_low: 0.1}"
    )
    importance_sampling_level: str | None = option(
        None, "level of the ratio; none: the loss's own", choices=RATIO_LEVELS
    )
    beta: float = option(0.0, "weight of the KL penalty; 0: no reference model is kept", low=0)
    kl_estimator: str = option("k3", "of the KL penalty", choices=tuple(DIVERGENCES))
    use_bias_correction_kl: bool = option(False, "multiply the KL by the ratio, with its gradient")
    entropy_coef: float = option(0.0, "weight of the entropy bonus", low=0)
    loss_input: str = option(
        "hidden", "hidden: logits are never held; logits: for heads that cannot be fused",
        choices=("hidden", "logits"),
    )  # fmt: skip

    # Rollout correction, for a rollout_fn that returns the sampler's log-probabilities
    rollout_correction: str | None = option(
        "truncate", "what is done to weights beyond the bounds; none: no weights", choices=MODES
    )
    rollout_correction_level: str = option("token", "level of those weights", choices=LEVELS)
    rollout_correction_cap: float = option(3.0, "largest weight", above=0)
    rollout_correction_floor: float | None = option(None, "smallest weight; none: 0", low=0)

    # The reference model (beta > 0)
    reference_refresh_rollouts: int | None = option(
        None, "rollouts after which the reference becomes the policy; none: never", low=1
    )
    reference_mix: float = option(
        1.0,
        "share of the policy in a refreshed reference; below 1: a mean",
        above=0,
        high=1,
    )

    # The optimizer
    learning_rate: float = option(1e-6, "of AdamW, at its highest", low=0)
    adam_betas: list[float] = option([0.9, 0.999], "decays of AdamW's two moments", low=0)
    weight_decay: float = option(0.0, "of AdamW", low=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to it; 0: never", low=0)
    lr_scheduler_type: str = option("constant", "course of the learning rate", choices=SCHEDULES)
    warmup_steps: int = option(0, "optimizer steps over which it rises from 0", low=0)

    # Memory and precision
    mixed_precision: str = option("no", "of forward passes (autocast)", choices=PRECISIONS)
    gradient_checkpointing: bool = option(False, "compute activations again in backward")
    disable_dropout: bool = option(True, "dropout makes a policy differ from itself: ratios not 1")

    # Checkpoints
    resume: str | None = option(
        None, "checkpoint folder, or latest: the newest whole one of output_dir, if any", free=True
    )
    save_steps: int | None = option(
        100, "optimizer steps between checkpoints; none: none but at a signal", low=1, free=True
    )
    save_total_limit: int | None = option(
        2, "checkpoints kept, the newest; none: all", low=1, free=True
    )

    # Evaluation and logs
    eval_steps: int | None = option(
        None, "optimizer steps between evaluations on held-out rows; none: never", low=1, free=True
    )
    eval_batch_size: int = option(32, "held-out rows per rank completed at once", low=1, free=True)
    eval_temperature: float = option(0.0, "of evaluation; 0: greedy", low=0, free=True)
    completions_steps: int | None = option(
        None, "rollouts between tables of completions; none: never", low=1, free=True
    )
    completions_rows: int = option(8, "completions in a table", low=1, free=True)
    report_to: list[str] = option(
        ["tensorboard"], "trackers of Accelerate, as wandb or trackio; [] or none: none", free=True
    )
    progress_bar: bool = option(True, "show one", free=True)

    def __post_init__(self):
        if self.report_to in ("none", ["none"]):  # as transformers has it
            self.report_to = []
        for this in fields(self):
            check_field(this, getattr(self, this.name))
        check_objective_knobs(self.loss_type, self.objective)
        level = self.importance_sampling_level or LOSSES[self.loss_type].level
        check_objective(self.objective_or_default, level)
        if len(self.adam_betas) != 2 or max(self.adam_betas) >= 1:
            raise ValueError(f"adam_betas must be two numbers below 1, got {self.adam_betas}")
        rows = self.prompts_per_rollout * self.num_generations
        if rows % self.minibatches:
            raise ValueError(
                f"minibatches must divide prompts_per_rollout x num_generations = {rows}, "
                f"got {self.minibatches}"
            )
        floor, cap = self.rollout_correction_floor, self.rollout_correction_cap
        if floor is not None and floor >= cap:
            raise ValueError(
                f"rollout_correction_floor must be below rollout_correction_cap = {cap}, "
                f"got {floor}"
            )
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            other = "another lr_scheduler_type, as constant_with_warmup"
            raise ValueError(f"warmup_steps wants {other}, got {self.warmup_steps} with constant")
        if self.reference_mix < 1 and not self.reference_refresh_rollouts:
            when = "reference_refresh_rollouts, after which the reference moves"
            raise ValueError(
                f"reference_mix below 1 wants {when}, got {self.reference_mix} without"
            )
        if self.reference_refresh_rollouts and not self.beta:
            raise ValueError(
                "reference_refresh_rollouts wants beta > 0: without it there is no reference, "
                f"got {self.reference_refresh_rollouts} with beta {self.beta}"
            )

    @property
    def objective_or_default(self):
        """The objective of the loss, with the knobs of `objective`."""
        return replace(LOSSES[self.loss_type].objective, **self.objective)

    @property
    def steps_per_rollout(self):
        return self.minibatches * self.num_iterations

    @property
    def is_off_policy(self):
        """Whether some step of a rollout trains a policy that is not the one that sampled."""
        return self.steps_per_rollout > 1


@dataclass(kw_only=True)
class TrainConfig(GRPOTrainerConfig):
    """What `grpo-fused train CONFIG.yaml` reads: the trainer's settings, and what it is given.

    Raises:
        ValueError: as GRPOTrainerConfig; no model, data or rewards.
    """

    model: str = option("", "folder or Hub name of a causal language model of transformers")
    dtype: str = option("float32", "of the model's weights", choices=DTYPES)
    tokenizer: str | None = option(None, "folder or Hub name; none: the model's")
    data: str = option("", "rows: .jsonl, .parquet, .csv, a saved data set, reasoning_gym:TASK")
    eval_data: str | None = option(None, "held-out rows", free=True)
    data_columns: dict[str, str] = option({}, "columns by other names, as {prompt: question}")
    data_split: str = option("train", "of a data set that has several")
    task_rows: int = option(1000, "rows drawn from a reasoning_gym task", low=1)
    system_prompt: str | None = option(None, "makes chats of prompts that are text")
    rewards: list[str] = option(
        [],
        "path.py:function, module:function, math_verify, exact_match, reasoning_gym, a folder",
    )
    reward_weights: list[float] | None = option(None, "one per reward; none: 1 each")
    lora_rank: int = option(0, "rank of LoRA adapters; 0: all weights are trained", low=0)
    lora_alpha: float = option(32.0, "scale of the adapters' product, divided by the rank", above=0)
    lora_target_modules: list[str] | None = option(
        None, "names of adapted layers; none: all linear layers but the head"
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("model", "data", "rewards"):
            if not getattr(self, name):
                raise ValueError(f"{name} is needed, got {getattr(self, name)!r}")
        if self.eval_data and not self.eval_steps:
            raise ValueError(f"eval_data wants eval_steps, got {self.eval_data!r} without")
        if self.lora_target_modules and not self.lora_rank:
            raise ValueError(
                f"lora_target_modules wants lora_rank, got {self.lora_target_modules} with rank 0"
            )
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights must be one per reward, {len(self.rewards)}, "
                f"got {len(self.reward_weights)}"
            )


def check_objective_knobs(loss_type, knobs):
    """Only knobs that the objective of a loss has; it refuses bad values itself."""
    objective = LOSSES[loss_type].objective
    known = [this.name for this in fields(objective)]
    for name in knobs:
        if name not in known:
            raise ValueError(
                f"objective: {loss_type} has {', '.join(known) or 'no knobs'}, got {name!r}"
                f"{nearest(name, known)}"
            )
