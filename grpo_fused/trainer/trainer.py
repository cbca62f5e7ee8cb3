"""GRPOTrainer: collects experience, takes optimizer steps on it and refreshes the reference."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)

from grpo_fused.trainer.collect import collect
from grpo_fused.trainer.experience import Experience
from grpo_fused.trainer.policy import Policy, make_optimizer, prepare_model
from grpo_fused.trainer.ranks import Ranks, clip_gradients, explain_lost_rank
from grpo_fused.trainer.reference import Reference, is_peft_model, trainable_parameters
from grpo_fused.trainer.rewards import Rewards
from grpo_fused.trainer.rewards.weighted import RewardFunction, TrainerState
from grpo_fused.trainer.rollouts.rollout_fn import RolloutFn
from grpo_fused.trainer.rollouts.sampler import Sampler
from grpo_fused.trainer.rollouts.source import make_source
from grpo_fused.trainer.run.checkpoint import find_damage, resolve_checkpoint
from grpo_fused.trainer.run.config import GRPOTrainerConfig, tracker_config
from grpo_fused.trainer.run.errors import RolloutError
from grpo_fused.trainer.run.evaluation import evaluate
from grpo_fused.trainer.run.loading import load_model
from grpo_fused.trainer.run.log import RunLog
from grpo_fused.trainer.run.metrics import progress_summary, step_metrics
from grpo_fused.trainer.run.resume_checks import agreed_values, checksum_rows
from grpo_fused.trainer.run.signals import StopSignals
from grpo_fused.trainer.run.state import (
    exclude_frozen_weights,
    load_state,
    save_pretrained,
    save_state,
)
from grpo_fused.trainer.run.validation import (
    check_accelerator,
    check_model,
    check_rows,
    check_trackers,
    count_rows_per_rank,
)

if TYPE_CHECKING:
    from peft import PeftConfig


class TrainResult(NamedTuple):
    """How training ended: the optimizer steps taken, and the signal that stopped it, if any."""

    step: int
    signal: int | None


class GRPOTrainer:
    """Trains a causal language model with GRPO or any other loss in `LOSSES`.

    Args:
        model: a transformers model, or the folder or Hub name of one (loaded in float32). A model
            loaded with a `DistributedConfig` is trained as transformers has distributed it, by
            tensor parallelism, FSDP2 or both; any other is given to the accelerator.
        rewards: one or more reward functions with TRL's signature, or a `Rewards`, which
            documents what they may return.
        config: GRPOTrainerConfig.
        data: training rows, a sequence of dicts: "prompt", a str or a list of messages, and
            columns for the reward functions.
        tokenizer: None = the tokenizer of `model`, which must then be a name.
        eval_data: held-out rows, or None.
        peft_config: PeftConfig of adapters to train; the reference is then the model without
            adapters. A PeftModel as `model` goes on with its adapters, and they are the reference.
        rollout_fn: `rollout_fn(prompts, trainer)`, called instead of `generate`. Each prompt is
            repeated num_generations times, over all ranks. It returns a dict of lists with one
            entry per prompt: "completion_ids"; optionally "prompt_ids", "logprobs" (log-probability
            of each token under the sampler, for rollout correction), "support" (for each token the
            ids that the sampler's top-k, top-p or min-p kept, whose probabilities "logprobs" then
            are; ratios and entropies are over these alone), "completion_mask" or "env_mask" (0 for
            tokens that the policy did not sample), "truncated". Other entries
            become columns for the reward functions. Evaluation always calls `generate`. Every rank
            calls it; of ranks that share a batch, the result of the first counts.
        on_refresh: called with the trainer after the reference was refreshed, for instance to
            train the reward model further (DeepSeekMath, Algorithm 1, line 12). A reward function
            that is an object can collect the completions to train on.
        run_log: writes metrics and tables of completions on the main process, in addition to the
            trackers; None = a `RunLog` in output_dir.
        accelerator: Accelerator to use instead of one with default settings; it then decides on
            the trackers.

    Raises:
        ValueError: there are no rows; the tokenizer has no end token; settings are incompatible
            with the model, the data or the number of ranks.

    Example:
        def exact(completions, answer, **columns):
            return [float(c.strip() == a) for c, a in zip(completions, answer)]

        rows = [{"prompt": "2+2=", "answer": "4"}, ...]
        GRPOTrainer("Qwen/Qwen3-0.6B", exact, GRPOTrainerConfig(beta=0.04), rows).train()

    References:
        DeepSeekMath, https://arxiv.org/abs/2402.03300, Algorithm 1.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        rewards: Rewards | RewardFunction | str | Sequence[RewardFunction | str],
        config: GRPOTrainerConfig,
        data: Sequence[dict[str, Any]],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eval_data: Sequence[dict[str, Any]] | None = None,
        peft_config: "PeftConfig | None" = None,
        rollout_fn: RolloutFn | None = None,
        on_refresh: "Callable[[GRPOTrainer], None] | None" = None,
        run_log: RunLog | None = None,
        accelerator: Accelerator | None = None,
    ):
        check_trackers(config.report_to)
        self.config = config
        self.rewards = rewards if isinstance(rewards, Rewards) else Rewards(rewards)
        self.rewards.trainer_state = TrainerState(self)
        self.rollout_fn, self.on_refresh, self.run_log = rollout_fn, on_refresh, run_log
        self.accelerator = accelerator or Accelerator(
            cpu=not torch.accelerator.is_available(),  # or ranks do not find each other
            mixed_precision=config.mixed_precision,
            log_with=config.report_to or None,
            project_dir=config.output_dir,
        )
        check_accelerator(config, self.accelerator)
        self.data, self.eval_data = check_rows("data", data), None
        if config.eval_steps is not None:
            if eval_data is None:
                raise ValueError(f"eval_steps = {config.eval_steps} requires eval_data, got None")
            self.eval_data = check_rows("eval_data", eval_data)

        set_seed(config.seed)  # initialises adapters alike on every rank
        if isinstance(model, str):
            tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
            model = load_model(model, torch.float32)
        if tokenizer is None:
            raise ValueError("tokenizer is required unless model is a name, got None")
        check_model(model, config)
        self.ranks = Ranks(self.accelerator, model)
        self.ranks.check_agreement(agreed_values(config, data, model))
        self.ranks.check_options(config, peft_config)
        self.rows_per_rank = count_rows_per_rank(config, self.ranks.size)
        self.tokenizer, self.sampler = tokenizer, Sampler(tokenizer, model, config)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        self.reference: Reference | None = None
        if config.beta:
            self.reference = Reference(model, config.reference_mix, self.ranks.distributed)
            if self.reference.model is not None:
                prepare_model(self.reference.model, config)
                self.reference.model.to(self.accelerator.device)
        prepare_model(model, config)
        model.train()  # gradient checkpointing is active in training mode only
        self.policy = Policy(config, model)
        optimizer = make_optimizer(model, config)
        if self.ranks.distributed:
            self.model, self.optimizer = model, self.accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.unwrapped = self.accelerator.unwrap_model(self.model)
        if self.reference is not None and is_peft_model(model) and peft_config is None:
            self.reference.refresh(self.unwrapped)  # its adapters may have been trained before
        if isinstance(self.unwrapped, FSDPModule):  # gathers the root's parameters for generate
            register_fsdp_forward_method(self.unwrapped, "generate")
        self.scheduler = get_scheduler(
            config.lr_scheduler_type,
            getattr(self.optimizer, "optimizer", self.optimizer),
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
        )
        self.frozen_checksum, self.data_checksum = exclude_frozen_weights(self), checksum_rows(data)
        self.step = self.rollouts = self.refreshed = 0
        self.experience: Experience | None = None
        self.source = make_source(self)

    def train(self) -> TrainResult:
        """Trains until max_steps, or until the end of the step in which SIGTERM or SIGINT arrives.

        In both cases it writes `model/` to output_dir, for `from_pretrained`. A signal also writes
        a checkpoint, from which `resume` continues bit-identically (on a GPU, as far as its
        kernels are deterministic).

        Raises:
            ValueError: the checkpoint belongs to another run; a row or a reward is invalid.
            FloatingPointError: a gradient is not finite; the last checkpoint is untouched.
            TrainingError: a checkpoint or `model/` could not be written; a reward function raised;
                another rank stopped.
            RolloutError: all servers of rollouts failed; the steps so far are in a checkpoint.
        """
        set_seed(self.config.seed + self.ranks.index)
        checkpoint = resolve_checkpoint(self.config.resume, self.config.output_dir)
        self.source.start()
        self.accelerator.init_trackers("grpo_fused", tracker_config(self.config))
        if self.run_log is None and self.accelerator.is_main_process:
            self.run_log = RunLog(self.config.output_dir)
        try:
            if checkpoint is not None:
                load_state(self, checkpoint)
            signal = self.run()
            save_pretrained(self)
        except RuntimeError as error:
            if lost := explain_lost_rank(error):
                raise lost from error
            raise
        finally:
            self.source.close()
            if self.accelerator.is_main_process:
                self.run_log.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()  # `end_training` would also end the process group
        return TrainResult(self.step, signal)

    def run(self) -> int | None:
        """Runs the training loop from the current step; returns the signal that stopped it."""
        config = self.config
        show = config.progress_bar and self.accelerator.is_main_process
        bar = tqdm(total=config.max_steps, initial=self.step, disable=not show, dynamic_ncols=True)
        signal = None
        if self.step == 0 and self.eval_data is not None:
            self.log(evaluate(self))
        with StopSignals() as signals, bar:
            while self.step < config.max_steps and not signal:
                if self.experience is None:
                    self.refresh_reference()
                    self.experience = self.collect()
                metrics, signal = self.update(self.experience, signals)
                self.step += 1
                if self.experience.position == config.steps_per_rollout:
                    self.experience = None

                done = self.step == config.max_steps
                due = self.eval_data is not None and (self.step % config.eval_steps == 0 or done)
                if due and not signal:  # a stopped run ends without an evaluation
                    metrics |= evaluate(self)
                self.log(metrics)
                bar.set_postfix_str(progress_summary(metrics), refresh=False)
                bar.update()
                every = config.save_steps
                if signal or (every is not None and (self.step % every == 0 or done)):
                    save_state(self)
        return signal

    def refresh_reference(self) -> None:
        """Refreshes the reference every reference_refresh_rollouts rollouts (iterative GRPO)."""
        every = self.config.reference_refresh_rollouts
        due = every and self.rollouts and self.rollouts % every == 0
        if due and self.refreshed != self.rollouts:  # not again after a rollout that failed
            self.reference.refresh(self.unwrapped)
            if self.on_refresh is not None:
                self.on_refresh(self)
            self.refreshed = self.rollouts

    def collect(self) -> Experience:
        """Collects experience; if its source fails, the steps so far are in a checkpoint."""
        try:
            return collect(self)
        except RolloutError as error:
            if self.step:
                folder = Path(self.config.output_dir, f"checkpoint-{self.step}")
                if self.ranks.from_main(lambda: find_damage(folder)):  # there may be none, too
                    save_state(self)
                raise RolloutError(
                    f"{error}; all {self.step} steps are in {folder}: resume=latest continues"
                ) from error
            raise

    def update(
        self, experience: Experience, signals: StopSignals
    ) -> tuple[dict[str, float], int | None]:
        """Takes one optimizer step on the next minibatch.

        Returns:
            (metrics, signal): dict of floats over all ranks; a signal that any rank received, or
            None.

        Raises:
            FloatingPointError: the gradient is not finite; the step is not applied.
        """
        config, accelerator, started = self.config, self.accelerator, time.perf_counter()
        minibatch = experience.position % config.minibatches
        num_items = experience.num_items[minibatch]
        num_sequences = config.prompts_per_rollout * config.num_generations / config.minibatches
        batches = list(
            experience.micro_batches(minibatch, config.minibatches, config.micro_batch_size)
        )
        sums, max_ratio = 0.0, torch.zeros((), device=accelerator.device)
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            with self.ranks.accumulation(self.model, is_last), self.ranks.autocast():
                output = self.policy.loss(self.model, batch, num_items, num_sequences)
                # Gradients are averaged over data-parallel ranks, but losses are shares of a sum.
                accelerator.backward(output.loss * self.ranks.size)
            sums = sums + output.sums
            max_ratio = torch.maximum(max_ratio, output.metrics["ratio/max"])
        limit = config.max_grad_norm or float("inf")
        if self.ranks.distributed:
            grad_norm = clip_gradients(trainable_parameters(self.model), limit)
        else:
            grad_norm = accelerator.clip_grad_norm_(trainable_parameters(self.model), limit)
        metrics, signal = step_metrics(
            self.ranks, sums, max_ratio, grad_norm, signals.received, self.reference is not None
        )
        has_scaler = accelerator.scaler is not None  # it skips steps that overflowed
        if not has_scaler and not math.isfinite(metrics["grad_norm"]):
            raise FloatingPointError(
                f"grad_norm is {metrics['grad_norm']} in step {self.step + 1}; the step is not "
                "applied"
            )
        metrics["learning_rate"] = self.scheduler.get_last_lr()[0]
        metrics["epoch"] = self.rollouts * config.prompts_per_rollout / len(self.data)
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        experience.position += 1
        metrics["seconds/update"] = time.perf_counter() - started
        return experience.metrics | metrics, signal

    def log(self, metrics: dict[str, float]) -> None:
        """Logs metrics of the last step to the trackers and the run's log."""
        self.accelerator.log(metrics, step=self.step)
        if self.accelerator.is_main_process:
            self.run_log.write(self.step, metrics)
