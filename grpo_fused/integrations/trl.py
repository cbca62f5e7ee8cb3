"""TRL's GRPO trainer with the LM head and the loss fused.

Change one import; configuration, metrics and numbers stay those of TRL:

    from grpo_fused.integrations.trl import FusedGRPOTrainer as GRPOTrainer
"""

import math
from typing import NamedTuple

import torch
from trl import GRPOTrainer

from grpo_fused import (
    Cispo,
    Clip,
    Sapo,
    Vespo,
    grpo_loss_from_logps,
    linear_grpo_loss,
    linear_selective_log_softmax,
)
from grpo_fused.integrations.trl_head import FusedHead, has_other_inputs
from grpo_fused.integrations.trl_metrics import RankSums, clip_counts, vespo_weights
from grpo_fused.integrations.trl_versions import (
    BONUS_IS_MEAN,
    DIVIDES_BY_WINDOW,
    LUSPO_SUMS_TOKENS,
    PHI_OVER_ACTIVE,
    VERSION,
)
from grpo_fused.losses.metrics import SUMS

__all__ = ["VERSION", "FusedGRPOTrainer"]


def __getattr__(name):
    """Import the other trainers when they are asked for: not every TRL has all of them."""
    if name == "FusedRLOOTrainer":
        from grpo_fused.integrations.trl_rloo import FusedRLOOTrainer

        return FusedRLOOTrainer
    if name == "FusedAsyncGRPOTrainer":
        from grpo_fused.integrations.trl_async import FusedAsyncGRPOTrainer

        return FusedAsyncGRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


CLIP_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
# Losses whose divisor, the number of tokens, already accounts for gradient accumulation.
TOKEN_MEAN_LOSSES = ("dapo", "cispo", "vespo")
# These divide the sum over tokens by `_divisor`. "token-mean" would clamp that number to at least
# 1, while TRL's number of tokens per accumulation window may be a fraction.
NORMALIZERS = dict.fromkeys(("bnpo", "luspo", *TOKEN_MEAN_LOSSES), "seq-mean-token-sum")
NORMALIZERS |= dict.fromkeys(("grpo", "sapo"), "seq-mean-token-mean")
NORMALIZERS |= {"dr_grpo": "seq-mean-token-sum-norm"}
LEAST_LAMBDA = 1e-4  # of VESPO, as TRL clamps it


class EntropyBonus(NamedTuple):
    """coefficient * sum of entropies / items, with the tokens summed over for items of None."""

    coefficient: float | torch.Tensor
    items: float | None = None

    def evaluate(self, entropy, tokens):
        return (
            self.coefficient * entropy / (tokens.clamp(min=1) if self.items is None else self.items)
        )


