"""The launchers in plain torch, with the arguments of those in `grpo_fused.kernels`."""

import torch

from grpo_fused.bundles import Derivatives, Outputs, Statistics
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
from grpo_fused.torch_backend.support import gather_kept, kept_statistics, write_kept_gradient


def fused_loss(logits, tokens, scales, formula, outputs):
    """As `grpo_fused.kernels.fused_loss.fused_loss`."""
    positions, V = logits.shape[1:]
    active = active_rows(tokens, positions)
    tokens = spread(tokens, positions)
    *per_token, dlogits = outputs
    rows = Outputs(*output_rows(per_token, positions, active))
    wanted = formula.over.wanted(tokens, outputs.entropies is not None)
    buffers = Scratch(logits.device)
    for block, x, dx, masked in blocks(logits, dlogits, active):
        part = at(tokens, block)
        target, known = targets(part.ids, V)
        factor = sharpness(part.temperature, scales)
        kept, statistics = gather_kept(x, masked, part, scales, factor), Statistics(None, None)
        if kept is not None:
            statistics = Statistics(*statistics[:4], *kept_statistics(kept, wanted.kept_entropies))
            known = ~statistics.kept_logps.isnan()
        if wanted.logps:
            out = buffers("out", x.shape)
            exponents = buffers("exponents", x.shape) if wanted.entropies else None
            product = exponents if part.w_entropy is None else buffers("product", x.shape)
            u, slope = softcapped(x, scales, out)
            row = softmax_statistics(u, target, known, factor, out, exponents, product)
            found = (row.logp, row.entropy, row.maximum, row.total)
            statistics = Statistics(*found, *statistics[4:])
        values, derivatives = token_loss(statistics, known, part, formula)
        store(rows, block, values, masked)
        if dx is None:
            continue
        if derivatives.dlogps is None and derivatives.dentropies is None:
            dx.zero_()
        else:
            g, h = (None if d is None else d * factor for d in derivatives[:2])
            g = torch.zeros_like(h) if g is None else g
            write_gradient(dx, masked, row, exponents, target, g, h, slope)
        if kept is not None:
            write_kept_gradient(dx, kept, statistics, derivatives, values.loss.isnan(), masked)
    collect(per_token, rows, positions)


def token_loss(statistics, known, tokens, formula):
    """(Outputs, Derivatives) (n,) of rows, the derivatives times grad_scale."""
    over, scale = formula.over, formula.grad_scale
    logps = (statistics.logps, statistics.kept_logps)
    logp, kl_logp = logps[over.policy], logps[over.kl]
    entropy = (statistics.entropies, statistics.kept_entropies)[over.entropy]
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
    dlogps, dentropies = [None, None], [None, None]  # over the vocabulary, over the support
    dlogps[over.policy] = dlogp
    kl = torch.zeros_like(loss)
    if tokens.ref_logps is not None:
        estimator, difference = KL_ESTIMATORS[formula.kl_estimator], tokens.ref_logps - kl_logp
        if formula.bias_correction and over.policy == over.kl:
            kl, dkl = corrected(estimator, difference, ratio, dratio)
        else:
            kl, dkl, _ = estimator(difference)
            if formula.bias_correction:
                slope = torch.where(dratio == 0, 0.0, kl * dratio)  # not inf * 0
                dlogps[over.policy] = dlogp + weighted(tokens.w_kl, slope)
                kl, dkl = kl * ratio, dkl * ratio
        loss, dkl = loss + weighted(tokens.w_kl, kl), weighted(tokens.w_kl, dkl)
        dlogps[over.kl] = dkl if dlogps[over.kl] is None else dlogps[over.kl] + dkl
    if tokens.w_entropy is not None:
        loss = loss - weighted(tokens.w_entropy, entropy)
        dentropies[over.entropy] = torch.zeros_like(loss) - tokens.w_entropy * scale
    loss = loss.masked_fill(~known, torch.nan)
    dlogps = [
        None if d is None else (d * scale).masked_fill(loss.isnan(), torch.nan) for d in dlogps
    ]
    derivatives = Derivatives(dlogps[0], dentropies[0], None, dlogps[1], dentropies[1])
    return Outputs(loss, kl, clipped, ratio, logp, entropy), derivatives


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
        factor = sharpness(part.temperature, scales)
        over_all, over_kept = (None,) * 4, (None,) * 4
        kept = gather_kept(x, masked, part, scales, factor)
        if kept is not None:
            over_kept = kept_statistics(kept, statistics.kept_entropies is not None, shard)
        if statistics.logps is not None:
            out = buffers("out", x.shape)
            exponents = None if statistics.entropies is None else buffers("exponents", x.shape)
            u, _ = softcapped(x, scales, out)
            row = softmax_statistics(u, target, known, factor, out, exponents, exponents, shard)
            over_all = (row.logp, row.entropy, row.maximum, row.total)
        store(rows, block, (*over_all, *over_kept), masked)
    collect(statistics, rows, positions)


def logprob_bwd(logits, tokens, scales, statistics, derivatives):
    """As `grpo_fused.kernels.logprob.logprob_bwd`."""
    positions, V = logits.shape[1:]
    active = active_rows(tokens, positions)
    dlogits, upstream = derivatives.dlogits, derivatives._replace(dlogits=None)
    tokens, statistics, upstream = (
        spread(bundle, positions) for bundle in (tokens, statistics, upstream)
    )
    buffers = Scratch(logits.device)
    for block, x, dx, masked in blocks(logits, dlogits, active):
        part, found, derivatives = (at(b, block) for b in (tokens, statistics, upstream))
        target, known = targets(part.ids, V)
        factor = sharpness(part.temperature, scales)
        kept = gather_kept(x, masked, part, scales, factor)
        if derivatives.dlogps is None:
            dx.zero_()
        else:
            out = buffers("out", x.shape)
            u, slope = softcapped(x, scales, out)
            z = centered(u, found.maxima, factor, out)
            exponents, h = None, None
            if derivatives.dentropies is not None:
                exponents = torch.clamp(z, min=FLOOR, out=buffers("exponents", x.shape))
                h = derivatives.dentropies * factor
            row = RowStatistics(exp2_(z), found.maxima, found.totals, found.logps, found.entropies)
            g = (derivatives.dlogps * factor).masked_fill(found.logps.isnan(), torch.nan)
            write_gradient(dx, masked, row, exponents, target, g, h, slope, known)
        if kept is not None:
            wrong = found.kept_logps.isnan()
            write_kept_gradient(dx, kept, found, derivatives, wrong, masked)


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
