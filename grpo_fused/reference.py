"""The launchers in plain torch: the default on CPU and wherever Triton is not."""

import functools

import torch

from grpo_fused.divergences import DIVERGENCES, corrected, weighted
from grpo_fused.kernels.library import launcher
from grpo_fused.kernels.linear_launchers import RowLaunchers, linear_launchers
from grpo_fused.metrics import total
from grpo_fused.objectives import Objective, clamped_exp
from grpo_fused.rows import (
    FLOOR,
    Scratch,
    Statistics,
    at,
    blocks,
    cap,
    centered,
    collect,
    exp2_,
    output_rows,
    sharpness,
    spread,
    statistics,
    store,
    targets,
    write_gradient,
)
from grpo_fused.sequences import Packed

torch_launcher = functools.partial(launcher, suffix="_torch")


def _active_rows(active, ids, positions):
    """(B * positions,) bool, or None: all rows are active."""
    if positions == ids.shape[1]:
        if active is None or (active.device.type == "cpu" and bool(active.all())):
            return None
    return spread(torch.ones_like(ids) if active is None else active, ids.shape, positions) != 0


def _weight(items, divisor, block):
    items = at(items, block)
    items = items.float().clamp(min=1) if isinstance(items, torch.Tensor) else max(items, 1.0)
    return 1.0 / (items * divisor)


@torch_launcher
def fused_loss(
    logits,
    ids,
    active,
    advantages,
    old_logps,
    ref_logps,
    ratios,
    policy_mask,
    items,
    divisor,
    kl_items,
    kl_divisor,
    entropy_items,
    entropy_coef,
    temperature,
    logit_scale,
    logit_softcap,
    beta,
    grad_scale,
    objective,
    knobs,
    divergence,
    bias_correction,
    terms,
    logps,
    entropies,
    dlogits,
):
    """As `grpo_fused.kernels.fused_loss.fused_loss`."""
    positions, V = logits.shape[1:]
    evaluate = Objective.by_name[objective](*knobs).evaluate
    active = _active_rows(active, ids, positions)
    per_token = (ids, advantages, old_logps, ref_logps, ratios, policy_mask)
    per_token += (items, kl_items, entropy_items, temperature)
    (ids, advantages, old_logps, ref_logps, ratios, policy_mask, *rest) = (
        spread(value, ids.shape, positions) for value in per_token
    )
    items, kl_items, entropy_items, temperature = rest
    outputs = (*terms, logps, entropies)
    rows = output_rows(outputs, positions, active)
    buffers = Scratch(logits.device)
    for block, x, dx, masked in blocks(logits, dlogits, active):
        target, known = targets(ids[block], V)
        out = buffers("out", x.shape)
        exponents = None if entropies is None else buffers("exponents", x.shape)
        product = exponents if entropy_coef is None else buffers("product", x.shape)
        factor = sharpness(at(temperature, block), logit_scale, logit_softcap)
        u, slope = cap(x, logit_scale, logit_softcap, out)
        row = statistics(u, target, known, factor, out, exponents, product)

        if old_logps is None:
            log_ratio = torch.where(row.logp.isnan(), row.logp, 0.0)
        else:
            log_ratio = row.logp - old_logps[block]
        ratio, dratio = clamped_exp(log_ratio)
        loss, dlogp, clipped = evaluate(row.logp, log_ratio, at(advantages, block).float())
        if ratios is not None:
            loss, dlogp = loss * at(ratios, block), dlogp * at(ratios, block)
        if policy_mask is not None:
            off = at(policy_mask, block) == 0
            loss, dlogp = loss.masked_fill(off, 0.0), dlogp.masked_fill(off, 0.0)
        weight = _weight(items, divisor, block)
        loss, dlogp = weight * loss, weight * dlogp
        kl = torch.zeros_like(loss)
        if ref_logps is not None:
            estimator, difference = DIVERGENCES[divergence], ref_logps[block] - row.logp
            if bias_correction:
                kl, dkl = corrected(estimator, difference, ratio, dratio)
            else:
                kl, dkl, _ = estimator(difference)
            kl_weight = beta * _weight(kl_items, kl_divisor, block)
            loss = loss + weighted(kl_weight, kl)
            dlogp = dlogp + weighted(kl_weight, dkl)
        h = None
        if entropy_coef is not None:
            bonus = entropy_coef * _weight(entropy_items, 1.0, block)
            loss = loss - bonus * row.entropy
            h = torch.zeros_like(loss) - bonus * grad_scale * factor
        loss = loss.masked_fill(~known, torch.nan)
        dlogp = (dlogp * grad_scale).masked_fill(loss.isnan(), torch.nan)
        store(rows, block, (loss, kl, clipped, ratio, row.logp, row.entropy), masked)
        if dx is not None:
            write_gradient(dx, masked, row, exponents, target, dlogp * factor, h, slope)
    collect(outputs, rows, positions)


