"""What is timed over hidden states and a head: losses and log-probabilities of one signature.

A loss is `(hidden, weight, ids, mask, advantages, old_logps) -> ()`, that of `providers`,
differentiable in hidden (B, T, H) and weight (V, H).

`trl` is what TRL 1.16's `add_fused_lm_head` runs (`trl/trainer/utils.py`): tiles of 32,768 columns,
over the active rows on a GPU, over all rows on a CPU. `trl_active` is the same function over the
active rows, on a CPU too.
"""

import torch

from benchmarks import providers
from grpo_fused import Clip, linear_grpo_loss, linear_selective_log_softmax
from grpo_fused.kernels.linear import chunk_limit, chunk_rows, logits_memory
from grpo_fused.sources import default_chunk_bytes

TRL_COLUMNS = 32_768


def fused(hidden, weight, ids, mask, advantages, old_logps):
    return linear_grpo_loss(
        hidden, weight, ids, mask, advantages, old_logps=old_logps, loss_type="grpo"
    ).loss


def eager(hidden, weight, *tokens):
    return providers.eager(hidden @ weight.T, *tokens)


def trl(hidden, weight, ids, mask, advantages, old_logps):
    logps, _ = trl_logps(hidden, weight, ids, mask, entropy=False)
    return providers.surrogate(logps, mask, advantages, old_logps)


def trl_active(hidden, weight, ids, mask, advantages, old_logps):
    logps, _ = trl_active_logps(hidden, weight, ids, mask, entropy=False)
    return providers.surrogate(logps, mask, advantages, old_logps)


def liger(hidden, weight, ids, mask, advantages, old_logps):
    """A sequence at a time and, on a GPU, compiled: its defaults."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=hidden.is_cuda, use_ref_model=False, loss_type="grpo"
    )
    return loss(hidden, weight, ids, mask, advantages, old_per_token_logps=old_logps)[0]


def fused_gspo(hidden, weight, ids, mask, advantages, old_logps):
    return linear_grpo_loss(
        *(hidden, weight, ids, mask, advantages),
        old_logps=old_logps,
        loss_type="gspo",
        objective=Clip(providers.EPSILON, providers.EPSILON),
    ).loss


def eager_gspo(hidden, weight, ids, mask, advantages, old_logps):
    logps, _ = providers.eager_logps(hidden @ weight.T, ids, mask, entropy=False)
    return sequence_surrogate(logps, mask, advantages, old_logps)


def sequence_surrogate(logps, mask, advantages, old_logps):
    """As `providers.surrogate`, with the ratio of whole sequences."""
    total = ((logps - old_logps) * mask).sum(-1)
    ratio = torch.exp(total / mask.sum(-1).clamp(min=1.0))
    bounded = torch.clamp(ratio, 1 - providers.EPSILON, 1 + providers.EPSILON)
    return -torch.min(ratio * advantages, bounded * advantages).mean()


def fused_logps(hidden, weight, ids, mask, entropy):
    return linear_selective_log_softmax(hidden, weight, ids, mask, compute_entropy=entropy)


def eager_logps(hidden, weight, ids, mask, entropy):
    return providers.eager_logps(hidden @ weight.T, ids, mask, entropy)


def trl_logps(hidden, weight, ids, mask, entropy):
    if hidden.is_cuda:
        return trl_active_logps(hidden, weight, ids, mask, entropy)
    results = _trl_rows(hidden.flatten(0, 1), weight, ids.flatten(), entropy)
    return [None if t is None else t.view(mask.shape).masked_fill(mask == 0, 0) for t in results]


def trl_active_logps(hidden, weight, ids, mask, entropy):
    active = mask != 0
    results = _trl_rows(hidden[active], weight, ids[active], entropy)
    return [
        None if t is None else t.new_zeros(mask.shape).masked_scatter(active, t) for t in results
    ]


def _trl_rows(hidden, weight, ids, entropy):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    outputs = ("log_probs", "entropy") if entropy else ("log_probs",)
    rest = (1.0, TRL_COLUMNS, None, 1.0, outputs)
    return ChunkedLogProbFunction.apply(hidden, weight, None, ids, *rest)[:2]


def bare_matmuls(hidden, weight, mask, backward):
    """A step of matmuls alone, over packed active rows in chunks as ours: what cannot be saved.

    h W^T, and with `backward` G W and G^T h, into memory that is already there.
    """
    rows = hidden.detach()[mask != 0]
    weight, (V, H) = weight.detach(), weight.shape
    budget = default_chunk_bytes(hidden.device, V, hidden.dtype)
    processors = 1
    if hidden.is_cuda:
        processors = torch.cuda.get_device_properties().multi_processor_count
    length = chunk_rows(len(rows), chunk_limit(V, hidden.dtype, budget), H, processors)
    memory = logits_memory(length, V, hidden.dtype, hidden.device)
    drows, dweight = torch.empty_like(rows), torch.empty_like(weight)

    def step():
        for start in range(0, len(rows), length):
            chunk = rows[start : start + length]
            logits = memory[: len(chunk)]
            torch.mm(chunk, weight.T, out=logits)
            if backward:
                torch.mm(logits, weight, out=drows[start : start + length])
                dweight.addmm_(logits.T, chunk, beta=float(start > 0))

    return step


def rounded_logits(hidden, weight):
    """Yield (1, T, V) float64 logits, rounded to the dtype of the head as everybody's are."""
    wide = weight.detach().double()
    for states in hidden.detach():
        yield (states.double() @ wide.T)[None].to(hidden.dtype).double()


def exact_logps(hidden, weight, ids):
    """(logps, entropies) (B, T) in float64, one sequence of logits at a time."""
    results = [
        providers.exact_logps(logits, labels[None])
        for logits, labels in zip(rounded_logits(hidden, weight), ids, strict=True)
    ]
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


def exact_gradients(hidden, weight, *tokens, loss=providers.surrogate):
    """[gradient of hidden, of weight] in float64; `loss` as `providers.surrogate`."""
    wide = weight.detach().double()
    dhidden, dweight = [], torch.zeros_like(wide)
    for b, logits in enumerate(rounded_logits(hidden, weight)):
        part = (values[b : b + 1] for values in tokens)
        (dlogits,) = providers.exact_gradients(logits, *part, loss=loss)
        dlogits /= len(hidden)
        dhidden.append(dlogits @ wide)
        dweight.addmm_(dlogits.T, hidden[b].detach().double())
    return [torch.stack(dhidden), dweight]
