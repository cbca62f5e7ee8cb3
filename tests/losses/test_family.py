"""Every option with every other, drawn at random, against the float64 oracle.

In CI a fixed set of cases; `HYPOTHESIS_PROFILE=long pytest tests/losses/test_family.py` draws new
ones: 10,000 in torch and 3,000 in Triton's interpreter.
"""

import os

import pytest
import torch
from batches import make_batch
from heads import chunk_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing import cu_seqlens, pack, unpack

import oracle
from grpo_fused import LOSSES, Clip, grpo_loss, linear_grpo_loss
from grpo_fused.losses.kl import KL_ESTIMATORS
from grpo_fused.losses.weights import RULES

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", derandomize=True, database=None, **COMMON)
settings.register_profile("long", **COMMON)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(PROFILE)
CASES = {"ci": {"torch": 300, "triton": 40}, "long": {"torch": 10_000, "triton": 3_000}}[PROFILE]

T = 5


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
    options = {
        "loss_type": loss_type,
        "objective": objective,
        "importance_sampling_level": draw(st.sampled_from(objective.levels)),
        "old_logps": draw(st.sampled_from([None, batch.old_logps])),
        "kl_estimator": draw(st.sampled_from(list(KL_ESTIMATORS))),
        "use_bias_correction_kl": draw(st.booleans()),
        "beta": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "logit_softcap": draw(st.sampled_from([None, 8.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.7])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.02])),
        "reduction": draw(st.sampled_from(["sum", "sum", "none"])),
        "num_items_in_batch": draw(st.sampled_from([None, 31])),
        "num_sequences_in_batch": draw(st.sampled_from([None, 7])),
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
    lengths = None
    if draw(st.booleans()):
        lengths = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in mask]
        if sum(lengths) == B:  # (N,) would be taken for (B,)
            lengths[0] += 1 if lengths[0] < T else -1
    return batch, lengths, options


def call(batch, lengths, options, implementation, device, upstream, rows=None):
    """(LossOutput with tokens (B, T), gradient (B, L, V)) of our loss on padded or packed input.

    Given a number of rows, over a head whose logits are its hidden states, in chunks of so many.
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
    inputs = [t.to(device) for t in inputs]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    logits = inputs[0].clone().requires_grad_(True)
    options |= {"compute_entropy": True, "implementation": implementation}
    if rows is None:
        out = grpo_loss(logits, *inputs[1:], **options)
    else:
        weight = torch.eye(logits.shape[-1], device=device)
        out = linear_grpo_loss(
            *(logits, weight, *inputs[1:]), chunk_bytes=chunk_bytes(rows, len(weight)), **options
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


@given(case=cases(), rows=ROWS)
@settings(max_examples=CASES["torch"])
def test_everything_with_everything_in_torch(case, rows, device):
    check(case, rows, "torch", device)


@given(case=cases(), rows=ROWS)
@settings(max_examples=CASES["triton"])
def test_everything_with_everything_in_triton(case, rows, device):
    check(case, rows, "triton", device)


def check(case, rows, implementation, device):
    """Value, gradient, log-probabilities, entropies and metrics against the oracle."""
    batch, lengths, options = case
    upstream = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(1))
    objective = options["objective"]
    oracle_options = options | {
        "objective": type(objective).__name__,
        "knobs": vars(objective),
        "importance_sampling_level": options["importance_sampling_level"],
        "normalizer": options.get("normalizer") or LOSSES[options["loss_type"]].normalizer,
    }
    inputs = (batch.logits, batch.ids, batch.mask, batch.advantages)
    truth = oracle.grpo_loss(*inputs, upstream=upstream, **oracle_options)
    out, grad = call(batch, lengths, options, implementation, device, upstream, rows)

    # Terms of both signs cancel, in the loss and in its gradient: errors are measured against the
    # size of the terms too.
    active = (batch.mask != 0).double()
    weights = upstream.double() * active
    if options["reduction"] == "sum":
        names = ("num_items_in_batch", "num_sequences_in_batch", "max_completion_length")
        divisors = {name: options[name] for name in names}
        rules = (options["normalizer"], options["kl_normalizer"])
        rules = [rule or oracle_options["normalizer"] for rule in rules]
        weights = sum(oracle.token_weights(batch.mask, rule, **divisors) for rule in rules)
    error = (grad.double() - truth.dlogits).norm()
    assert error <= 4e-6 * (truth.dlogits.norm() + 0.5 * weights.norm()), error
    loss, want = out.loss.detach().double().cpu(), torch.as_tensor(truth.loss)
    size = (want.abs() + 5 * active) if loss.dim() else want.abs() + 5 * weights.abs().sum()
    assert ((loss - want).abs() <= 3e-6 * size).all()
    torch.testing.assert_close(out.logps.double().cpu(), truth.logps, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(out.entropies.double().cpu(), truth.entropies, rtol=3e-6, atol=3e-6)
    assert out.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        assert out.metrics[name].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name