@torch_launcher
def logprob_fwd(
    logits,
    ids,
    active,
    temperature,
    logit_scale,
    logit_softcap,
    logps,
    entropies,
    maxima,
    totals,
):
    """As `grpo_fused.kernels.logprob.logprob_fwd`."""
    positions, V = logits.shape[1:]
    active = _active_rows(active, ids, positions)
    ids, temperature = (spread(value, ids.shape, positions) for value in (ids, temperature))
    outputs = (logps, entropies, maxima, totals)
    rows = output_rows(outputs, positions, active)
    buffers = Scratch(logits.device)
    for block, x, _, masked in blocks(logits, None, active):
        target, known = targets(ids[block], V)
        out = buffers("out", x.shape)
        exponents = None if entropies is None else buffers("exponents", x.shape)
        factor = sharpness(at(temperature, block), logit_scale, logit_softcap)
        u, _ = cap(x, logit_scale, logit_softcap, out)
        row = statistics(u, target, known, factor, out, exponents, exponents)
        store(rows, block, (row.logp, row.entropy, row.maximum, row.total), masked)
    collect(outputs, rows, positions)


@torch_launcher
def logprob_bwd(
    logits,
    ids,
    active,
    temperature,
    logit_scale,
    logit_softcap,
    logps,
    entropies,
    maxima,
    totals,
    dlogps,
    dentropies,
    dlogits,
):
    """As `grpo_fused.kernels.logprob.logprob_bwd`."""
    positions, V = logits.shape[1:]
    active = _active_rows(active, ids, positions)
    per_token = (ids, temperature, logps, entropies, maxima, totals, dlogps, dentropies)
    ids, temperature, logps, entropies, maxima, totals, dlogps, dentropies = (
        spread(value, ids.shape, positions) for value in per_token
    )
    buffers = Scratch(logits.device)
    for block, x, dx, masked in blocks(logits, dlogits, active):
        target, known = targets(ids[block], V)
        out = buffers("out", x.shape)
        factor = sharpness(at(temperature, block), logit_scale, logit_softcap)
        u, slope = cap(x, logit_scale, logit_softcap, out)
        z = centered(u, maxima[block], factor, out)
        exponents, h, entropy = None, None, None
        if dentropies is not None:
            exponents = torch.clamp(z, min=FLOOR, out=buffers("exponents", x.shape))
            h, entropy = dentropies[block] * factor, entropies[block]
        row = Statistics(exp2_(z), maxima[block], totals[block], logps[block], entropy)
        g = (dlogps[block] * factor).masked_fill(~known, torch.nan)
        write_gradient(dx, masked, row, exponents, target, g, h, slope)


@torch_launcher
def locate(cu_seqlens, active, index, counts):
    """As `grpo_fused.kernels.packing.locate`."""
    sequences = Packed(index[None], active, cu_seqlens)
    index.copy_(sequences.index)
    counts.copy_(sequences.counts)


@torch_launcher
def reduce(terms, active, entropies, loss, sums, metrics):
    """As `grpo_fused.kernels.reduce.reduce`."""
    _, kl, clipped, ratio = terms
    tokens = kl.new_full((), kl.numel()) if active is None else active.count_nonzero().float()
    values = total(terms[0], kl, entropies, clipped, ratio, tokens, tokens)
    for output, value in zip((sums, metrics), values, strict=True):
        output.copy_(value)
    loss.copy_(sums[0])


@torch_launcher
def rescale(dlogits, grad_output, grad_scale):
    """As `grpo_fused.kernels.rescale.rescale`; waits for nothing but a number on the CPU."""
    factor = grad_output / grad_scale
    if factor.device.type != "cpu" or factor != 1.0:
        dlogits.mul_(factor)


linear_loss, linear_logprob_fwd, linear_logprob_bwd = linear_launchers(
    RowLaunchers(fused_loss, logprob_fwd, logprob_bwd), suffix="_torch"
)
