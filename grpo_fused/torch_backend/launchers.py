"""The launchers in plain torch, with the arguments of those in `grpo_fused.kernels`."""

import torch

from grpo_fused.bundles import Outputs, Statistics
from grpo_fused.losses.kl import KL_ESTIMATORS, corrected, weighted
from grpo_fused.losses.metrics import Terms, total
from grpo_fused.losses.objectives import Objective, clamped_exp
from grpo_fused.sequences import Packed
from grpo_fused.torch_backend.rows import (
    FLOOR,
    RowStatistics,
    Scratch,
    active_rows,
    at,
    blocks,
    centered,
    collect,
    exp2_,
    output_rows,
    sharpness,
    softcapped,
    softmax_statistics,
    spread,
    store,
    targets,
    write_gradient,
)


def fused_loss(logits, tokens, scales, formula, outputs):
    """As `grpo_fused.kernels.fused_loss.fused_loss`."""
    positions, V = logits.shape[1:]
    active = active_rows(tokens, positions)
    tokens = spread(tokens, positions)
    *per_token, dlogits = outputs
    rows = Outputs(*output_rows(per_token, positions, active))
    buffers = Scratch(logits.device)
    for block, x, dx, masked in blocks(logits, dlogits, active):
        part = at(tokens, block)
        target, known = targets(part.ids, V)
        out = buffers("out", x.shape)
        exponents = None if outputs.entropies is None else buffers("exponents", x.shape)
        product = exponents if part.w_entropy is None else buffers("product", x.shape)
        factor = sharpness(part.temperature, scales)
        u, slope = softcapped(x, scales, out)
        row = softmax_statistics(u, target, known, factor, out, exponents, product)
        values, dlogp, dentropy = token_loss(row, known, part, formula)
        store(rows, block, values, masked)
        if dx is not None:
            h = None if dentropy is None else dentropy * factor
            write_gradient(dx, masked, row, exponents, target, dlogp * factor, h, slope)
    collect(per_token, rows, positions)


def token_loss(row, known, tokens, formula):
    """(Outputs, dlogp, dentropy or None) (n,) of rows, the derivatives times grad_scale."""
    logp, entropy = row.logp, row.entropy
    if tokens.old_logps is None:
        log_ratio = torch.where(logp.isnan(), logp, 0.0)
    else:
        log_ratio = logp - tokens.old_logps
    ratio, dratio = clamped_exp(log_ratio)
    objective = Objective.by_name[formula.objective](*formula.params)
    loss, dlogp, clipped = objective.of_tokens(
        logp, log_ratio, tokens.advantages, tokens.sampling_logps
    )
    loss, dlogp = weighted(tokens.w_policy, loss), weighted(tokens.w_policy, dlogp)
    kl = torch.zeros_like(loss)
    if tokens.ref_logps is not None:
        estimator = KL_ESTIMATORS[formula.kl_estimator]
        if formula.bias_correction:
            kl, dkl = corrected(estimator, tokens.ref_logps - logp, ratio, dratio)
        else:
            kl, dkl, _ = estimator(tokens.ref_logps - logp)
        loss = loss + weighted(tokens.w_kl, kl)
        dlogp = dlogp + weighted(tokens.w_kl, dkl)
    dentropy = None
    if tokens.w_entropy is not None:
        loss = loss - weighted(tokens.w_entropy, entropy)
        dentropy = torch.zeros_like(loss) - tokens.w_entropy * formula.grad_scale
    loss = loss.masked_fill(~known, torch.nan)
    dlogp = (dlogp * formula.grad_scale).masked_fill(loss.isnan(), torch.nan)
    return Outputs(loss, kl, clipped, ratio, logp, entropy), dlogp, dentropy


def logprob_fwd(logits, tokens, scales, statistics, shard):
    """As `grpo_fused.kernels.logprob.logprob_fwd`."""
    positions, V = logits.shape[1:]
    active = active_rows(tokens, positions)
    tokens = spread(tokens, positions)
    rows = Statistics(*output_rows(statistics, positions, active))
    buffers = Scratch(logits.device)
    for block, x, _, masked in blocks(logits, None, active):
        part = at(tokens, block)
        target, known = targets(part.ids, V)
        out = buffers("out", x.shape)
        exponents = None if statistics.entropies is None else buffers("exponents", x.shape)
        factor = sharpness(part.temperature, scales)
        u, _ = softcapped(x, scales, out)
        row = softmax_statistics(u, target, known, factor, out, exponents, exponents, shard)
        store(rows, block, Statistics(row.logp, row.entropy, row.maximum, row.total), masked)
    collect(statistics, rows, positions)


def logprob_bwd(logits, tokens, scales, statistics, derivatives):
    """As `grpo_fused.kernels.logprob.logprob_bwd`."""
    positions, V = logits.shape[1:]
    active = active_rows(tokens, positions)
    dlogits, upstream = derivatives.dlogits, derivatives._replace(dlogits=None)
    tokens, statistics, (dlogps, dentropies, _) = (
        spread(bundle, positions) for bundle in (tokens, statistics, upstream)
    )
    buffers = Scratch(logits.device)
    for block, x, dx, masked in blocks(logits, dlogits, active):
        part, found = at(tokens, block), at(statistics, block)
        target, known = targets(part.ids, V)
        out = buffers("out", x.shape)
        factor = sharpness(part.temperature, scales)
        u, slope = softcapped(x, scales, out)
        z = centered(u, found.maxima, factor, out)
        exponents, h = None, None
        if dentropies is not None:
            exponents = torch.clamp(z, min=FLOOR, out=buffers("exponents", x.shape))
            h = dentropies[block] * factor
        row = RowStatistics(exp2_(z), found.maxima, found.totals, found.logps, found.entropies)
        g = (dlogps[block] * factor).masked_fill(found.logps.isnan(), torch.nan)
        write_gradient(dx, masked, row, exponents, target, g, h, slope, known)


def locate(cu_seqlens, active, index, counts):
    """As `grpo_fused.kernels.reduce.locate`."""
    sequences = Packed((1, len(index)), active, cu_seqlens)
    index.copy_(sequences.index)
    counts.copy_(sequences.counts)


def reduce(outputs, active, loss, sums, metrics):
    """As `grpo_fused.kernels.reduce.reduce`."""
    counted = torch.ones_like(outputs.loss, dtype=torch.bool) if active is None else active
    entropy = 0.0 if outputs.entropies is None else outputs.entropies
    of_tokens = (outputs.loss, outputs.kl, entropy, counted)
    values = total(Terms(*of_tokens, outputs.clipped, outputs.ratio, counted))
    for output, value in zip((sums, metrics), values, strict=True):
        output.copy_(value)
    loss.copy_(sums[0])


def rescale(dlogits, grad_output, grad_scale):
    """As `grpo_fused.kernels.reduce.rescale`; synchronises with nothing but a CPU."""
    factor = grad_output / grad_scale
    if factor.device.type != "cpu" or factor != 1.0:
        dlogits.mul_(factor)
