"""Batches such as training makes: a policy a few steps from the one that sampled."""

from dataclasses import dataclass

import torch


@dataclass
class Batch:
    """Arguments of grpo_loss; everything under the mask is NaN, or an id that does not exist."""

    logits: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    old_logps: torch.Tensor
    ref_logps: torch.Tensor
    sampling_logps: torch.Tensor

    def leaf(self):
        """The logits as a leaf that wants a gradient."""
        return self.logits.detach().clone().requires_grad_(True)


def make_batch(
    B=4,
    T=6,
    V=97,
    *,
    dtype=torch.float32,
    extra=1,
    mask=None,
    per_token=False,
    seed=0,
    device="cpu",
):
    """(B, T + extra, V) logits of a peaked policy, ids mostly sampled from it, masked prefixes.

    Old log-probabilities differ by 0.3 (5 to 40 % of tokens clipped, on both sides, see
    test_loss), reference ones by 0.4, the sampler's by 0.2 from the old. The second advantage is 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    logits = (2.5 * normal(B, T + extra, V)).to(dtype)
    logp = logits[:, :T].double().log_softmax(-1)
    ids = torch.multinomial(logp.exp().flatten(0, 1), 1, generator=generator).view(B, T)
    ids[torch.rand(B, T, generator=generator) < 0.2] = V - 1
    chosen = logp.gather(-1, ids[..., None])[..., 0]
    old_logps = (chosen + 0.3 * normal(B, T)).float()
    ref_logps = (chosen + 0.4 * normal(B, T)).float()
    advantages = normal(B, T) if per_token else normal(B)
    if B > 1:
        advantages[1] = 0.0
    if mask is None:
        lengths = torch.randint(1, T + 1, (B,), generator=generator)
        lengths[0] = T
        mask = (torch.arange(T) < lengths[:, None]).long()
    sampling_logps = (old_logps + 0.2 * normal(B, T)).clamp(max=0.0)
    hidden = mask == 0
    ids[hidden] = -100
    logits[:, :T][hidden] = torch.nan
    logits[:, T:] = torch.nan
    logps = (old_logps, ref_logps, sampling_logps)
    for tensor in logps + ((advantages,) if per_token else ()):
        tensor[hidden] = torch.nan
    return Batch(*(t.to(device) for t in (logits, ids, mask, advantages, *logps)))


def relative_error(got, want):
    """Norm of the difference over the norm of what is wanted, in float64; 0 if both are 0."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    norm = want.norm()
    return ((got - want).norm() / (norm if norm > 0 else 1.0)).item()


def assert_gradients_agree(got, want, ids, tolerance):
    """Label columns and the others apart: each would hide an error in the other."""
    labels = torch.zeros(want.shape, dtype=torch.bool)
    T = ids.shape[1]
    rows = ids.cpu().clamp(min=0)[..., None]
    labels[:, :T].scatter_(2, rows, True)
    for name, columns in (("label", labels), ("other", ~labels)):
        error = relative_error(got.cpu()[columns], want.cpu()[columns])
        assert error < tolerance, f"{name} columns: relative error {error:.2e}"
