"""GRPOTrainer: rollout -> rewards -> advantages -> num_iterations x minibatches -> reference."""

import contextlib
import math
import time
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from grpo_fused.trainer.checkpoint import find_checkpoint
from grpo_fused.trainer.collect import collect
from grpo_fused.trainer.evaluation import evaluate
from grpo_fused.trainer.experience import Experience
from grpo_fused.trainer.figures import step_figures, summary
from grpo_fused.trainer.policy import Policy, Reference, prepare_model, trained
from grpo_fused.trainer.rewards import Rewards
from grpo_fused.trainer.rollout import Sampler
from grpo_fused.trainer.setup import (
    TrainerState,
    check_accelerator,
    check_model,
    check_rows,
    check_trackers,
    hyperparameters,
    make_optimizer,
    rows_per_rank,
)
from grpo_fused.trainer.signals import Signals
from grpo_fused.trainer.state import checksum, leave_out_frozen, load, save, save_pretrained
from grpo_fused.trainer.tracking import RunLog


class TrainResult(NamedTuple):
    """How a training ended: after how many optimizer steps, and by which signal, if by one."""

    step: int
    signal: int | None


class GRPOTrainer:
    """Trains a causal language model by GRPO or any other loss of `LOSSES`.

    Args:
        model: a transformers model, or the folder or Hub name of one (float32).
        rewards: a function with TRL's signature, or several, or a `Rewards`, which says what they
            may return: a number, None (not judged) or, for process supervision, a list of
            (end_token, score), per completion. With steps, they make the advantages.
        config: GRPOTrainerConfig.
        data: rows to train on, a sequence of dicts: "prompt", a str or a list of messages, and
            columns for the rewards.
        tokenizer: None = that of `model`, which is then a name.
        eval_data: held-out rows, or None.
        peft_config: of peft, to train adapters; the reference is then the model without them.
        rollout_fn: `rollout_fn(prompts, trainer)` instead of `generate`: a dict of lists with one
            entry per prompt (each stands there num_generations times): "completion_ids";
            optionally "prompt_ids", "logprobs" (of each token under the sampler, for rollout
            correction), "completion_mask" or "env_mask" (0: not written by the policy),
            "truncated"; all else
            becomes columns for the rewards. Evaluation calls `generate`.
        on_refresh: called with the trainer after the reference was refreshed: the place to train
            a reward model further (DeepSeekMath, Algorithm 1, line 12), on what passed through
            the reward since: as an object with `__call__` it can keep its prompts, completions.
        run_log: where metrics and tables go beside the trackers, on the main process; None = a
            `RunLog` in output_dir.
        accelerator: an Accelerator, where its defaults do not serve; trackers are then its own.

    Raises:
        ValueError: no rows; a tokenizer without an end token; settings that do not fit the model,
            the data or the number of ranks.

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
        model,
        rewards,
        config,
        data,
        *,
        tokenizer=None,
        eval_data=None,
        peft_config=None,
        rollout_fn=None,
        on_refresh=None,
        run_log=None,
        accelerator=None,
    ):
        check_trackers(config.report_to)
        self.config = config
        self.rewards = rewards if isinstance(rewards, Rewards) else Rewards(rewards)
        self.rewards.trainer_state = TrainerState(self)
        self.rollout_fn, self.on_refresh, self.run_log = rollout_fn, on_refresh, run_log
        self.accelerator = accelerator or Accelerator(
            cpu=not torch.accelerator.is_available(),  # or ranks would not know of each other
            mixed_precision=config.mixed_precision,
            log_with=config.report_to or None,
            project_dir=config.output_dir,
        )
        check_accelerator(config, self.accelerator)
        self.data, self.eval_data = check_rows("data", data), None
        if config.eval_steps is not None:
            if eval_data is None:
                raise ValueError(f"eval_steps is {config.eval_steps}, but there is no eval_data")
            self.eval_data = check_rows("eval_data", eval_data)
        self.rows_per_rank = rows_per_rank(config, self.accelerator.num_processes)

        set_seed(config.seed)  # adapters start alike on every rank
        if isinstance(model, str):
            tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if tokenizer is None:
            raise ValueError("tokenizer is needed where model is not a name")
        check_model(model, config)
        self.tokenizer, self.sampler = tokenizer, Sampler(tokenizer, model, config)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        self.reference = None
        if config.beta:
            self.reference = Reference(model, config.reference_mix)
            if self.reference.model is not None:
                prepare_model(self.reference.model, config)
                self.reference.model.to(self.accelerator.device)
        prepare_model(model, config)
        self.policy = Policy(config, model.train())  # checkpointing is for models in training
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model, config))
        self.unwrapped = self.accelerator.unwrap_model(self.model)
        if isinstance(self.unwrapped, FSDPModule):  # or it would find its root sharded
            register_fsdp_forward_method(self.unwrapped, "generate")
        self.scheduler = get_scheduler(
            config.lr_scheduler_type,
            getattr(self.optimizer, "optimizer", self.optimizer),
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
        )
        self.frozen, self.checksum = leave_out_frozen(self), checksum(data)
        self.step = self.rollouts = 0
        self.experience: Experience | None = None

    def train(self) -> TrainResult:
        """Trains until max_steps, or until the step during which SIGTERM or SIGINT came.

        Either way all is saved as it then stands: a checkpoint that `resume` continues bit by bit
        (on a GPU as far as its kernels repeat themselves), and `model/` in output_dir, which
        `from_pretrained` loads.

        Raises:
            ValueError: a checkpoint of another run; bad data or rewards when they are met.
            FloatingPointError: a gradient that is not finite; the last checkpoint is untouched.
            TrainingError: a checkpoint or `model/` could not be written, a reward failed.
        """
        set_seed(self.config.seed, device_specific=True)
        found = find_checkpoint(self.config.resume, self.config.output_dir)
        self.accelerator.init_trackers("grpo_fused", hyperparameters(self.config))
        if found is not None:
            load(self, found)
        if self.run_log is None and self.accelerator.is_main_process:
            self.run_log = RunLog(self.config.output_dir)
        try:
            signal = self.run()
            save_pretrained(self)
        finally:
            if self.accelerator.is_main_process:
                self.run_log.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()  # `end_training` would end the process group as well
        return TrainResult(self.step, signal)

    def run(self) -> int | None:
        """The loop, from the step at which the trainer stands; the signal that ended it, if any."""
        config = self.config
        show = config.progress_bar and self.accelerator.is_main_process
        bar = tqdm(total=config.max_steps, initial=self.step, disable=not show, dynamic_ncols=True)
        signal = None
        if self.step == 0 and self.eval_data is not None:
            self.log(evaluate(self))
        with Signals() as signals, bar:
            while self.step < config.max_steps and not signal:
                if self.experience is None:
                    self.refresh_reference()
                    self.experience = collect(self)
                metrics, signal = self.update(self.experience, signals)
                self.step += 1
                if self.experience.position == config.steps_per_rollout:
                    self.experience = None

                done = self.step == config.max_steps
                due = self.eval_data is not None and (self.step % config.eval_steps == 0 or done)
                if due and not signal:  # who ends a run does not wait long
                    metrics |= evaluate(self)
                self.log(metrics)
                bar.set_postfix_str(summary(metrics), refresh=False)
                bar.update()
                every = config.save_steps
                if signal or (every is not None and (self.step % every == 0 or done)):
                    save(self)
        return signal

    def refresh_reference(self):
        """Iterative GRPO: every so many rollouts the reference becomes, or nears, the policy."""
        every = self.config.reference_refresh_rollouts
        if every and self.rollouts and self.rollouts % every == 0:
            self.reference.refresh(self.unwrapped)
            if self.on_refresh is not None:
                self.on_refresh(self)

    def update(self, experience, signals):
        """One optimizer step on the next minibatch.

        Returns:
            (metrics, signal): dict of floats, over all ranks; a signal that came on any, or None.
        """
        config, accelerator, started = self.config, self.accelerator, time.perf_counter()
        minibatch = experience.position % config.minibatches
        num_items = experience.num_items[minibatch]
        num_sequences = config.prompts_per_rollout * config.num_generations / config.minibatches
        batches = list(
            experience.micro_batches(minibatch, config.minibatches, config.micro_batch_size)
        )
        sums, highest = 0.0, torch.zeros((), device=accelerator.device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                output = self.policy.loss(self.model, batch, num_items, num_sequences)
                # Ranks' gradients are averaged, and the shares in the loss want to be added up.
                accelerator.backward(output.loss * accelerator.num_processes)
            sums = sums + output.sums
            highest = torch.maximum(highest, output.metrics["ratio/max"])
        limit = config.max_grad_norm or float("inf")
        grad_norm = accelerator.clip_grad_norm_(trained(self.model), limit)
        figures, signal = step_figures(
            accelerator, sums, highest, grad_norm, signals.received, self.reference is not None
        )
        scaled = accelerator.scaler is not None  # its steps skip what overflowed
        if not scaled and not math.isfinite(figures["grad_norm"]):
            raise FloatingPointError(
                f"grad_norm is {figures['grad_norm']} in step {self.step + 1}: the step is not "
                "taken"
            )
        figures["learning_rate"] = self.scheduler.get_last_lr()[0]
        figures["epoch"] = self.rollouts * config.prompts_per_rollout / len(self.data)
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        experience.position += 1
        figures["seconds/update"] = time.perf_counter() - started
        return experience.metrics | figures, signal

    def log(self, metrics):
        """Metrics of the step that was taken last, to the trackers and the run's log."""
        self.accelerator.log(metrics, step=self.step)
        if self.accelerator.is_main_process:
            self.run_log.write(self.step, metrics)
