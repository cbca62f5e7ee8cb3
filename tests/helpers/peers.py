"""One batch through TRL's _compute_loss, Liger's triton_grpo_loss and ours."""

import dataclasses
import functools
from collections import defaultdict
from importlib.metadata import version
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from batches import assert_gradients_agree, make_batch

from grpo_fused import Cispo, Clip, Sapo, Vespo, grpo_loss

# Eight sequences, one fully masked. Their old log-probabilities drifted as far as it takes to leave
# every bound of the parity tests on both sides, by token and by sequence.
LENGTHS = (6, 4, 0, 3, 5, 1, 6, 2)
DRIFTS = (-0.6, 0.1, 0.0, 0.5, -0.9, 0.1, -0.1, 0.05)
ADVANTAGES = (1.1, 0.0, 0.7, -0.9, -1.3, 0.6, -0.5, 0.8)

KL = ({"beta": 0.0}, {"beta": 0.1}, {"beta": 0.1, "use_bias_correction_kl": True})
# The bounds of every comparison; both peers call the bound of Cispo epsilon_high.
OBJECTIVES = {"cispo": Cispo(1.5), "sapo": Sapo(), "vespo": Vespo()}
EPSILON_LOW, EPSILON_HIGH = 0.2, {"cispo": 1.5}


class PeerLoss(NamedTuple):
    """What a peer makes of a batch: value, gradient to the logits, its metrics by its own names."""

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
    """(LossOutput, gradient to the logits) of ours; per token if an upstream gradient is given."""
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
    """Value, both kinds of columns of the gradient, and every metric that both report.

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
    """Peers change their arithmetic between releases: another one proves nothing."""
    found = version(package)
    if not (found + ".").startswith(release + "."):
        raise RuntimeError(f"the parity tests hold for {package} {release}, installed is {found}")


def drifted_batch(seed=0, *, per_token=False, device="cpu"):
    """make_batch with sequences that drifted as a whole, one of them fully masked."""
    mask = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()
    batch = make_batch(8, 6, 37, mask=mask, per_token=per_token, seed=seed, device=device)
    batch.old_logps += torch.tensor(DRIFTS, device=device)[:, None]
    if not per_token:
        batch.advantages.copy_(torch.tensor(ADVANTAGES))
    return batch


def rollout_ratios(batch, seed=0):
    """Ratios of token level (one of them 0, NaN under the mask) and of sequence level, by name."""
    generator = torch.Generator().manual_seed(seed)
    token, sequence = (
        (0.4 * torch.randn(shape, generator=generator)).exp().to(batch.logits.device)
        for shape in (batch.ids.shape, (len(batch.ids), 1))
    )
    token[4, 2] = 0.0
    return {"(B, T)": token.masked_fill(batch.mask == 0, torch.nan), "(B, 1)": sequence}


def harmless(batch, tensor, fill=0.0):
    """A copy that is `fill` under the mask: the peers multiply by the mask, and 0 * NaN is NaN."""
    if tensor is None or tensor.shape[:2] != batch.mask.shape:
        return tensor
    return tensor.masked_fill(batch.mask == 0, fill)


def leaf_logits(batch, dtype):
    """The logits as a leaf of that dtype, all finite."""
    T = batch.ids.shape[1]
    logits = torch.zeros_like(batch.logits, dtype=dtype)
    hidden = (batch.mask == 0)[..., None]
    logits[:, :T] = batch.logits[:, :T].to(dtype).masked_fill(hidden, 0.0)
    return logits.requires_grad_(True)


@functools.cache
def trl_trainer():
    """(the module of TRL's GRPOTrainer, the defaults of its configuration by name)."""
    require("trl", "1.16")
    import trl.trainer.grpo_trainer as module

    return module, {field.name: field.default for field in dataclasses.fields(module.GRPOConfig)}


class OneProcess:
    """What _compute_loss asks of an Accelerator when there is nobody else."""

    num_processes = 1
    sync_gradients = True

    def gather(self, tensor):
        return tensor

    def reduce(self, tensor, reduction):
        return tensor

    def pad_across_processes(self, tensor, dim, pad_index):
        return tensor


def trl_loss(
    batch,
    *,
    loss_type,
    level="token",
    delta=None,
    beta=0.0,
    use_bias_correction_kl=False,
    importance_sampling_ratio=None,
    entropy_coef=0.0,
    off_policy_threshold=None,
    top_entropy_quantile=1.0,
    temperature=1.0,
    max_completion_length=None,
    num_items_in_batch=None,
    accumulation_steps=1,
    steps_per_generation=None,
    padding=0.0,
    dtype=torch.float64,
):
    """GRPOTrainer._compute_loss, unmodified, on a trainer that was never initialised.

    The only piece replaced is the model: log-probabilities and entropies are torch's, of a leaf of
    `dtype`. TRL leaves temperature to the model, so it is applied here.
    """
    module, defaults = trl_trainer()
    logits = leaf_logits(batch, dtype)
    ids = batch.ids.masked_fill(batch.mask == 0, 0)
    T = ids.shape[1]

    def forward(*args, **kwargs):
        logp = (logits[:, :T] / temperature).log_softmax(-1)
        return logp.gather(-1, ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1), None

    trainer = object.__new__(module.GRPOTrainer)
    trainer.args = SimpleNamespace(
        **defaults
        | {
            "delta": delta,
            "use_bias_correction_kl": use_bias_correction_kl,
            "steps_per_generation": steps_per_generation or accumulation_steps,
        }
    )
    vars(trainer).update(
        _get_per_token_logps_and_entropies=forward,
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=entropy_coef != 0.0,
        accelerator=OneProcess(),
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=accumulation_steps,
        entropy_coef=entropy_coef,
        epsilon_low=EPSILON_LOW,
        epsilon_high=EPSILON_HIGH.get(loss_type, 0.28),
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=T if max_completion_length is None else max_completion_length,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=off_policy_threshold,
        top_entropy_quantile=top_entropy_quantile,
        use_adaptive_entropy=False,
        use_vllm=importance_sampling_ratio is not None,
        vllm_importance_sampling_correction=True,
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
    if importance_sampling_ratio is not None:
        # 1 is what TRL itself puts under the mask.
        ratio = harmless(batch, importance_sampling_ratio, fill=1.0)
        inputs["importance_sampling_ratio"] = ratio.to(dtype)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    names = {"cispo_clip_ratio": "clip_ratio/high_mean"}
    metrics = {names.get(name, name): value for name, (value,) in trainer._metrics["train"].items()}
    return PeerLoss(loss.detach(), logits.grad, metrics)


def trl_entropy_mask(entropies, mask, share):
    """TRL's own mask of the share of active tokens with the highest entropies."""
    trainer = SimpleNamespace(accelerator=OneProcess())
    get = trl_trainer()[0].GRPOTrainer.get_high_entropy_mask
    return get(trainer, entropies, mask, 1 - share)


@functools.cache
def triton_grpo_loss():
    """Liger's function; its kernels run in Triton's interpreter where conftest found no GPU."""
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
    """Liger's triton_grpo_loss: reduced, or per token (B, T) where an upstream gradient is given.

    It wants contiguous tensors and T + 1 positions, and overwrites the logits unless told not to.
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
