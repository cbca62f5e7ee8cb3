"""Losses and log-probabilities over hidden states and a head that are timed; all share a signature.

A loss is `(hidden, weight, ids, mask, advantages, old_logps, *, level) -> ()`, that of `providers`,
differentiable in hidden (B, T, H) and weight (V, H).

`trl` is what TRL 1.16's `add_fused_lm_head` runs (`trl/trainer/utils.py`): tiles of 32,768 columns,
over the active rows on a GPU, over all rows on a CPU. `trl_active` is the same function over the
active rows, on a CPU too. The others are in `peers`.
"""

import torch

from benchmarks import providers
from grpo_fused import Clip, linear_grpo_loss, linear_selective_log_softmax
from grpo_fused.bundles import Chunking
from grpo_fused.head.chunks import chunk_limit, chunk_rows, logits_memory
from grpo_fused.inputs import default_chunk_bytes

TRL_COLUMNS = 32_768


def fused(hidden, weight, ids, mask, advantages, old_logps, *, level="token", **implementation):
    return linear_grpo_loss(
        *(hidden, weight, ids, mask, advantages),
        old_logps=old_logps,
        loss_type="grpo" if level == "token" else "gspo",
        objective=Clip(providers.EPSILON, providers.EPSILON),
        **implementation,
    ).loss


def fused_torch(*batch, **formula):
    """The implementation that a CPU gets."""
    providers.need(batch[0].is_cuda, "the same as `fused` on a CPU")
    return fused(*batch, implementation="torch", **formula)


def eager(hidden, weight, *tokens, **formula):
    return providers.eager(hidden @ weight.T, *tokens, **formula)


def float32(hidden, weight, *tokens, **formula):
    return providers.float32(hidden @ weight.T, *tokens, **formula)


def compiled(*batch, **formula):
    """`float32`, fused for these shapes."""
    return providers.compile_whole(float32)(*batch, **formula)


def trl(hidden, weight, ids, mask, *tokens, **formula):
    logps, _ = trl_logps(hidden, weight, ids, mask, entropy=False)
    return providers.surrogate(logps, mask, *tokens, **formula)


def trl_active(hidden, weight, ids, mask, *tokens, **formula):
    logps, _ = trl_active_logps(hidden, weight, ids, mask, entropy=False)
    return providers.surrogate(logps, mask, *tokens, **formula)


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
    """A step of the matmuls that no implementation avoids, over packed active rows in our chunks.

    h W^T, and with `backward` G W and G^T h, into memory that is already there.
    """
    rows, weight = hidden.detach()[mask != 0], weight.detach()
    V = len(weight)
    budget = default_chunk_bytes(hidden.device, V, hidden.dtype, hidden.dtype)
    chunking = Chunking(hidden.dtype, hidden.dtype, None, None, budget)
    length = chunk_rows(len(rows), chunk_limit(V, chunking))
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
    """Yield (T, V) float64 logits, rounded to the dtype of the head, as in every provider."""
    wide = weight.detach().double()
    for states in hidden.detach():
        yield (states.double() @ wide.T).to(hidden.dtype).double()


def exact_logps(hidden, weight, ids):
    """(logps, entropies) (B, T) in float64, one sequence of logits at a time."""
    return providers.exact_logps(rounded_logits(hidden, weight), ids)


def exact_gradients(hidden, weight, ids, *tokens, loss=providers.surrogate):
    """[gradient of hidden, of weight] in float64; `loss` as `providers.surrogate`."""
    wide, sequences = weight.detach().double(), rounded_logits(hidden, weight)
    dhidden, dweight = [], torch.zeros_like(wide)
    exact = exact_logps(hidden, weight, ids)
    gradients = providers.exact_gradients(sequences, ids, tokens, loss, exact)
    for states, dlogits in zip(hidden.detach(), gradients, strict=True):
        dhidden.append(dlogits @ wide)
        dweight.addmm_(dlogits.T, states.double())
    return [torch.stack(dhidden), dweight]
