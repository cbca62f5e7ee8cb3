"""GRPOTrainer: collects experience, takes optimizer steps on it and refreshes the reference."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo_fused.trainer.collect import collect
from grpo_fused.trainer.critic import Critic, add_value_head, load_critic, loss_of_values
from grpo_fused.trainer.experience import Experience
from grpo_fused.trainer.optimizer import make_optimizer, make_scheduler
from grpo_fused.trainer.order import make_order
from grpo_fused.trainer.policy import Policy, make_reference, prepare_model
from grpo_fused.trainer.ranks import Ranks, clip_gradients, explain_lost_rank
from grpo_fused.trainer.reference import is_peft_model, trainable_parameters
from grpo_fused.trainer.rewards import Rewards
from grpo_fused.trainer.rewards.weighted import RewardFunction, TrainerState
from grpo_fused.trainer.rollouts.rollout_fn import RolloutFn
from grpo_fused.trainer.rollouts.sampler import Sampler
from grpo_fused.trainer.rollouts.source import make_source
from grpo_fused.trainer.run.checkpoint import find_damage, resolve_checkpoint
from grpo_fused.trainer.run.config import GRPOTrainerConfig
from grpo_fused.trainer.run.data import check_eval_rows, check_rows
from grpo_fused.trainer.run.errors import RolloutError, TrainingError, explain
from grpo_fused.trainer.run.evaluation import evaluate
from grpo_fused.trainer.run.hub import push_to_hub, warn_without_token
from grpo_fused.trainer.run.loading import load_model
from grpo_fused.trainer.run.log import RunLog, tracker_config
from grpo_fused.trainer.run.metrics import progress_summary, step_metrics
from grpo_fused.trainer.run.resume_checks import agreed_values
from grpo_fused.trainer.run.signals import StopSignals
from grpo_fused.trainer.run.state import (
    exclude_frozen_weights,
    load_state,
    save_pretrained,
    save_state,
)
from grpo_fused.trainer.run.summary import RunSummary, TrainResult
from grpo_fused.trainer.run.validation import (
    check_accelerator,
    check_config,
    check_first_row,
    check_model,
    check_refreshed,
    count_rows_per_rank,
    create_output_dir,
    make_accelerator,
)

if TYPE_CHECKING:
    from datasets import IterableDataset
    from peft import PeftConfig


class GRPOTrainer:
    """Trains a causal language model with GRPO or any other loss in `LOSSES`.

    Args:
        model: a transformers model, or the folder or Hub name of one (loaded in float32). A model
            loaded with a `DistributedConfig` is trained as transformers has distributed it, by
            tensor parallelism, FSDP2 or both; any other is given to the accelerator.
        rewards: one or more reward functions with TRL's signature, or a `Rewards`, which
            documents what they may return.
        config: GRPOTrainerConfig.
        data: training rows, dicts: "prompt", a str or a list of messages, perhaps
            "chat_template_kwargs", a dict, and columns for the reward functions. A sequence of
            them, or a `datasets.IterableDataset`, which the main process reads for all ranks as it
            goes.
        tokenizer: None = the tokenizer of `model`, which must then be a name.
        eval_data: a sequence of held-out rows, or None.
        peft_config: PeftConfig of adapters to train; the reference is then the model without
            adapters. A PeftModel as `model` goes on with its adapters, and they are the reference.
        rollout_fn: `rollout_fn(prompts, trainer)`, called instead of `generate`. Each prompt is
            repeated num_generations times, over all ranks. It returns a dict of lists with one
            entry per prompt: "completion_ids"; optionally "prompt_ids", "logprobs" (log-probability
            of each token under the sampler, for rollout correction; NaN = not known), "support"
            (for each token the ids that the sampler kept, whose probabilities "logprobs" then are;
            ratios and entropies are over these alone), "completion_mask" or "env_mask" (0 for
            tokens that the policy did not sample), "truncated" (default: ends neither with an end
            token nor with a stop string). Other entries become columns for the reward functions.
            Evaluation always calls `generate`. Every rank calls it; of ranks that share a batch,
            the result of the first counts.
        on_refresh: called with the trainer when an iteration begins, after its reference and
            reward model were refreshed.
        run_log: writes metrics and tables of completions on the main process, in addition to the
            trackers; None = a `RunLog` in output_dir.
        accelerator: Accelerator to use instead of one with default settings; it then decides on
            the trackers.

    Raises:
        ValueError: there are no rows, or one has no valid prompt; the tokenizer has no end token;
            settings are incompatible with the model, the data or the number of ranks.

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
        data: "Sequence[dict[str, Any]] | IterableDataset",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eval_data: Sequence[dict[str, Any]] | None = None,
        peft_config: "PeftConfig | None" = None,
        rollout_fn: RolloutFn | None = None,
        on_refresh: "Callable[[GRPOTrainer], None] | None" = None,
        run_log: RunLog | None = None,
        accelerator: Accelerator | None = None,
    ):
        check_config(config)
        warn_without_token(config)
        self.config = config
        self.rewards = rewards if isinstance(rewards, Rewards) else Rewards(rewards)
        self.rewards.trainer_state = TrainerState(self)
        self.rollout_fn, self.on_refresh, self.run_log = rollout_fn, on_refresh, run_log
        self.accelerator = accelerator or make_accelerator(config)
        check_accelerator(config, self.accelerator)
        self.reward_training = self.rewards.training
        check_refreshed(config, self.reward_training)
        self.data = check_rows("data", data)
        self.eval_data = None if config.eval_steps is None else check_eval_rows(eval_data, config)

        set_seed(config.seed)  # initialises adapters alike on every rank
        name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
        self.title = f"{name or type(model).__name__}, {config.loss_type} loss"
        if isinstance(model, str):
            tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
            model = load_model(model, torch.float32)
        if tokenizer is None:
            raise ValueError("tokenizer is required unless model is a name, got None")
        check_model(model, config)
        self.ranks = Ranks(self.accelerator, model)
        self.order = make_order(self.data, config, self.ranks)
        self.ranks.check_agreement(agreed_values(config, self.order.content, model))
        self.ranks.check_options(config, peft_config)
        self.rows_per_rank = count_rows_per_rank(config, self.ranks.size)
        self.tokenizer, self.sampler = tokenizer, Sampler(tokenizer, model, config)
        check_first_row(self)
        critic = load_critic(model, config) if config.has_own_critic else None
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        self.reference = make_reference(model, config, self.ranks)
        if config.algorithm == "ppo" and config.critic == "shared":
            add_value_head(model)
        prepare_model(model, config)
        model.train()  # gradient checkpointing is active in training mode only
        self.policy = Policy(config, model)
        optimizer = make_optimizer(model, config)
        if self.ranks.distributed:
            self.model, self.optimizer = model, self.accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.unwrapped = self.accelerator.unwrap_model(self.model)
        self.critic = None if critic is None else Critic(critic, config, self.accelerator)
        if self.reference is not None and is_peft_model(model) and peft_config is None:
            self.reference.refresh(self.unwrapped)  # its adapters may have been trained before
        if isinstance(self.unwrapped, FSDPModule):  # gathers the root's parameters for generate
            register_fsdp_forward_method(self.unwrapped, "generate")
        self.scheduler = make_scheduler(self.optimizer, config)
        self.frozen_checksum = exclude_frozen_weights(self)
        self.step, self.rollouts, self.refreshed, self.has_logs = 0, 0, 0, False
        self.data_position = 0  # prompts of all epochs that were trained on or left out
        if self.reward_training is not None:
            self.reward_training.start(self)
        self.experience: Experience | None = None
        self.evaluation_due = True  # of the current step; a signal defers one to the resumed run
        self.summary, self.started = RunSummary(), time.perf_counter()
        self.source = make_source(self)

    def train(self) -> TrainResult:
        """Trains until max_steps, or until the end of the step in which SIGTERM or SIGINT arrives.

        In both cases it writes `model/` to output_dir, for `from_pretrained`; a run to the end is
        uploaded with push_to_hub. A signal also writes a checkpoint, from which `resume` continues
        bit-identically (on a GPU, as far as its kernels are deterministic; on more than two ranks
        of DDP, up to rounding).

        Raises:
            ValueError: the checkpoint belongs to another run; a row or a reward is invalid.
            FloatingPointError: a gradient is not finite; the last checkpoint is untouched.
            TrainingError: a checkpoint, a log or `model/` could not be written; a reward function
                raised; another rank stopped; the upload of push_to_hub failed, after all else.
            RolloutError: all servers of rollouts failed; the steps so far are in a checkpoint.
        """
        set_seed(self.config.seed + self.ranks.index)
        checkpoint = resolve_checkpoint(self.config.resume, self.config.output_dir)
        self.source.start()
        if self.run_log is None and self.accelerator.is_main_process:
            self.run_log = RunLog(self.config.output_dir, self.title)
        self.started = time.perf_counter()
        try:
            if checkpoint is not None:
                load_state(self, checkpoint)
            signal = self.run()
            model = save_pretrained(self)
        except RuntimeError as error:
            if lost := explain_lost_rank(error):
                raise lost from error
            raise
        finally:
            self.source.close()
            self.close_logs()
        if self.config.push_to_hub and signal is None and self.accelerator.is_main_process:
            push_to_hub(model, self.config)
        return self.summary.result(self.step, signal, self.seconds(), self.config.output_dir)

    def run(self) -> int | None:
        """Runs the training loop from the current step; returns the signal that stopped it."""
        config = self.config
        show = config.progress_bar and self.accelerator.is_main_process
        bar = tqdm(total=config.max_steps, initial=self.step, disable=not show, dynamic_ncols=True)
        signal, main = None, self.accelerator.is_main_process
        if self.evaluation_due and self.eval_data is not None:
            self.log(evaluate(self), extend=True)
        with StopSignals(show=main) as signals, bar:
            while self.step < config.max_steps and not signal:
                if self.experience is None:
                    self.refresh()
                    self.experience = self.collect()
                    self.summary.add_rollout(self.experience.metrics, show=main)
                metrics, signal = self.update(self.experience, signals)
                self.step += 1
                if self.experience.position == config.steps_per_rollout:
                    self.experience = None

                done = self.step == config.max_steps
                due = self.eval_data is not None and (self.step % config.eval_steps == 0 or done)
                self.evaluation_due = due and signal is not None  # a stop does not wait for it
                if due and not signal:
                    metrics |= evaluate(self)
                self.log(metrics)
                self.summary.add_step(metrics, config, show=main)
                bar.set_postfix_str(progress_summary(metrics), refresh=False)
                bar.update()
                every = config.save_steps
                if signal or (every is not None and (self.step % every == 0 or done)):
                    save_state(self)
        return signal

    def refresh(self) -> None:
        """Refreshes reference and reward model when an iteration begins (iterative GRPO)."""
        every = self.config.refresh_rollouts
        due = every and self.rollouts and self.rollouts % every == 0
        if due and self.refreshed != self.rollouts:  # not again after a rollout that failed
            if self.reference is not None:
                self.reference.refresh(self.unwrapped)
            if self.reward_training is not None:
                self.reward_training.train()
            if self.on_refresh is not None:
                self.on_refresh(self)
            self.refreshed = self.rollouts

    def collect(self) -> Experience:
        """Collects experience; if its source fails, the steps so far are in a checkpoint."""
        position = self.data_position
        try:
            return collect(self)
        except RolloutError as error:
            self.data_position = position  # rounds of this rollout are drawn again
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
        split = minibatch, config.minibatches, config.micro_batch_size
        batches = list(experience.micro_batches(*split))
        sums, value_sums, max_ratio = 0.0, 0.0, torch.zeros((), device=accelerator.device)
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            with self.ranks.accumulation(self.model, is_last), self.ranks.autocast():
                output, values = self.policy.loss(self.model, batch, num_items, num_sequences)
                loss = output.loss
                if values is not None:  # of a value head on the policy's trunk
                    of_values = loss_of_values(values, batch, config, num_items)
                    loss = loss + config.value_coef * of_values.loss
                # Gradients are averaged over data-parallel ranks, but losses are shares of a sum.
                accelerator.backward(loss * self.ranks.size)
            if self.critic is not None:
                with self.ranks.accumulation(self.critic.model, is_last):
                    values = self.critic.values(batch)
                    of_values = loss_of_values(values, batch, config, num_items)
                    accelerator.backward(of_values.loss * self.ranks.size)
            sums = sums + output.sums
            if values is not None:
                value_sums = value_sums + of_values.sums
            max_ratio = torch.maximum(max_ratio, output.metrics["ratio/max"])
        limit = config.max_grad_norm or float("inf")
        if self.ranks.distributed:
            grad_norm = clip_gradients(trainable_parameters(self.model), limit)
        else:
            grad_norm = accelerator.clip_grad_norm_(trainable_parameters(self.model), limit)
        metrics, signal = step_metrics(
            *(self.ranks, sums, max_ratio, grad_norm, signals.received),
            has_kl=self.reference is not None and config.algorithm == "grpo",
            value_sums=value_sums,
            critic_norm=0.0 if self.critic is None else self.critic.clip_gradients(),
        )
        has_scaler = accelerator.scaler is not None  # it skips steps that overflowed
        for name in ("grad_norm", "value/grad_norm"):
            if not has_scaler and not math.isfinite(metrics.get(name, 0.0)):
                raise FloatingPointError(
                    f"{name} is {metrics[name]} in step {self.step + 1}; the step is not applied"
                )
        metrics["learning_rate"] = self.scheduler.get_last_lr()[0]
        metrics["epoch"] = self.order.epochs(self.data_position)
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        if self.critic is not None:
            self.critic.step()
        experience.position += 1
        metrics["seconds/update"] = time.perf_counter() - started
        return experience.metrics | metrics, signal

    def log(self, metrics: dict[str, float], *, extend: bool = False) -> None:
        """Logs metrics of the last step to the trackers and the run's log.

        Args:
            metrics: by name.
            extend: whether other metrics of the step may have been logged before.

        Raises:
            ValueError: output_dir cannot be created.
            TrainingError: they could not be written.
        """
        accelerator, folder = self.accelerator, self.config.output_dir
        try:
            if not self.has_logs:  # not earlier: a refused run leaves no folder behind
                create_output_dir(folder)
                accelerator.init_trackers("grpo_fused", tracker_config(self.config))
                self.has_logs = True
            accelerator.log(metrics, step=self.step)
            if accelerator.is_main_process:
                (self.run_log.extend if extend else self.run_log.write)(self.step, metrics)
        except OSError as error:
            reason = explain(error, folder)
            raise TrainingError(f"step {self.step} could not be logged ({reason})") from error

    def close_logs(self) -> None:
        """Draws the plot and ends the trackers; of a failure it warns, as another may be raised."""
        if self.accelerator.is_main_process:
            self.run_log.close()
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()  # `end_training` would also end the process group
            except OSError as error:
                reason = explain(error, self.config.output_dir)
                warnings.warn(f"{tracker.name} could not be ended ({reason})", stacklevel=2)

    def seconds(self) -> float:
        """Returns the time of training so far, that before a resume included."""
        return self.summary.seconds + time.perf_counter() - self.started
