"""Every loss of the family: choose the formula, weigh the tokens, run the input, assemble."""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fused import arguments, validation
from grpo_fused.bundles import Formula, OverSupport, Scales
from grpo_fused.checks import check_choice, constant
from grpo_fused.collectives import check_group
from grpo_fused.losses.metrics import as_dict
from grpo_fused.losses.on_logps import LogpsFormula
from grpo_fused.losses.table import LOSSES


class LossOutput(NamedTuple):
    """Result of a loss; all but `loss` detached. What is (B, T) is (N,) for a packed batch.

    Attributes:
        loss: () float32, or (B, T) for reduction="none"; differentiable.
        metrics: dict of () float32 on the device, local means:
            `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean` (their sum),
            `ratio/mean`, `ratio/max`; `kl` with ref_logps, `entropy` if it was computed. Means are
            over active tokens; those of ratios of sequences (level "sequence" or "sequence_sum",
            advantages (B,)) over sequences.
        sums: (8,) float32, see `grpo_fused.losses.metrics`, for exact means over ranks and
            micro-batches. The first rank of a sequence_group counts ratios of sequences.
        logps: (B, T) float32, 0 where masked.
        entropies: (B, T) float32, 0 where masked; None if they were not computed.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    sums: Tensor
    logps: Tensor
    entropies: Tensor | None


def compute_loss(source, mask, advantages, options, log_ratio_bounds=None):
    """The `LossOutput` of the public losses.

    Args:
        source: a class of `inputs`.
        mask, advantages: as `grpo_loss`.
        options: its keywords; of log-probabilities `FamilyOptions` alone.
        log_ratio_bounds: as `grpo_loss_from_logps`.
    """
    check_choice("loss_type", options.loss_type, LOSSES)
    row = LOSSES[options.loss_type]
    objective = row.objective if options.objective is None else options.objective
    level = options.importance_sampling_level
    level = row.level if level is None else level
    validation.check_objective(objective, level, options.sequence_group)
    validation.check_choices(options)
    of_logps = source.ids is None
    backend = "torch"
    if not of_logps:
        backend = validation.choose_implementation(options.implementation, source.tensor.device)
    layout, source = arguments.lay_out(source, mask, advantages, options)
    check_group("sequence_group", options.sequence_group)
    sequences = arguments.make_sequences(layout, mask, backend, options.sequence_group)
    temperature, support, over = 1.0, None, OverSupport()
    if not of_logps:
        temperature, support = options.temperature, options.support
        over = arguments.make_over(options)
    inputs = (temperature, support, advantages, options, objective.uses_sampling_logps)
    tokens = arguments.make_tokens(source, layout, sequences, *inputs)
    scales, grad_scale = Scales(), 1.0
    if not of_logps:
        scales = arguments.make_scales(source, options.logit_scale, options.logit_softcap)
        grad_scale = validation.check_scale(source, "grad_scale", options.grad_scale, nonzero=True)
    beta = validation.check_scale(source, "beta", options.beta)
    entropy_coef = validation.check_scale(source, "entropy_coef", options.entropy_coef)
    if options.ref_logps is None and (isinstance(beta, Tensor) or beta != 0):
        raise ValueError("ref_logps is needed unless beta is 0, got None")
    corrects = not getattr(objective, "uses_correction", False)
    normalizer = None if options.reduction == "none" else options.normalizer or row.normalizer
    coefficients = (beta, entropy_coef)
    weights, ratio = arguments.make_values(
        layout, sequences, tokens.advantages, normalizer, options, coefficients, corrects
    )
    entropy = weights.entropy is not None
    if of_logps:
        entropy = source.entropies is not None
    elif options.compute_entropy:
        entropy = True

    # A gradient in float16 that is made before the loss scale is known would flush to zero.
    one = not isinstance(grad_scale, Tensor) and grad_scale == 1.0
    too_small = source.dtype == torch.float16 and one and source.wants_gradient()
    fuses = source.fuses and hasattr(objective, "per_token") and level == "token"
    bias_correction = bool(options.use_bias_correction_kl)
    if fuses and options.reduction == "sum" and not too_small:
        tokens = arguments.weigh_and_broadcast(
            tokens, weights, sequences, backend, source.by_sequence
        )
        names = (objective.name(), objective.params(), options.kl_estimator, bias_correction)
        formula = Formula(*names, grad_scale, over, objective.uses_sampling_logps)
        results = source.token_loss(tokens, scales, formula, entropy, backend, sequences)
    else:
        tokens = arguments.weigh(tokens, weights, sequences)
        tokens = tokens._replace(correction=None if corrects else ratio)
        formula = LogpsFormula(
            objective,
            level,
            options.kl_estimator,
            bias_correction,
            options.reduction,
            log_ratio_bounds,
            over,
        )
        grad_scale = None if too_small else grad_scale
        results = source.logps_loss(
            tokens, scales, formula, entropy, backend, sequences, grad_scale
        )
    loss, sums, metrics, logps, entropies = results
    entropies = None if entropies is None else layout.restore(constant(entropies))
    metrics = as_dict(metrics, has_ref=options.ref_logps is not None, has_entropy=entropy)
    logps = layout.restore(constant(logps))
    return LossOutput(layout.restore(loss), metrics, sums, logps, entropies)