class FusedGRPOTrainer(FusedHead, GRPOTrainer):
    """`trl.GRPOTrainer` whose loss is `grpo_fused.linear_grpo_loss`.

    The loss replaces the LM head inside the forward of the wrapped model: it stores neither logits
    nor log-probabilities for a second pass, and computes the gradients of the head and the hidden
    states chunk by chunk. All of TRL's metrics are logged, from one collective call and one device
    synchronisation per micro-batch.

    Masks by entropy quantile and off-policy masks need the log-probabilities before the loss:
    `linear_selective_log_softmax` computes them, and `grpo_loss_from_logps` the loss. What remains
    with TRL's loss is in `_why_trl_loss`, and uses the fused log-probabilities. If the LM head
    cannot be fused, or the inputs are not text only, TRL computes everything and a single warning
    gives the reason. With a version of TRL that is newer than those tested, so it does if ours and
    TRL's numbers differ on the first micro-batch.

    Arguments, attributes and methods are those of `trl.GRPOTrainer`.

    Raises:
        ValueError: nothing is trainable; use_liger_kernel=True with TRL before 1.14, which would
            select Liger's loss.
    """

    def _why_trl_loss(self, inputs) -> str | None:
        """Return why TRL's own loss runs, on fused log-probabilities where possible, or None."""
        if has_other_inputs(inputs):
            return "the inputs are not text only"
        if self.loss_type not in NORMALIZERS:
            return f"the loss {self.loss_type!r} is not known"
        if self.importance_sampling_level not in ("token", "sequence"):
            return "TRL has no such level of ratios, and says so"
        if (
            self.loss_type == "luspo"
            and not LUSPO_SUMS_TOKENS
            and not self._is_of_sequences(inputs)
        ):
            return "LUSPO before TRL 1.10 reads masked tokens where its loss is one of tokens"
        if self.loss_type == "vespo":
            corrects_kl = self.beta != 0.0 and self.args.use_bias_correction_kl
            if self.importance_sampling_level == "sequence" and corrects_kl:
                return "a KL times the ratio of sequences, which the loss of VESPO does not have"
            if _is_extreme(self.args):
                return "VESPO with a k below 0, or so large that phi overflows"
        return None

    def _is_of_sequences(self, inputs):
        """Whether the loss before the average is one number a sequence."""
        ratio = self._rollout_ratio(inputs)
        return (
            self.importance_sampling_level == "sequence"
            and self.beta == 0.0
            and self.top_entropy_quantile >= 1.0
            and inputs["advantages"].dim() == 1
            and (ratio is None or ratio.shape[1] == 1)
        )

    @property
    def _sums_log_ratios(self):
        return self.loss_type == "vespo"

    def _fused_loss(self, model, inputs):
        completion_ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        input_ids = torch.cat([inputs["prompt_ids"], completion_ids], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], mask], dim=1)
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        steps = self.current_gradient_accumulation_steps if self._mode == "train" else 1
        selects = self.top_entropy_quantile < 1.0 or self.off_policy_mask_threshold is not None
        options, bonus = self._loss_options(inputs, mask, steps), self._bonus(inputs, mask, steps)

        def head(hidden, weight, **head):
            head |= {"temperature": self.temperature, "upcast": self._upcast}
            head |= {"compute_entropy": True}
            if selects:
                return linear_selective_log_softmax(hidden, weight, completion_ids, mask, **head)
            return linear_grpo_loss(
                hidden,
                weight,
                completion_ids,
                mask,
                inputs["advantages"],
                entropy_coef=bonus.coefficient,
                num_entropy_items_in_batch=bonus.items,
                **options,
                **head,
            )

        rows = (model, input_ids, attention_mask, completion_ids.shape[1], head)
        out, aux_loss = self._forward(*rows, aux_loss=self._has_aux_loss)
        counted = mask  # tokens of the entropy bonus
        if selects:
            out, counted = self._loss_of_selected(*out, mask, inputs, options, bonus)
        self._log_loss(out, aux_loss, mask, counted, inputs, options, bonus, steps)
        if aux_loss is None:
            return out.loss
        return out.loss + self.router_aux_loss_coef * aux_loss / steps

    def _loss_options(self, inputs, mask, steps):
        """Return keywords of `linear_grpo_loss` and of `grpo_loss_from_logps`."""
        return {
            "old_logps": inputs.get("old_per_token_logps"),
            "ref_logps": inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            "importance_sampling_ratio": self._rollout_ratio(inputs),
            "loss_type": self.loss_type,
            "objective": self._objective(),
            # VESPO makes its own ratio of sequences.
            "importance_sampling_level": (
                "token" if self.loss_type == "vespo" else self.importance_sampling_level
            ),
            "normalizer": NORMALIZERS[self.loss_type],
            "num_sequences_in_batch": self._divisor(inputs, mask, steps),
            "max_completion_length": self.max_completion_length,
            "beta": self.beta,
            "use_bias_correction_kl": self.args.use_bias_correction_kl,
        }

    def _rollout_ratio(self, inputs):
        if self.loss_type == "vespo":  # TRL's VESPO uses a ratio even if the correction is off
            return inputs.get("importance_sampling_ratio")
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        return inputs["importance_sampling_ratio"] if corrected else None

    def _objective(self):
        args = self.args
        if self.loss_type == "cispo":
            return Cispo(max_ratio=self.epsilon_high)
        if self.loss_type == "sapo":
            return Sapo(args.sapo_temperature_pos, args.sapo_temperature_neg)
        if self.loss_type == "vespo":
            lambdas = args.vespo_lambda_pos, args.vespo_lambda_neg
            lambda_pos, lambda_neg = (max(value, LEAST_LAMBDA) for value in lambdas)
            return Vespo(args.vespo_k_pos, lambda_pos, args.vespo_k_neg, lambda_neg)
        return Clip(self.epsilon_low, self.epsilon_high, args.delta)

    def _divisor(self, inputs, mask, steps):
        """Return the number that the sum over tokens is divided by, accumulation included."""
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1) * steps
        if self.loss_type not in TOKEN_MEAN_LOSSES:
            return len(mask) * steps
        items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        rescaled = DIVIDES_BY_WINDOW and self._mode == "train"
        return items * steps / self.args.steps_per_generation if rescaled else items

    def _bonus(self, inputs, mask, steps):
        """Return the `EntropyBonus` of a micro-batch."""
        if not self._has_entropy_bonus:
            return EntropyBonus(0.0)
        coefficient = self.entropy_coef
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            coefficient = 0.0
        if BONUS_IS_MEAN or self.loss_type not in TOKEN_MEAN_LOSSES:
            return EntropyBonus(coefficient / steps)
        return EntropyBonus(coefficient / self._divisor(inputs, mask, steps), 1.0)

    def _loss_of_selected(self, logps, entropies, mask, inputs, options, bonus):
        """Return (`LossOutput` without what the masks drop, the tokens that the bonus counts)."""
        advantages, policy_mask, counted = inputs["advantages"], None, mask
        if self.off_policy_mask_threshold is not None:
            old_logps = inputs.get("old_per_token_logps")
            old_logps = logps.detach() if old_logps is None else old_logps
            policy_mask = self.get_off_policy_mask(
                advantages=advantages[:, None] if advantages.dim() == 1 else advantages,
                per_token_logps=logps,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old_logps),
                mask=mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            )
        if self.top_entropy_quantile < 1.0:
            quantile = 1 - self.top_entropy_quantile
            counted = self.get_high_entropy_mask(entropies.detach(), mask, quantile)
            policy_mask = counted if policy_mask is None else counted * policy_mask
        out = grpo_loss_from_logps(
            logps,
            mask,
            advantages,
            entropies=entropies.detach(),
            policy_mask=policy_mask,
            **options,
        )
        if self._has_entropy_bonus:
            entropy = torch.where(counted != 0, entropies, 0.0).sum()
            out = out._replace(loss=out.loss - bonus.evaluate(entropy, counted.sum()))
        return out, counted

    def _log_loss(self, out, aux_loss, mask, counted, inputs, options, bonus, steps):
        """Append the metrics that TRL logs, over all ranks, with one gather and one device sync."""
        sums = dict(zip(SUMS, out.sums.unbind(), strict=True))
        tokens = (out.logps, options["old_logps"], inputs["advantages"], mask)
        objective, log = options["objective"], self._metrics[self._mode]
        if self.loss_type in CLIP_LOSSES:
            sums |= clip_counts(objective, *tokens, level=self.importance_sampling_level)
        elif self.loss_type == "vespo":
            ratio, include = options["importance_sampling_ratio"], not PHI_OVER_ACTIVE
            sums |= vespo_weights(objective, *tokens, ratio, include_masked=include)
        if self._has_entropy_bonus:
            stats = (out.entropies * counted).sum(), counted.sum().float()
            scale = 1 if self.loss_type in TOKEN_MEAN_LOSSES else steps
            sums["policy_loss"] = (out.loss.detach() + bonus.evaluate(*stats)) * scale
        if aux_loss is not None:
            sums["aux_loss"] = aux_loss.detach()
        ranks = RankSums.gather(self.accelerator, sums)
        if self._has_entropy_bonus:
            log["policy_loss"].append(ranks.average("policy_loss"))
            if self._mode == "train":
                self._adapt_entropy_coef(torch.stack(stats))
        if aux_loss is not None:
            log["aux_loss"].append(ranks.average("aux_loss"))
        if self.beta != 0.0:
            log["kl"].append(ranks.mean("kl", count="tokens"))
        log["entropy"].append(ranks.mean("entropy", count="tokens"))
        if self.loss_type in CLIP_LOSSES:
            ranks.log_clip_ratios(log)
        elif self.loss_type == "cispo":
            log["cispo_clip_ratio"].append(ranks.mean("clipped_high", count="ratios"))
        elif self.loss_type == "vespo":
            log["vespo/phi_seq_mean"].append(ranks.mean("phi", count="phis"))

    def _adapt_entropy_coef(self, stats):
        """Log the coefficient of the bonus after an optimizer step, and adapt it as TRL does.

        Args:
            stats: (2,), sum and number of the entropies of this micro-batch.
        """
        if self.use_adaptive_entropy:
            window = self._entropy_window_stats
            self._entropy_window_stats = stats if window is None else window + stats
        if not self.accelerator.sync_gradients:
            return
        if self.use_adaptive_entropy:
            window = self.accelerator.reduce(self._entropy_window_stats, reduction="sum")
            entropy, args = (window[0] / window[1].clamp(min=1)).item(), self.args
            if entropy <= args.entropy_target:
                raised = self.entropy_coef + args.entropy_coef_delta
                self.entropy_coef = min(raised, args.entropy_coef_max)
            else:
                lowered = self.entropy_coef - args.entropy_coef_delta
                self.entropy_coef = max(lowered, args.entropy_coef_min)
            self._last_world_entropy, self._entropy_window_stats = entropy, None
        self._metrics["train"]["entropy_coef"].append(self.entropy_coef)


def _is_extreme(args):
    """Whether VESPO has a k below 0, or weights phi that may overflow: TRL has 0 for those."""
    for k, rate in (
        (args.vespo_k_pos, args.vespo_lambda_pos),
        (args.vespo_k_neg, args.vespo_lambda_neg),
    ):
        rate = max(rate, LEAST_LAMBDA)
        # The maximum of rate + k S - rate e^S over the range of S.
        s = min(max(math.log(max(k, 1e-8) / rate), math.log(1e-8)), 20.0)
        if k < 0 or rate + k * s - rate * math.exp(s) > 80.0:
            return True
    return False
