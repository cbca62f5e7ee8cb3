"""Random cases of every option with every other, for `hypothesis`, and a call on one of them."""

import torch
from batches import make_batch
from heads import chunk_bytes
from hypothesis import HealthCheck
from hypothesis import strategies as st
from packing import cu_seqlens, pack, unpack

import oracle
from grpo_fused import (
    LOSSES,
    Clip,
    ClipCov,
    Fipo,
    Ipo,
    KlCov,
    M2po,
    grpo_loss,
    linear_grpo_loss,
)
from grpo_fused.losses.kl import KL_ESTIMATORS
from grpo_fused.losses.weights import RULES
from grpo_fused.support import support_from_mask

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
T = 5
# Parameters that reach what those of the rows do not in so few tokens.
OTHERS = {
    ClipCov: [ClipCov(share=0.3, low=-0.5, high=4.0), ClipCov(0.1, 0.1, 0.7, 0.0)],
    KlCov: [KlCov(0.3), KlCov(0.6, 0.2)],
    M2po: [M2po(0.01), M2po(1e-4)],
    Fipo: [Fipo(half_life=2.0, min_weight=0.5, max_weight=2.0, delta=1.3, safety=1.1)],
    Ipo: [Ipo(0.02, 0.3)],
}


@st.composite
def cases(draw):
    """Arguments of a call: (batch, lengths or None, options), tensors made from a drawn seed."""
    seed = draw(st.integers(0, 2**20))
    B = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    mask = (rand(B, T) < draw(st.sampled_from([0.3, 0.8, 1.1]))).long()
    batch = make_batch(
        B,
        T,
        draw(st.sampled_from([3, 17, 97])),
        extra=draw(st.booleans()),
        mask=mask,
        per_token=draw(st.booleans()),
        seed=seed,
    )
    shapes = st.sampled_from([None, (B,), (B, 1), (B, T)])

    def values(shape, low, high):
        """Anything from low to high, NaN under the mask."""
        made = low + (high - low) * rand(*shape)
        return made.masked_fill(mask == 0, torch.nan) if shape == (B, T) else made

    loss_type = draw(st.sampled_from(list(LOSSES)))
    row = LOSSES[loss_type]
    objective = row.objective
    if isinstance(objective, Clip):
        deltas = st.sampled_from([None, 1.1, 2.0])
        objective = Clip(objective.epsilon_low, objective.epsilon_high, draw(deltas))
    if others := OTHERS.get(type(objective)):
        objective = draw(st.sampled_from([objective, *others]))
    options = {
        "loss_type": loss_type,
        "objective": objective,
        "importance_sampling_level": draw(st.sampled_from(objective.levels)),
        "old_logps": draw(st.sampled_from([None, batch.old_logps])),
        "sampling_logps": draw(st.sampled_from([None, batch.sampling_logps])),
        "kl_estimator": draw(st.sampled_from(list(KL_ESTIMATORS))),
        "use_bias_correction_kl": draw(st.booleans()),
        "beta": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "logit_softcap": draw(st.sampled_from([None, 8.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.7])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.02])),
        "reduction": draw(st.sampled_from(["sum", "sum", "none"])),
        "num_items_in_batch": draw(st.sampled_from([None, 31])),
        "num_sequences_in_batch": draw(st.sampled_from([None, 7])),
        "num_entropy_items_in_batch": draw(st.sampled_from([None, 13])),
        "max_completion_length": draw(st.sampled_from([T, 9])),
    }
    if options["beta"] or draw(st.booleans()):
        options["ref_logps"] = batch.ref_logps
    if options["reduction"] == "sum":
        rules = st.sampled_from([None, *RULES])
        options |= {"normalizer": draw(rules), "kl_normalizer": draw(rules)}
    if shape := draw(shapes):
        options["importance_sampling_ratio"] = values(shape, 0.1, 2.0)
    if shape := draw(shapes):
        options["policy_mask"] = rand(*shape) < 0.7
    if shape := draw(st.sampled_from([None, (B,), (B, T)])):
        options["temperature"] = values(shape, 0.6, 1.5)
    else:
        options["temperature"] = draw(st.sampled_from([1.0, 0.6]))
    if draw(st.booleans()):
        V = batch.logits.shape[-1]
        kept = rand(B, T, V) < draw(st.sampled_from([0.1, 0.5]))
        options["kept"] = kept.scatter(2, batch.ids.clamp(min=0)[..., None], True)
        softmaxes = st.sampled_from(["support", "vocabulary"])
        options |= {f"{term}_over": draw(softmaxes) for term in ("policy", "kl", "entropy")}
        # What is compared with log-probabilities over the support is over it too, or ratios of
        # thousands would cancel in the loss.
        x = batch.logits[:, :T].double()
        mass = x.logsumexp(2) - x.masked_fill(~options["kept"], -torch.inf).logsumexp(2)
        over = {"old_logps": "policy", "sampling_logps": "policy", "ref_logps": "kl"}
        for name, term in over.items():
            if options.get(name) is not None and options[f"{term}_over"] == "support":
                options[name] = (options[name] + mass).float()
    lengths = None
    if draw(st.booleans()):
        lengths = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in mask]
        if sum(lengths) == B:  # (N,) would be taken for (B,)
            lengths[0] += 1 if lengths[0] < T else -1
    return batch, lengths, options


