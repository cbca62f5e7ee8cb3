"""TRL's GRPO trainer with the LM head, the loss and its gradient in one.

    from grpo_fused.integrations.trl import FusedGRPOTrainer as GRPOTrainer

is all that changes in a script: configuration, metrics and numbers stay TRL's.
"""

import inspect
import warnings

import torch
import trl
from packaging.version import Version
from trl import GRPOTrainer

from grpo_fused import Cispo, Clip, Sapo, Vespo, linear_grpo_loss, linear_selective_log_softmax
from grpo_fused.causal_lm import fuse_lm_head, why_not_fused
from grpo_fused.integrations.trl_metrics import Ranks, extremes, sequence_weights
from grpo_fused.metrics import SUMS

TESTED = ("1.0", "1.8", "1.12", "1.16")
VERSION = Version(trl.__version__)
if f"{VERSION.major}.{VERSION.minor}" not in TESTED:
    raise ImportError(
        f"trl {trl.__version__} is not among the versions that FusedGRPOTrainer was tested on: "
        f"{', '.join(TESTED)}. It overrides private methods, which change from one to the next."
    )

SIGNATURE = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies)
RETURNS_AUX_LOSS = "compute_aux_loss" in SIGNATURE.parameters
OLD = VERSION < Version("1.12")  # another luspo, entropy bonus and divisor, other metrics
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
OVER_THE_BATCH = ("dapo", "cispo", "vespo")  # their divisor holds the accumulation already
# The sum of a batch's tokens over a number: of sequences, or of tokens (`_divisor`). TRL's number
# of tokens, cut down to an accumulation window, may be below 1: "token-mean" would not let it.
NORMALIZERS = dict.fromkeys(("bnpo", "luspo", *OVER_THE_BATCH), "seq-mean-token-sum")
NORMALIZERS |= dict.fromkeys(("grpo", "sapo"), "seq-mean-token-mean")
NORMALIZERS |= {"dr_grpo": "seq-mean-token-sum-norm"}
VESPO_KNOBS = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
# Inputs of text alone; with more, TRL makes the log-probabilities.
TEXT = {
    *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "advantages"),
    *("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"),
    *("importance_sampling_ratio", "num_items_in_batch"),
}


class FusedGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer`, its loss computed by `grpo_fused.linear_grpo_loss`.

    The loss runs inside of the wrapped model's forward, in the place of the LM head: no logits, no
    log-probabilities to keep for a second pass, the gradients of head and hidden states made where
    the logits are. Every metric of TRL's is there, from one collective call and one wait for the
    device per micro-batch.

    The entropy-quantile and off-policy masks, the adaptive entropy bonus and what else is in
    `_keeps_trls_loss` use the log-probabilities of `linear_selective_log_softmax` in TRL's own
    loss. Where the LM head cannot be fused, or inputs are more than text, TRL's own path runs,
    after one warning that says why.

    Args, attributes and methods: as `trl.GRPOTrainer`.

    Raises:
        ValueError: use_liger_kernel of a TRL before 1.14, whose loss would be Liger's.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if VERSION < Version("1.14") and self.args.use_liger_kernel:
            raise ValueError("use_liger_kernel=True replaces the loss: leave it False, got True")
        self._warned = set()
        # TRL has wrapped the reference by now: FSDP and DeepSpeed gather weights in their forward.
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        models = [_base_model(self.accelerator.unwrap_model(model)) for model in models]
        self._why_unfused = self._why_not_fused(models)
        if not self._why_unfused:
            for model in models:
                fuse_lm_head(model)

    def _why_not_fused(self, models):
        config = getattr(self.model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            return "its adapter learns a prompt, which changes the positions"
        if self.args.torch_compile:
            return "torch_compile=True would compile the forward again for every batch"
        if self.args.n_gpu > 1:
            return "DataParallel would cut the hidden states, but not what the loss is told of them"
        if any(len(set(getattr(m, "hf_device_map", {}).values())) > 1 for m in models):
            return "the model is split over several devices"
        return next((reason for model in models if (reason := why_not_fused(model))), None)

    def _handed_over(self, reason):
        """Warn once per reason that TRL's own path runs."""
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"TRL computes the loss, without grpo_fused: {reason}", stacklevel=3)

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        **others,
    ):
        """(log-probabilities (B, T), entropies or None), and None behind them since TRL 1.8."""
        aux_loss = others.pop("compute_aux_loss", False)
        given = {name: value for name, value in others.items() if value is not None}
        if self._why_unfused or given or aux_loss:
            reason = self._why_unfused or "inputs are not text alone"
            self._handed_over("the model's auxiliary loss is wanted" if aux_loss else reason)
            options = {"compute_aux_loss": aux_loss} if RETURNS_AUX_LOSS else {}
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                **options,
                **others,
            )
        # TRL's luspo before 1.12 read what is under the mask too.
        everything, parts = OLD and self.loss_type == "luspo", []
        for ids, mask in zip(
            input_ids.split(batch_size or len(input_ids)),
            attention_mask.split(batch_size or len(input_ids)),
            strict=True,
        ):

            def head(hidden, weight, *, ids=ids, mask=mask, **head):
                return linear_selective_log_softmax(
                    hidden,
                    weight,
                    ids[:, -logits_to_keep:],
                    None if everything else mask[:, -logits_to_keep:],
                    temperature=self.temperature,
                    compute_entropy=compute_entropy,
                    upcast=self.args.cast_lm_head_to_fp32,
                    **head,
                )

            parts.append(self._forward(model, ids, mask, logits_to_keep, head))
        logps = torch.cat([logps for logps, _ in parts])
        entropies = torch.cat([entropies for _, entropies in parts]) if compute_entropy else None
        return (logps, entropies, None) if RETURNS_AUX_LOSS else (logps, entropies)

    def _forward(self, model, input_ids, attention_mask, logits_to_keep, head):
        with self.accelerator.autocast():
            return model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_to_keep=logits_to_keep + 1,
                head=head,
            )

    def _keeps_trls_loss(self, inputs):
        """Whether TRL's own loss runs, on whatever log-probabilities there are."""
        return bool(
            self._why_unfused
            or self.loss_type not in NORMALIZERS
            or self.importance_sampling_level not in ("token", "sequence")
            or (self.loss_type == "vespo" and self._unusual_vespo())
            or (OLD and (self.loss_type == "luspo" or self._entropy_bonus))
            or getattr(self, "use_adaptive_entropy", False)
            or getattr(self, "aux_loss_enabled", False)
            # TRL counts what is clipped after this cap, if that is not above the bound
            or (self.args.delta is not None and self.args.delta <= 1 + self.epsilon_high)
            or self.top_entropy_quantile < 1.0
            or self.off_policy_mask_threshold is not None
            or any(inputs[name] is not None for name in inputs.keys() - TEXT)
        )

    def _unusual_vespo(self):
        """TRL lets knobs be 0 and, with sequence ratios, corrects the KL by those."""
        knobs = [getattr(self.args, name) for name in VESPO_KNOBS]
        return self.importance_sampling_level != "token" or min(knobs) <= 1e-4

    @property
    def _entropy_bonus(self):
        return getattr(self, "_entropy_bonus_enabled", False)

    def _compute_loss(self, model, inputs):
        """The loss of a micro-batch, scaled for gradient accumulation, and its metrics."""
        if self._keeps_trls_loss(inputs):
            return super()._compute_loss(model, inputs)
        completion_ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        input_ids = torch.cat([inputs["prompt_ids"], completion_ids], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], mask], dim=1)
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        mode = "train" if self.model.training else "eval"
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        if self.loss_type == "vespo":  # as TRL has it, whoever put it there
            ratio = inputs.get("importance_sampling_ratio")
        else:
            corrected = self.use_vllm and self.vllm_importance_sampling_correction
            ratio = inputs["importance_sampling_ratio"] if corrected else None
        entropy_coef = self.entropy_coef / steps if self._entropy_bonus else 0.0
        objective = self._objective()

        def head(hidden, weight, **head):
            return linear_grpo_loss(
                hidden,
                weight,
                completion_ids,
                mask,
                inputs["advantages"],
                old_logps=inputs.get("old_per_token_logps"),
                ref_logps=inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
                importance_sampling_ratio=ratio,
                loss_type=self.loss_type,
                objective=objective,
                importance_sampling_level=self.importance_sampling_level,
                normalizer=NORMALIZERS[self.loss_type],
                num_sequences_in_batch=self._divisor(inputs, mask, steps, mode),
                max_completion_length=self.max_completion_length,
                beta=self.beta,
                use_bias_correction_kl=self.args.use_bias_correction_kl,
                temperature=self.temperature,
                entropy_coef=entropy_coef,
                compute_entropy=True,
                upcast=self.args.cast_lm_head_to_fp32,
                **head,
            )

        out = self._forward(model, input_ids, attention_mask, completion_ids.shape[1], head)
        self._log_loss(mode, steps, out, inputs, mask, objective, entropy_coef)
        return out.loss

    def _objective(self):
        if self.loss_type == "cispo":
            return Cispo(max_ratio=self.epsilon_high)
        if self.loss_type == "sapo":
            return Sapo(self.args.sapo_temperature_pos, self.args.sapo_temperature_neg)
        if self.loss_type == "vespo":
            return Vespo(*(getattr(self.args, name) for name in VESPO_KNOBS))
        return Clip(self.epsilon_low, self.epsilon_high, self.args.delta)

    def _divisor(self, inputs, mask, steps, mode):
        """What sums over tokens are divided by, accumulation included."""
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1) * steps
        if self.loss_type not in OVER_THE_BATCH:
            return len(mask) * steps
        items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        rescaled = not OLD and mode == "train"
        return items * steps / self.args.steps_per_generation if rescaled else items

    def _log_loss(self, mode, steps, out, inputs, mask, objective, entropy_coef):
        """Append TRL's metrics, of all ranks: one gather and one wait for the device."""
        of_rank = dict(zip(SUMS, out.sums.unbind(), strict=True))
        of_rank["with_bonus"] = out.loss.detach()
        tokens = (out.logps, inputs.get("old_per_token_logps"), inputs["advantages"], mask)
        if self.loss_type in CLIPPED:
            at_sequences = self.importance_sampling_level == "sequence"
            of_rank |= extremes(objective, *tokens, sequence_level=at_sequences)
        elif self.loss_type == "vespo":
            ratio = inputs.get("importance_sampling_ratio")
            of_rank |= sequence_weights(objective, *tokens, ratio, everything=OLD)
        values = torch.stack([value.float() for value in of_rank.values()])
        gathered = self.accelerator.gather(values[None]).tolist()
        ranks, log = Ranks(of_rank, gathered, means_of_ranks=OLD), self._metrics[mode]
        if self._entropy_bonus:
            scale = 1 if self.loss_type in OVER_THE_BATCH else steps
            log["policy_loss"].append(ranks.policy_loss(entropy_coef, scale))
            if mode == "train" and self.accelerator.sync_gradients:
                log["entropy_coef"].append(self.entropy_coef)
        if self.beta != 0.0:
            log["kl"].append(ranks.mean("kl", count="tokens"))
        log["entropy"].append(ranks.mean("entropy", count="tokens"))
        if self.loss_type in CLIPPED:
            for name, value in ranks.clip_ratios().items():
                log[f"clip_ratio/{name}"].append(value)
        elif self.loss_type == "cispo":
            log["cispo_clip_ratio"].append(ranks.mean("clipped_high", count="ratios"))
        elif self.loss_type == "vespo":
            log["vespo/phi_seq_mean"].append(ranks.mean("phi", count="phis"))


def _base_model(model):
    """The transformers model, which peft may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
