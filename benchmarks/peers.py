"""Other projects' losses, of the signature of `providers` and `linear_providers`.

Each is imported when it is called. One that is not installed, or does not support a case, raises an
exception, which `record.attempt` reports in the place of figures.
"""

import warnings

import torch
import torch.nn.functional as F

from benchmarks import providers
from benchmarks.providers import NotSupported, need

DISTRIBUTIONS = ("trl", "liger-kernel", "quack-kernels", "cut-cross-entropy", "fla-core")
# These take logits of T + 1 positions, the last without meaning, as TRL's trainer once made them.
ONE_MORE_POSITION = ("liger", "liger_inplace", "fla")


def on_gpu(tensor):
    """Triton kernels need a GPU; tests run them in the interpreter."""
    from grpo_fused.kernels.launch import INTERPRETED

    need(tensor.is_cuda or INTERPRETED, "needs a GPU")


def trl(logits, ids, mask, *tokens, entropy_coef=0.0, **formula):
    """TRL 1.16's kernel for log-probabilities and entropies, and its loss."""
    logps, entropies = trl_logps(logits, ids, mask, True)
    if not entropy_coef:
        entropies = None
    return providers.surrogate(
        logps, mask, *tokens, entropies, entropy_coef=entropy_coef, **formula
    )


def trl_logps(logits, ids, mask, entropy):
    """It always computes both."""
    from trl.kernels import selective_log_softmax_and_entropy

    on_gpu(logits)
    logps, entropies = selective_log_softmax_and_entropy(logits, ids, row_mask=mask)
    return logps, entropies if entropy else None


def liger(
    logits, ids, mask, advantages, old_logps, *, level="token", entropy_coef=0.0, inplace=False
):
    """Liger 0.8.5's triton_grpo_loss over (B, T + 1, V) logits."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    on_gpu(logits)
    need(not entropy_coef, "no entropy bonus")
    return triton_grpo_loss(
        *(logits, old_logps, None, ids, advantages, mask),
        temperature=1.0,
        beta=0.0,
        eps_low=providers.EPSILON,
        eps_high=providers.EPSILON,
        inplace=inplace,
        loss_type="grpo",
        importance_sampling_level=level,
        reduce=True,
    )[0]


def liger_inplace(logits, *tokens, **formula):
    """With its default, inplace=True."""
    return liger(providers.Output.apply(logits), *tokens, inplace=True, **formula)


def fla(logits, ids, mask, advantages, old_logps, *, level="token", entropy_coef=0.0):
    """flash-linear-attention's loss per token: on policy only, its ratio is always 1."""
    from fla.modules.grpo import fused_grpo_loss

    need(logits.is_cuda, "needs a GPU")
    need(old_logps is None, "no old log-probabilities")
    need(level == "token" and not entropy_coef, "ratios of tokens only, no entropy bonus")
    losses = fused_grpo_loss(
        *(logits, torch.zeros_like(ids, dtype=torch.float32), ids, advantages),
        beta=0.0,
        completion_mask=mask,
    )
    return (losses.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


def quack(logits, ids, mask, *tokens, entropy_coef=0.0, **formula):
    """QuACK's cross-entropy, which is the negative log-probability, and TRL's loss on it."""
    need(not entropy_coef, "no entropies")
    logps, _ = quack_logps(logits, ids, mask, False)
    return providers.surrogate(logps, mask, *tokens, **formula)


def quack_logps(logits, ids, mask, entropy):
    from quack.cross_entropy import cross_entropy

    need(logits.is_cuda, "needs a GPU")
    need(not entropy, "no entropies")
    labels = ids.masked_fill(mask == 0, -100).flatten()
    return -cross_entropy(logits.flatten(0, 1), labels, reduction="none").view(ids.shape), None


def cce(hidden, weight, ids, mask, *tokens, **formula):
    """Apple's cut cross-entropy over hidden states, and TRL's loss on it."""
    logps, _ = cce_logps(hidden, weight, ids, mask, False)
    return providers.surrogate(logps, mask, *tokens, **formula)


def cce_logps(hidden, weight, ids, mask, entropy):
    """Without its gradient filter: exact, as the others are."""
    from cut_cross_entropy import linear_cross_entropy

    need(hidden.is_cuda, "needs a GPU")
    need(not entropy, "no entropies")
    labels = ids.masked_fill(mask == 0, -100)
    losses = linear_cross_entropy(hidden, weight, labels, reduction="none", filter_eps=None)
    return -losses.view(ids.shape), None


def torch_linear(hidden, weight, ids, mask, *tokens, **formula):
    """torch's own chunked head with a cross-entropy, and TRL's loss on it."""
    logps, _ = torch_linear_logps(hidden, weight, ids, mask, False)
    return providers.surrogate(logps, mask, *tokens, **formula)


def torch_linear_logps(hidden, weight, ids, mask, entropy):
    """Chunked as it chooses itself; it warns, and here fails, where it would not chunk."""
    need(hasattr(F, "linear_cross_entropy"), "needs torch 2.13")
    need(not entropy, "no entropies")
    labels = ids.masked_fill(mask == 0, -100).flatten()
    options = {"reduction": "none", "options": torch.nn.LinearCrossEntropyOptions()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*linear_cross_entropy", category=UserWarning)
        losses = F.linear_cross_entropy(hidden.flatten(0, 1), weight, labels, **options)
    return -losses.view(ids.shape), None


def liger_linear(hidden, weight, ids, mask, advantages, old_logps, *, level="token"):
    """Liger's fused linear loss, a sequence at a time and, on a GPU, compiled: its defaults."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=hidden.is_cuda,
        use_ref_model=False,
        loss_type="grpo",
        epsilon_low=providers.EPSILON,
        epsilon_high=providers.EPSILON,
        importance_sampling_level=level,
    )
    return loss(hidden, weight, ids, mask, advantages, old_per_token_logps=old_logps)[0]


def quack_linear(hidden, *batch, **formula):
    """QuACK's chunked linear cross-entropy returns a sum or a mean, not a value per token."""
    import quack.linear_cross_entropy  # noqa: F401

    raise NotSupported("no values per token")
