"""Every loss of the family, whatever its logits come from: validate, choose, assemble."""

from typing import NamedTuple

import torch

from grpo_fused import validation
from grpo_fused.autograd import Formula, Options
from grpo_fused.checks import check_choice
from grpo_fused.coupled import CoupledFormula
from grpo_fused.inputs import for_launch, prepare_scales, prepare_tokens, prepare_weights
from grpo_fused.losses import LOSSES
from grpo_fused.metrics import as_dict


class LossOutput(NamedTuple):
    """What `grpo_loss` returns; all but `loss` detached.

    Attributes:
        loss: () float32, or (B, T) for reduction="none"; differentiable in the logits.
        metrics: dict of () float32 on the device, means over what is at hand:
            `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean` (their sum),
            `ratio/mean`, `ratio/max`; `kl` with ref_logps, `entropy` if it was computed. Over
            active tokens; ratios of whole sequences (level "sequence", advantages (B,)) over
            sequences.
        sums: (8,) float32, see `grpo_fused.metrics`, for exact means over ranks and micro-batches.
        logps: (B, T) float32, 0 where masked.
        entropies: (B, T) float32, 0 where masked; None if they were not computed.
        Tokens of a packed batch are (N,) instead of (B, T).
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    sums: torch.Tensor
    logps: torch.Tensor
    entropies: torch.Tensor | None


def family_loss(
    source,
    completion_ids,
    completion_mask,
    advantages,
    *,
    old_logps,
    ref_logps,
    importance_sampling_ratio,
    policy_mask,
    loss_type,
    objective,
    importance_sampling_level,
    normalizer,
    kl_normalizer,
    reduction,
    beta,
    kl_estimator,
    use_bias_correction_kl,
    temperature,
    logit_softcap,
    logit_scale,
    entropy_coef,
    compute_entropy,
    num_items_in_batch,
    num_sequences_in_batch,
    max_completion_length,
    cu_seqlens,
    grad_scale,
    implementation,
    log_ratio_bounds=None,
):
    """LossOutput of `grpo_loss`, `linear_grpo_loss` and `grpo_loss_from_logps`.

    Args:
        source: `sources.Logits`, `sources.Hidden` or `sources.LogProbs`.
        All else: arguments of theirs.
    """
    check_choice("loss_type", loss_type, LOSSES)
    row = LOSSES[loss_type]
    objective = row.objective if objective is None else objective
    level = row.level if importance_sampling_level is None else importance_sampling_level
    validation.check_objective(objective, level)
    validation.check_choices(reduction, kl_estimator, normalizer, kl_normalizer)
    implementation = validation.choose_implementation(implementation, source.tensor.device)
    tokens, sequences, shape = prepare_tokens(
        source,
        completion_ids,
        completion_mask,
        cu_seqlens,
        implementation,
        mask_name="completion_mask",
        advantages=advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        importance_sampling_ratio=importance_sampling_ratio,
        policy_mask=policy_mask,
    )
    scales = prepare_scales(source, shape, sequences, temperature, logit_scale, logit_softcap)
    beta = validation.check_scale("beta", beta, source)
    grad_scale = validation.check_scale("grad_scale", grad_scale, source, nonzero=True)
    entropy_coef = validation.check_scale("entropy_coef", entropy_coef, source)
    if ref_logps is None and (isinstance(beta, torch.Tensor) or beta != 0):
        raise ValueError("ref_logps is needed unless beta is 0, got None")
    weights = prepare_weights(
        sequences,
        "token-sum" if reduction == "none" else normalizer or row.normalizer,
        kl_normalizer,
        entropy_coef,
        num_items_in_batch=num_items_in_batch,
        num_sequences_in_batch=num_sequences_in_batch,
        max_completion_length=max_completion_length,
    )
    compute_entropy = bool(compute_entropy) or weights.entropy_coef is not None
    options = Options(compute_entropy, implementation)
    use_bias_correction_kl = bool(use_bias_correction_kl)

    # float16 has so little range that a gradient made before the loss scale is known would flush
    # to zero.
    too_small = source.dtype == torch.float16 and _is_one(grad_scale) and source.wants_gradient()
    coupled = not source.fuses or not hasattr(objective, "per_token") or level != "token"
    if coupled or reduction == "none" or too_small:
        formula = CoupledFormula(
            *(beta, objective, level, kl_estimator, use_bias_correction_kl, reduction),
            log_ratio_bounds,
        )
        grad_scale = None if too_small else grad_scale
        loss, sums, metrics, logps, entropies = source.coupled_loss(
            tokens, weights, scales, formula, options, sequences, grad_scale
        )
    else:
        formula = Formula(
            *(beta, grad_scale, objective.name(), objective.knobs()),
            *(kl_estimator, use_bias_correction_kl),
        )
        loss, sums, metrics, logps, entropies = source.fused_loss(
            *(for_launch(inputs, sequences) for inputs in (tokens, weights)),
            scales,
            formula,
            options,
            sequences,
        )
    results = (loss, logps.detach(), None if entropies is None else entropies.detach())
    if cu_seqlens is not None:  # (1, N) as (N,)
        results = (t if t is None or t.dim() == 0 else t[0] for t in results)
    loss, logps, entropies = results
    metrics = as_dict(metrics, has_ref=ref_logps is not None, has_entropy=compute_entropy)
    return LossOutput(loss, metrics, sums, logps, entropies)


def _is_one(scale):
    return not isinstance(scale, torch.Tensor) and scale == 1.0