def call(batch, lengths, options, implementation, device, upstream, rows=None, columns=None):
    """(LossOutput with tokens (B, T), gradient (B, L, V)) of our loss on padded or packed input.

    Given a number of rows, over a head whose logits are its hidden states, in chunks of so many.
    Given columns, with those of this rank alone; other columns of the gradient are 0.
    """
    inputs = (batch.logits, batch.ids, batch.mask, batch.advantages)
    B, shape = len(batch.ids), batch.mask.shape
    if lengths is not None:

        def packed(t):
            per_token = isinstance(t, torch.Tensor) and t.dim() >= 2 and t.shape[:2] != (B, 1)
            return pack(lengths, t[:, :T])[0] if per_token else t

        inputs = [packed(t) for t in inputs]
        options = {name: packed(value) for name, value in options.items()}
        options["cu_seqlens"] = cu_seqlens(lengths, "cpu")
        upstream = packed(upstream)
    options = dict(options)
    if "kept" in options:
        options["support"] = support_from_mask(options.pop("kept").to(device))
    inputs = [t.to(device) for t in inputs]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    logits = inputs[0].clone().requires_grad_(True)
    options |= {"compute_entropy": True, "implementation": implementation}
    columns = slice(None) if columns is None else columns
    if rows is None:
        out = grpo_loss(logits[..., columns], *inputs[1:], **options)
    else:
        V = logits.shape[-1]
        weight = torch.eye(V, device=device)[columns]
        out = linear_grpo_loss(
            *(logits, weight, *inputs[1:]), chunk_bytes=chunk_bytes(rows, V), **options
        )
    out.loss.backward(upstream.to(device) if out.loss.dim() else None)
    grad = logits.grad.cpu()
    if lengths is not None:
        widened = [t if t.dim() == 0 else unpack(lengths, T, t) for t in (out.loss, *out[3:])]
        out = out._replace(loss=widened[0], logps=widened[1], entropies=widened[2])
        grad = unpack(lengths, batch.logits.shape[1], grad)
    assert out.logps.shape == shape
    return out, grad


ROWS = st.sampled_from([None, 1, 4, 5, 100])


def rule_of(options):
    return options.get("normalizer") or LOSSES[options["loss_type"]].normalizer


def size_of_terms(batch, options, upstream):
    """(B, T) what the losses of the tokens are multiplied by, of the policy and of the KL.

    Terms of both signs cancel, in a loss and in its gradient: errors are measured against the size
    of the terms, too.
    """
    if options["reduction"] == "none":
        return upstream.double() * (batch.mask != 0)
    names = ("num_items_in_batch", "num_sequences_in_batch", "max_completion_length")
    divisors = {name: options[name] for name in names}
    rules = (options["normalizer"], options["kl_normalizer"])
    rules = [rule or rule_of(options) for rule in rules]
    return sum(oracle.token_weights(batch.mask, rule, **divisors) for rule in rules)
