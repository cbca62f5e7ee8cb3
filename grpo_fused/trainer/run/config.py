"""Settings of a training run: meaning, unit, default and accepted values of each."""

from dataclasses import dataclass, replace
from typing import Any

from grpo_fused import LOSSES
from grpo_fused.advantages import SCALES
from grpo_fused.corrections import LEVELS, MODES
from grpo_fused.losses.kl import KL_ESTIMATORS
from grpo_fused.losses.objectives import LEVELS as RATIO_LEVELS
from grpo_fused.trainer.rollouts.generation import leaves_out, reweights
from grpo_fused.trainer.run.config_checks import check_settings
from grpo_fused.trainer.run.options import check_options, option

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")
BASELINES = ("group", "leave_one_out", "length", "batch")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
REWARD_KL_ESTIMATORS = tuple(name for name in KL_ESTIMATORS if not name.endswith("+"))
ROUNDING = "gradients are the same up to rounding"  # after a change in a resumed run


@dataclass(kw_only=True)
class GRPOTrainerConfig:
    """Settings of `GRPOTrainer`; the model, the data and the rewards are arguments of its own.

    A rollout consists of `prompts_per_rollout` prompts with `num_generations` completions each,
    over all ranks. It is split into `minibatches`; each gives one optimizer step, and
    `num_iterations` passes are made over them. A minibatch is processed in micro-batches of
    `micro_batch_size` sequences per rank, which affects memory and time but not the gradient.
    Fields named as in TRL mean the same as in TRL.

    Raises:
        ValueError: a field has an unsupported value; fields are incompatible with each other.
    """

    # The run
    output_dir: str = option(
        "runs/train", "folder for checkpoints, metrics and tracker files", mutable_on_resume=True
    )
    max_steps: int = option(500, "total number of optimizer steps", low=1)
    seed: int = option(0, "seed of new weights, prompt order and sampling", low=0, high=2**32 - 1)
    shuffle: bool = option(
        True, "take the rows in another order in every epoch; false: in the order of the data"
    )
    shuffle_buffer_size: int = option(
        1000, "rows that the next row of a shuffled data stream is drawn from", low=1
    )

    # The batch
    prompts_per_rollout: int = option(8, "prompts per rollout, over all ranks", low=1)
    num_generations: int = option(8, "completions per prompt: the group size", low=1)
    minibatches: int = option(1, "optimizer steps per pass over a rollout", low=1)
    num_iterations: int = option(1, "passes over each rollout (mu in the GRPO paper)", low=1)
    micro_batch_size: int = option(
        8, "sequences per rank in one forward and backward pass", low=1, mutable_on_resume=ROUNDING
    )
    generation_batch_size: int | None = option(
        None,
        "sequences per rank sampled at once; none: the whole rollout",
        low=1,
        mutable_on_resume="later samples are others than without the change",
    )

    # Sampling
    max_prompt_length: int | None = option(
        None, "tokens to keep at the end of a longer prompt; none: prompts are not truncated", low=1
    )
    max_completion_length: int = option(256, "maximum number of sampled tokens", low=1)
    temperature: float = option(
        1.0, "temperature of sampling and of the policy in the loss", above=0
    )
    top_p: float = option(1.0, "probability mass of nucleus sampling; 1: off", above=0, high=1)
    top_k: int = option(0, "number of most probable tokens to sample from; 0: all", low=0)
    min_p: float | None = option(
        None, "minimum probability relative to the most probable token; none: off", low=0, high=1
    )
    repetition_penalty: float = option(
        1.0,
        "divides logits of tokens that occurred before; 1: off. Another distribution than the "
        "policy's, which rollout_correction weights",
        above=0,
    )
    stop_strings: list[str] = option(
        [],
        "text that ends a completion, in addition to the end token and to the stop_strings of the "
        "model's generation config",
    )
    generation_kwargs: dict[str, Any] = option(
        {},
        "further settings of transformers' GenerationConfig, as {min_new_tokens: 4}; those that "
        "the loss would be wrong with are refused",
    )
    chat_template_kwargs: dict[str, Any] = option(
        {},
        "arguments of the chat template, as {enable_thinking: false}; a column of this name takes "
        "precedence",
    )
    mask_truncated_completions: bool = option(
        False, "exclude completions that reach max_completion_length from the loss (DAPO)"
    )
    skip_special_tokens: bool = option(
        True, "leave special tokens, the end token too, out of the text that rewards and tables see"
    )
    dynamic_sampling_rounds: int = option(
        1,
        "rounds of prompts_per_rollout prompts to draw at most until as many groups have rewards "
        "that differ (dynamic sampling, DAPO); 1: every group is trained on",
        low=1,
    )

    # The algorithm, and the critic of PPO
    algorithm: str = option(
        "grpo",
        "grpo: advantages from groups; ppo: from a critic, with the KL penalty in the rewards",
        choices=("grpo", "ppo"),
    )
    critic: str = option(
        "copy",
        "copy: a model of its own, which starts as a copy of the policy; shared: a value head on "
        "the policy's trunk",
        choices=("copy", "shared"),
    )
    critic_model: str | None = option(
        None, "token classifier with one label to start the critic from; none: the policy"
    )
    critic_learning_rate: float | None = option(
        None, "peak learning rate of a critic of its own; none: learning_rate", low=0
    )
    value_coef: float = option(0.1, "weight of the value loss of a shared critic", low=0)
    value_cliprange: float = option(
        0.2, "how far values move from those of the rollout before they are clipped", above=0
    )
    gae_gamma: float = option(1.0, "discount factor of PPO's rewards", low=0, high=1)
    gae_lambda: float = option(0.95, "lambda of generalised advantage estimation", low=0, high=1)
    reward_kl_estimator: str = option(
        "k1", "estimator of the KL penalty in PPO's rewards", choices=REWARD_KL_ESTIMATORS
    )

    # Rollouts from vLLM servers (rollout_source vllm)
    rollout_source: str = option(
        "generate",
        "who samples: generate of the policy itself, or vllm, the servers at vllm_servers",
        choices=("generate", "vllm"),
    )
    vllm_servers: list[str] = option(
        [],
        "addresses of vLLM servers, which share the prompts, as http://host:8000",
        mutable_on_resume=True,
    )
    vllm_model: str | None = option(
        None, "name of the model on the servers; none: their first", mutable_on_resume=True
    )
    vllm_sync: str = option(
        "folder",
        "how servers get new weights: from a folder, as adapters in a folder, or over nccl",
        choices=("folder", "adapter", "nccl"),
        mutable_on_resume=True,
    )
    vllm_folder: str | None = option(
        None,
        "folder for weights, which servers see under the same path; none: served/ in output_dir",
        mutable_on_resume=True,
    )
    vllm_start_timeout: float = option(
        300.0, "seconds to wait for servers that are starting", low=0, mutable_on_resume=True
    )
    vllm_timeout: float = option(
        600.0,
        "seconds to wait for the completions of a prompt, or for a step of a weight sync",
        above=0,
        mutable_on_resume=True,
    )
    vllm_retries: int = option(
        3,
        "times to repeat a request for completions after a fault that may pass, 1, 2, 4, ... "
        "seconds later",
        low=0,
        mutable_on_resume=True,
    )

    # Rewards and advantages
    soft_punish_cache: int | None = option(
        None,
        "tokens before max_completion_length in which the reward falls linearly by 1 (soft "
        "overlong punishment, DAPO); none: no punishment",
        low=1,
    )
    reward_step_separator: str = option(
        "\n", "text that ends a step, for a reward model that scores steps; default: a new line"
    )
    scale_rewards: str = option(
        "group",
        "divide centred rewards by the standard deviation of the group or batch, by that of the "
        "centred rewards of the batch (REINFORCE++), by the group's mean (MaxRL), or not at all",
        choices=SCALES,
    )
    baseline: str = option(
        "group",
        "subtract the mean of the group, of its others (RLOO), of its tokens (length: OPO), or of "
        "the batch, which then is the one group (REINFORCE++)",
        choices=BASELINES,
    )
    multi_objective_aggregation: str = option(
        "sum_then_normalize",
        "normalize_then_sum: normalise every reward on its own before they are weighted (GDPO)",
        choices=AGGREGATIONS,
    )
    pass_at_k: int | None = option(
        None, "advantages for pass@k, of rewards that are 0 or 1; none: of each completion", low=1
    )

    # The loss
    loss_type: str = option("dapo", "a key of grpo_fused.LOSSES", choices=tuple(LOSSES))
    objective: dict[str, float] = option(
        {}, "parameters of the loss's objective that replace its defaults, as {epsilon_low: 0.1}"
    )
    importance_sampling_level: str | None = option(
        None, "level of the importance ratio; none: the level of the loss", choices=RATIO_LEVELS
    )
    beta: float = option(0.0, "weight of the KL penalty; 0: no reference model", low=0)
    kl_estimator: str = option("k3", "estimator of the KL penalty", choices=tuple(KL_ESTIMATORS))
    use_bias_correction_kl: bool = option(
        False, "multiply the KL penalty by the importance ratio, including its gradient"
    )
    entropy_coef: float = option(0.0, "weight of the entropy bonus", low=0)
    loss_input: str = option(
        "hidden",
        "hidden: the LM head is fused into the loss and the full logits never exist; logits: for "
        "heads that cannot be fused",
        choices=("hidden", "logits"),
        mutable_on_resume=ROUNDING,
    )

    # Rollout correction, for a rollout_fn or server that returns the sampler's log-probabilities
    rollout_correction: str | None = option(
        "truncate", "handling of correction weights out of bounds; none: no weights", choices=MODES
    )
    rollout_correction_level: str = option(
        "token", "level of the correction weights", choices=LEVELS
    )
    rollout_correction_cap: float = option(3.0, "upper bound of the correction weights", above=0)
    rollout_correction_floor: float | None = option(
        None, "lower bound of the correction weights; none: 0", low=0
    )

    # The reference model (beta > 0)
    reference_refresh_rollouts: int | None = option(
        None, "rollouts between refreshes of the reference model; none: never refreshed", low=1
    )
    reference_mix: float = option(
        1.0,
        "weight of the policy in a refreshed reference; below 1: a moving average",
        above=0,
        high=1,
    )

    # Iterations (iterative GRPO)
    iterations: int = option(
        1,
        "parts of the run, of equally many rollouts; all but the first begin by setting the "
        "reference to the policy and training the reward model further",
        low=1,
    )
    replay_fraction: float = option(
        0.1, "share of pairs of earlier iterations in the training of the reward model", low=0
    )
    replay_size: int = option(
        10_000, "pairs of earlier iterations to keep, a uniform sample of all", low=1
    )
    reward_learning_rate: float = option(
        1e-5, "learning rate of the reward model; otherwise its AdamW is that of the policy", low=0
    )
    reward_batch_size: int = option(
        16, "pairs in one optimizer step of the reward model, over all ranks", low=1
    )
    reward_epochs: int = option(1, "passes of the reward model over its pairs", low=1)

    # The optimizer
    learning_rate: float = option(1e-6, "peak learning rate of AdamW", low=0)
    adam_betas: list[float] = option([0.9, 0.999], "decay rates of AdamW's two moments")
    weight_decay: float = option(0.0, "weight decay of AdamW", low=0)
    master_weights: bool = option(
        True,
        "keep float32 copies of bfloat16 or float16 weights in the optimizer; without them small "
        "steps are rounded away",
    )
    max_grad_norm: float = option(1.0, "gradient norm to clip at; 0: no clipping", low=0)
    lr_scheduler_type: str = option("constant", "learning rate schedule", choices=SCHEDULES)
    warmup_steps: int = option(0, "optimizer steps of linear warmup from 0", low=0)

    # Memory and precision
    mixed_precision: str = option("no", "autocast precision of forward passes", choices=PRECISIONS)
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass", mutable_on_resume=ROUNDING
    )
    disable_dropout: bool = option(
        True, "turn dropout off, so that an unchanged policy has ratio 1 to itself"
    )

    # Checkpoints
    resume: str | None = option(
        None,
        "checkpoint folder, or latest: the newest complete checkpoint in output_dir, if any",
        mutable_on_resume=True,
    )
    save_steps: int | None = option(
        100,
        "optimizer steps between checkpoints; none: only when a signal stops the run",
        low=1,
        mutable_on_resume=True,
    )
    save_total_limit: int | None = option(
        2, "number of newest checkpoints to keep; none: all", low=1, mutable_on_resume=True
    )

    # Evaluation and logs
    eval_steps: int | None = option(
        None,
        "optimizer steps between evaluations on held-out rows; none: no evaluation",
        low=1,
        mutable_on_resume=True,
    )
    eval_batch_size: int = option(
        32, "held-out rows per rank sampled at once", low=1, mutable_on_resume=True
    )
    eval_temperature: float = option(
        0.0, "sampling temperature of the evaluation; 0: greedy", low=0, mutable_on_resume=True
    )
    completions_steps: int | None = option(
        None, "rollouts between tables of completions; none: no tables", low=1,
        mutable_on_resume=True,
    )  # fmt: skip
    completions_rows: int = option(8, "completions per table", low=1, mutable_on_resume=True)
    report_to: list[str] = option(
        ["tensorboard"],
        "trackers of Accelerate, such as wandb or trackio; [] or none: no tracker",
        mutable_on_resume=True,
    )
    progress_bar: bool = option(True, "show a progress bar", mutable_on_resume=True)

    # The Hub
    push_to_hub: bool = option(
        False, "upload model/ to the Hugging Face Hub when the run is complete",
        mutable_on_resume=True,
    )  # fmt: skip
    hub_model_id: str | None = option(
        None, "repository to upload to, as user/name; none: the name of output_dir",
        mutable_on_resume=True,
    )  # fmt: skip
    hub_private_repo: bool | None = option(
        None, "whether a new repository is private; none: as the account's default",
        mutable_on_resume=True,
    )  # fmt: skip

    def __post_init__(self):
        if self.report_to in ("none", ["none"]):  # as transformers accepts
            self.report_to = []
        check_options(self)
        check_settings(self)

    @property
    def refresh_rollouts(self) -> int | None:
        """Rollouts of an iteration, after which reference and reward model are refreshed."""
        if self.iterations == 1:
            return self.reference_refresh_rollouts
        return self.max_steps // (self.iterations * self.steps_per_rollout)

    @property
    def objective_or_default(self) -> Any:
        """The objective of the loss, with the parameters in `objective`."""
        return replace(LOSSES[self.loss_type].objective, **self.objective)

    @property
    def has_own_critic(self) -> bool:
        """Whether PPO trains a critic that is not a part of the policy."""
        return self.algorithm == "ppo" and self.critic == "copy"

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps taken on each rollout."""
        return self.minibatches * self.num_iterations

    @property
    def has_filters(self) -> bool:
        """Whether `generate` samples from a part of the vocabulary."""
        filters = self.top_k or self.top_p < 1 or self.min_p
        return bool(filters) or leaves_out(self.generation_kwargs)

    @property
    def has_penalties(self) -> bool:
        """Whether `generate` samples kept tokens with other probabilities than the policy's."""
        return self.repetition_penalty != 1 or reweights(self.generation_kwargs)

    @property
    def is_off_policy(self) -> bool:
        """Whether some optimizer steps train a policy that has changed since it sampled."""
        return self.steps_per_rollout > 1
