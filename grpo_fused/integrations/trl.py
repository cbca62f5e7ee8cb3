"""TRL's GRPO trainer with the LM head and the loss fused.

Change one import; configuration, metrics and numbers stay those of TRL:

    from grpo_fused.integrations.trl import FusedGRPOTrainer as GRPOTrainer
"""

import inspect
import warnings

import torch
import trl
from packaging.version import Version
from trl import GRPOTrainer

from grpo_fused import Cispo, Clip, Sapo, Vespo, linear_grpo_loss, linear_selective_log_softmax
from grpo_fused.integrations.transformers import fuse_lm_head, why_not_fused
from grpo_fused.integrations.trl_metrics import RankSums, clip_ratio_extremes, vespo_weights
from grpo_fused.losses.metrics import SUMS

TESTED = ("1.0", "1.8", "1.12", "1.16")
VERSION = Version(trl.__version__)
if f"{VERSION.major}.{VERSION.minor}" not in TESTED:
    raise ImportError(
        f"FusedGRPOTrainer overrides private methods of TRL and supports only the versions "
        f"{', '.join(TESTED)}, got trl {trl.__version__}"
    )

SIGNATURE = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies)
RETURNS_AUX_LOSS = "compute_aux_loss" in SIGNATURE.parameters
# LUSPO, the entropy bonus, the token divisor and the reduction of metrics changed in TRL 1.12.
BEFORE_1_12 = VERSION < Version("1.12")
CLIP_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
# Losses whose divisor, the number of tokens, already accounts for gradient accumulation.
TOKEN_MEAN_LOSSES = ("dapo", "cispo", "vespo")
# These divide the sum over tokens by `_divisor`. "token-mean" would clamp that number to at least
# 1, while TRL's number of tokens per accumulation window may be a fraction.
NORMALIZERS = dict.fromkeys(("bnpo", "luspo", *TOKEN_MEAN_LOSSES), "seq-mean-token-sum")
NORMALIZERS |= dict.fromkeys(("grpo", "sapo"), "seq-mean-token-mean")
NORMALIZERS |= {"dr_grpo": "seq-mean-token-sum-norm"}
VESPO_PARAMETERS = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
# Inputs of text-only models. With any other input, TRL computes the log-probabilities.
TEXT_INPUTS = {
    *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "advantages"),
    *("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"),
    *("importance_sampling_ratio", "num_items_in_batch"),
}


class FusedGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose loss is `grpo_fused.linear_grpo_loss`.

    The loss replaces the LM head inside the forward of the wrapped model: it stores neither logits
    nor log-probabilities for a second pass, and computes the gradients of the head and the hidden
    states chunk by chunk. All of TRL's metrics are logged, from one collective call and one device
    synchronisation per micro-batch.

    Entropy-quantile and off-policy masks, the adaptive entropy bonus and the other options in
    `_uses_trl_loss` combine the log-probabilities of `linear_selective_log_softmax` with TRL's own
    loss. If the LM head cannot be fused, or the inputs are not text only, TRL computes everything
    and a single warning gives the reason.

    Arguments, attributes and methods are those of `trl.GRPOTrainer`.

    Raises:
        ValueError: use_liger_kernel=True with TRL before 1.14, which would select Liger's loss.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if VERSION < Version("1.14") and self.args.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel must be False, because it selects Liger's loss; got True"
            )
        self._warned = set()
        # TRL has wrapped the reference model by now: FSDP and DeepSpeed gather weights in the
        # forward of the wrapper.
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        models = [_base_model(self.accelerator.unwrap_model(model)) for model in models]
        self._why_unfused = self._why_not_fused(models)
        if not self._why_unfused:
            for model in models:
                fuse_lm_head(model)

    def _why_not_fused(self, models) -> str | None:
        config = getattr(self.model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            return "prompt-learning adapters shift the positions of the hidden states"
        if self.args.torch_compile:
            return "torch_compile=True would recompile the forward for every batch"
        if self.args.n_gpu > 1:
            return "DataParallel would split the hidden states but not the other loss inputs"
        if any(len(set(getattr(m, "hf_device_map", {}).values())) > 1 for m in models):
            return "the model is split over several devices"
        return next((reason for model in models if (reason := why_not_fused(model))), None)

    def _warn_fallback(self, reason: str):
        """Warn, once per reason, that TRL computes the loss."""
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
        """Compute (log-probabilities (B, T), entropies (B, T) or None), from TRL 1.8 on also None.

        The third element is the auxiliary loss, which only TRL's own method computes.
        """
        aux_loss = others.pop("compute_aux_loss", False)
        given = {name: value for name, value in others.items() if value is not None}
        if self._why_unfused or given or aux_loss:
            reason = self._why_unfused or "the inputs are not text only"
            self._warn_fallback(
                "an auxiliary loss of the model is requested" if aux_loss else reason
            )
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
        # LUSPO of TRL before 1.12 reads masked tokens too.
        ignore_mask, parts = BEFORE_1_12 and self.loss_type == "luspo", []
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
                    None if ignore_mask else mask[:, -logits_to_keep:],
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

    def _uses_trl_loss(self, inputs) -> bool:
        """Return whether TRL's own loss runs, on fused log-probabilities where possible."""
        return bool(
            self._why_unfused
            or self.loss_type not in NORMALIZERS
            or self.importance_sampling_level not in ("token", "sequence")
            or (self.loss_type == "vespo" and self._has_unsupported_vespo())
            or (BEFORE_1_12 and (self.loss_type == "luspo" or self._has_entropy_bonus))
            or getattr(self, "use_adaptive_entropy", False)
            or getattr(self, "aux_loss_enabled", False)
            # TRL counts clipped ratios after capping them at delta.
            or (self.args.delta is not None and self.args.delta <= 1 + self.epsilon_high)
            or self.top_entropy_quantile < 1.0
            or self.off_policy_mask_threshold is not None
            or any(inputs[name] is not None for name in inputs.keys() - TEXT_INPUTS)
        )

    def _has_unsupported_vespo(self):
        """Return whether VESPO has a parameter of 0, or sequence ratios, which change the KL."""
        parameters = [getattr(self.args, name) for name in VESPO_PARAMETERS]
        return self.importance_sampling_level != "token" or min(parameters) <= 1e-4

    @property
    def _has_entropy_bonus(self):
        return getattr(self, "_entropy_bonus_enabled", False)

    def _compute_loss(self, model, inputs):
        """Compute the loss of a micro-batch, scaled for accumulation, and log its metrics."""
        if self._uses_trl_loss(inputs):
            return super()._compute_loss(model, inputs)
        completion_ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        input_ids = torch.cat([inputs["prompt_ids"], completion_ids], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], mask], dim=1)
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        mode = "train" if self.model.training else "eval"
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        if self.loss_type == "vespo":  # TRL's VESPO uses a ratio even if the correction is off
            ratio = inputs.get("importance_sampling_ratio")
        else:
            corrected = self.use_vllm and self.vllm_importance_sampling_correction
            ratio = inputs["importance_sampling_ratio"] if corrected else None
        entropy_coef = self.entropy_coef / steps if self._has_entropy_bonus else 0.0
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
            return Vespo(*(getattr(self.args, name) for name in VESPO_PARAMETERS))
        return Clip(self.epsilon_low, self.epsilon_high, self.args.delta)

    def _divisor(self, inputs, mask, steps, mode):
        """Return the number that the sum over tokens is divided by, accumulation included."""
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1) * steps
        if self.loss_type not in TOKEN_MEAN_LOSSES:
            return len(mask) * steps
        items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        rescaled = not BEFORE_1_12 and mode == "train"
        return items * steps / self.args.steps_per_generation if rescaled else items

    def _log_loss(self, mode, steps, out, inputs, mask, objective, entropy_coef):
        """Append the metrics that TRL logs, over all ranks, with one gather and one device sync."""
        sums = dict(zip(SUMS, out.sums.unbind(), strict=True))
        sums["total_loss"] = out.loss.detach()
        tokens = (out.logps, inputs.get("old_per_token_logps"), inputs["advantages"], mask)
        if self.loss_type in CLIP_LOSSES:
            sequence_level = self.importance_sampling_level == "sequence"
            sums |= clip_ratio_extremes(objective, *tokens, sequence_level=sequence_level)
        elif self.loss_type == "vespo":
            ratio = inputs.get("importance_sampling_ratio")
            sums |= vespo_weights(objective, *tokens, ratio, include_masked=BEFORE_1_12)
        values = torch.stack([value.float() for value in sums.values()])
        gathered = self.accelerator.gather(values[None]).tolist()
        ranks, log = RankSums(sums, gathered, average_ranks=BEFORE_1_12), self._metrics[mode]
        if self._has_entropy_bonus:
            scale = 1 if self.loss_type in TOKEN_MEAN_LOSSES else steps
            log["policy_loss"].append(ranks.policy_loss(entropy_coef, scale))
            if mode == "train" and self.accelerator.sync_gradients:
                log["entropy_coef"].append(self.entropy_coef)
        if self.beta != 0.0:
            log["kl"].append(ranks.mean("kl", count="tokens"))
        log["entropy"].append(ranks.mean("entropy", count="tokens"))
        if self.loss_type in CLIP_LOSSES:
            for name, value in ranks.clip_ratios().items():
                log[f"clip_ratio/{name}"].append(value)
        elif self.loss_type == "cispo":
            log["cispo_clip_ratio"].append(ranks.mean("clipped_high", count="ratios"))
        elif self.loss_type == "vespo":
            log["vespo/phi_seq_mean"].append(ranks.mean("phi", count="phis"))


def _base_model(model):
    """Return the transformers model, which peft may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
