"""Run one batch through TRL's _compute_loss, Liger's triton_grpo_loss and grpo_loss."""

import dataclasses
import functools
import os
from collections import defaultdict
from importlib.metadata import version
from itertools import combinations, product
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from batches import assert_gradients_agree, make_batch

from grpo_fused import Cispo, Clip, Sapo, Vespo, grpo_loss

# Eight sequences, one fully masked. The drift of their old log-probabilities takes some ratios out
# of every bound of the parity tests, on both sides, at token and at sequence level.
LENGTHS = (6, 4, 0, 3, 5, 1, 6, 2)
DRIFTS = (-0.6, 0.1, 0.0, 0.5, -0.9, 0.1, -0.1, 0.05)
ADVANTAGES = (1.1, 0.0, 0.7, -0.9, -1.3, 0.6, -0.5, 0.8)

KL = ({"beta": 0.0}, {"beta": 0.1}, {"beta": 0.1, "use_bias_correction_kl": True})
# The bounds of every comparison; both peers call the bound of Cispo epsilon_high.
OBJECTIVES = {"cispo": Cispo(1.5), "sapo": Sapo(), "vespo": Vespo()}
EPSILON_LOW, EPSILON_HIGH = 0.2, {"cispo": 1.5}


def pairwise(*columns):
    """Yield a few combinations in which every pair of values of any two columns occurs."""

    def pairs_of(row):
        return set(combinations(enumerate(row), 2))

    rows = list(product(*(range(len(column)) for column in columns)))
    missing = set().union(*map(pairs_of, rows))
    while missing:
        best = max(rows, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        yield tuple(column[i] for column, i in zip(columns, best, strict=True))


# Kernels take milliseconds on a GPU, seconds in the interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
slow_if_interpreted = [pytest.mark.slow] if INTERPRETED else []

# Options are combined pairwise; `pytest --slow` takes their full product as well.
each_cover = pytest.mark.parametrize(
    "cover", [pairwise, pytest.param(product, marks=pytest.mark.slow)], ids=["pairs", "product"]
)


class PeerLoss(NamedTuple):
    """Result of a peer: value, gradient of the logits, metrics by the names of the peer."""

    loss: torch.Tensor
    dlogits: torch.Tensor
    metrics: dict


def fused_loss(
    batch,
    implementation="torch",
    *,
    loss_type,
    level="token",
    delta=None,
    upstream=None,
    ids=None,
    **options,
):
    """Run grpo_loss: (LossOutput, gradient of the logits); reduction="none" given upstream."""
    logits = batch.leaf()
    out = grpo_loss(
        logits,
        batch.ids if ids is None else ids,
        batch.mask,
        batch.advantages,
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        loss_type=loss_type,
        objective=OBJECTIVES.get(loss_type, Clip(EPSILON_LOW, 0.28, delta)),
        importance_sampling_level=level,
        reduction="sum" if upstream is None else "none",
        compute_entropy=True,
        implementation=implementation,
        **options,
    )
    out.loss.backward(upstream)
    return out, logits.grad


def assert_parity(out, dlogits, peer, ids, *, value=1e-6, gradient=2e-6, metrics=3e-6):
    """Compare value, gradient (labels and other columns apart) and the metrics that both report.

    The loss is a sum of terms of both signs: its error is measured against their size.
    """
    size = peer.loss.abs().sum() + peer.dlogits.abs().sum()
    error = (out.loss - peer.loss).abs().sum() / size
    assert error < value, f"value: error {error:.2e} of its terms"
    assert_gradients_agree(dlogits, peer.dlogits, ids, gradient)
    for name in peer.metrics.keys() & out.metrics.keys():
        wanted = pytest.approx(peer.metrics[name], rel=metrics, abs=1e-7)
        assert out.metrics[name].item() == wanted, name


def require(package, release):
    """Raise unless that release is installed: peers change their arithmetic between releases."""
    found = version(package)
    if not (found + ".").startswith(release + "."):
        raise RuntimeError(f"parity tests are written for {package} {release}, got {found}")


def drifted_batch(seed=0, *, per_token=False, device="cpu"):
    """Make a batch whose sequences drifted by DRIFTS, one of them fully masked."""
    mask = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()
    batch = make_batch(8, 6, 37, mask=mask, per_token=per_token, seed=seed, device=device)
    batch.old_logps += torch.tensor(DRIFTS, device=device)[:, None]
    if not per_token:
        batch.advantages.copy_(torch.tensor(ADVANTAGES))
    return batch


def rollout_ratios(batch, seed=0):
    """Make token ratios (one of them 0, NaN under the mask) and sequence ratios, by shape."""
    generator = torch.Generator().manual_seed(seed)
    token, sequence = (
        (0.4 * torch.randn(shape, generator=generator)).exp().to(batch.logits.device)
        for shape in (batch.ids.shape, (len(batch.ids), 1))
    )
    token[4, 2] = 0.0
    return {"(B, T)": token.masked_fill(batch.mask == 0, torch.nan), "(B, 1)": sequence}


def harmless(batch, tensor, fill=0.0):
    """Copy a tensor with `fill` under the mask: peers multiply by the mask, and 0 * NaN is NaN."""
    if tensor is None or tensor.shape[:2] != batch.mask.shape:
        return tensor
    return tensor.masked_fill(batch.mask == 0, fill)


def leaf_logits(batch, dtype):
    """Copy the logits to a leaf of that dtype, all finite."""
    T = batch.ids.shape[1]
    logits = torch.zeros_like(batch.logits, dtype=dtype)
    hidden = (batch.mask == 0)[..., None]
    logits[:, :T] = batch.logits[:, :T].to(dtype).masked_fill(hidden, 0.0)
    return logits.requires_grad_(True)


@functools.cache
def trl_trainer():
    """Import TRL: (module of GRPOTrainer, defaults of GRPOConfig by name)."""
    require("trl", "1.16")
    import trl.trainer.grpo_trainer as module

    return module, {field.name: field.default for field in dataclasses.fields(module.GRPOConfig)}


class OneProcess:
    """The part of an Accelerator that _compute_loss uses, for one process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, tensor):
        return tensor

    def reduce(self, tensor, reduction):
        return tensor

    def pad_across_processes(self, tensor, dim, pad_index):
        return tensor


# Attributes and configuration of a GRPOTrainer that `trl_loss` lets its callers set.
TRL_SETTINGS = {
    "accumulation_steps": 1,
    "beta": 0.0,
    "delta": None,
    "entropy_coef": 0.0,
    "max_completion_length": None,
    "off_policy_mask_threshold": None,
    "steps_per_generation": None,
    "top_entropy_quantile": 1.0,
    "use_bias_correction_kl": False,
}


def make_trl_trainer(forward, *, loss_type, level, T, corrected, **settings):
    """Make a GRPOTrainer with what _compute_loss reads, without initialising it.

    Args:
        forward: replaces the model: () -> (log-probabilities, entropies, None).
        loss_type, level: as `grpo_loss`.
        T: the default of max_completion_length.
        corrected: whether the inputs have an importance_sampling_ratio.
        settings: values that replace those of TRL_SETTINGS.
    """
    module, defaults = trl_trainer()
    if unknown := settings.keys() - TRL_SETTINGS.keys():
        raise TypeError(f"settings must be among {sorted(TRL_SETTINGS)}, got {sorted(unknown)}")
    settings = TRL_SETTINGS | settings
    steps = settings["accumulation_steps"]
    arguments = {
        "delta": settings["delta"],
        "use_bias_correction_kl": settings["use_bias_correction_kl"],
        "steps_per_generation": settings["steps_per_generation"] or steps,
    }
    trainer = object.__new__(module.GRPOTrainer)
    trainer.args = SimpleNamespace(**defaults | arguments)
    length = settings["max_completion_length"]
    vars(trainer).update(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: forward(),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=settings["entropy_coef"] != 0.0,
        accelerator=OneProcess(),
        aux_loss_enabled=False,
        beta=settings["beta"],
        current_gradient_accumulation_steps=steps,
        entropy_coef=settings["entropy_coef"],
        epsilon_low=EPSILON_LOW,
        epsilon_high=EPSILON_HIGH.get(loss_type, 0.28),
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=T if length is None else length,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=settings["off_policy_mask_threshold"],
        top_entropy_quantile=settings["top_entropy_quantile"],
        use_adaptive_entropy=False,
        use_vllm=corrected,
        vllm_importance_sampling_correction=True,
    )
    return trainer


def trl_loss(
    batch,
    *,
    loss_type,
    level="token",
    importance_sampling_ratio=None,
    temperature=1.0,
    num_items_in_batch=None,
    padding=0.0,
    dtype=torch.float64,
    **settings,
):
    """Run TRL's GRPOTrainer._compute_loss, unmodified, on a leaf of `dtype`.

    Only the model is replaced: log-probabilities and entropies are computed by torch. TRL leaves
    the temperature to the model, so it is applied here. `settings`: see TRL_SETTINGS.
    """
    logits = leaf_logits(batch, dtype)
    ids = batch.ids.masked_fill(batch.mask == 0, 0)
    T = ids.shape[1]

    def forward():
        logp = (logits[:, :T] / temperature).log_softmax(-1)
        return logp.gather(-1, ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1), None

    corrected = importance_sampling_ratio is not None
    trainer = make_trl_trainer(
        forward, loss_type=loss_type, level=level, T=T, corrected=corrected, **settings
    )
    items = batch.mask.sum() if num_items_in_batch is None else torch.tensor(num_items_in_batch)
    inputs = {
        "prompt_ids": ids[:, :0],
        "prompt_mask": batch.mask[:, :0],
        "completion_ids": ids,
        "completion_mask": batch.mask,
        "advantages": harmless(batch, batch.advantages).to(dtype),
        "num_items_in_batch": items,
        "ref_per_token_logps": harmless(batch, batch.ref_logps).to(dtype),
    }
    if batch.old_logps is not None:
        inputs["old_per_token_logps"] = harmless(batch, batch.old_logps, padding).to(dtype)
    if corrected:
        # TRL itself puts 1 under the mask.
        ratio = harmless(batch, importance_sampling_ratio, fill=1.0)
        inputs["importance_sampling_ratio"] = ratio.to(dtype)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    names = {"cispo_clip_ratio": "clip_ratio/high_mean"}
    metrics = {names.get(name, name): value for name, (value,) in trainer._metrics["train"].items()}
    return PeerLoss(loss.detach(), logits.grad, metrics)


def trl_entropy_mask(entropies, mask, share):
    """Compute TRL's mask of the share of active tokens with the highest entropies."""
    trainer = SimpleNamespace(accelerator=OneProcess())
    get = trl_trainer()[0].GRPOTrainer.get_high_entropy_mask
    return get(trainer, entropies, mask, 1 - share)


@functools.cache
def triton_grpo_loss():
    """Import Liger's function, whose kernels run in Triton's interpreter without a GPU."""
    require("liger-kernel", "0.8.5")
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    return triton_grpo_loss


def liger_loss(
    batch,
    *,
    loss_type,
    level="token",
    ids=None,
    importance_sampling_ratio=None,
    upstream=None,
    **options,
):
    """Run Liger's triton_grpo_loss, reduced, or per token (B, T) given an upstream gradient.

    It needs contiguous tensors and T + 1 positions, and overwrites the logits by default.
    """
    logits = leaf_logits(batch, torch.float32)
    ratio = importance_sampling_ratio
    result = triton_grpo_loss()(
        logits,
        None if batch.old_logps is None else harmless(batch, batch.old_logps).contiguous(),
        harmless(batch, batch.ref_logps).contiguous(),
        batch.ids.masked_fill(batch.mask == 0, 0) if ids is None else ids,
        batch.advantages,
        batch.mask.contiguous(),
        **{"temperature": 1.0, "beta": 0.0} | options,
        eps_low=EPSILON_LOW,
        eps_high=EPSILON_HIGH.get(loss_type, 0.28),
        inplace=False,
        loss_type=loss_type,
        importance_sampling_level=level,
        reduce=upstream is None,
        vllm_is_ratio=None if ratio is None else harmless(batch, ratio, fill=1.0),
    )
    if upstream is None:
        loss, values = result
        loss.backward()
        names = ["kl", "clip_ratio/region_mean"][-len(values) :]
        metrics = {name: value.item() for name, value in zip(names, values, strict=True)}
    else:
        loss, _, _ = result
        loss.backward(upstream)
        metrics = {}
    return PeerLoss(loss.detach(), logits.grad, metrics)
