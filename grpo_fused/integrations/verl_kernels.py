"""Log-probabilities and entropies with verl's signatures, and `patch_verl`, which installs them.

verl computes these before it calls a policy loss: from logits (`verl.utils.torch_functional`, with
Megatron `verl.utils.megatron.tensor_parallel`) or, with model.use_fused_kernels=True, from hidden
states and the LM head. Importing this module replaces nothing; `patch_verl()` does so in one
process, `verl_patch` in every worker.
"""

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import torch

from grpo_fused import linear_selective_log_softmax, selective_log_softmax
from grpo_fused.checks import check_choice, check_tensor
from grpo_fused.validation import holds_values_of_a_leaf

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def logprobs_from_logits(
    logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True
) -> torch.Tensor:
    """Compute log-probabilities of labels; verl's function of the same name.

    Args:
        logits: (..., V) float32, bfloat16 or float16, already divided by the temperature.
        labels: (...) integer, all in [0, V), with or without dimensions of 1.
        inplace_backward: allow backward to overwrite the logits with their gradient. Logits that
            are a leaf, or a view of one, are never overwritten.

    Returns:
        (...) float32, differentiable in logits.

    Raises:
        ValueError: labels whose shape is not that of logits without V, but for dimensions of 1;
            and as `selective_log_softmax`.
        RuntimeError: a second backward in place; or autograd's version error, if another operation
            saved the logits for its backward.

    References:
        verl 0.9.1, verl/utils/torch_functional.py.
    """
    shape = logits.shape[:-1]
    check_tensor("labels", labels)
    if _without_ones(labels.shape) == _without_ones(shape):  # verl has (1, N) for logits (N, V)
        labels = labels.reshape(shape)
    check_tensor("labels", labels, tuple(shape), logits.device, integer=True)
    inplace = bool(inplace_backward) and logits.requires_grad
    inplace = inplace and not holds_values_of_a_leaf(logits)
    # Keep three dimensions: flattening logits[:, :-1] would copy them.
    rows, ids = (logits, labels) if logits.dim() == 3 else _flatten(logits, labels)
    logps, _ = selective_log_softmax(rows, ids, inplace=inplace)
    return logps.view(labels.shape)


def entropy_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """Compute entropies of softmax(logits); verl's function of the same name.

    Neither forward nor backward stores a softmax.

    Args:
        logits: (..., V) float32, bfloat16 or float16.

    Returns:
        (...) float32, differentiable in logits.

    Raises:
        ValueError: as `selective_log_softmax`.

    References:
        verl 0.9.1, verl/utils/torch_functional.py.
    """
    shape = logits.shape[:-1]
    # The kernel computes entropies along with log-probabilities; those of token 0 are discarded.
    ids = torch.zeros(shape, dtype=torch.int64, device=logits.device)
    rows, ids = (logits, ids) if logits.dim() == 3 else _flatten(logits, ids)
    _, entropies = selective_log_softmax(rows, ids, compute_entropy=True)
    return entropies.view(shape)  # type: ignore[union-attr]


def entropy_from_logits_with_chunking(logits: torch.Tensor, chunk_size: int = 2048) -> torch.Tensor:
    """Compute `entropy_from_logits`; verl's function of the same name.

    No chunks are needed, because no softmax is stored.

    Args:
        logits: (..., V) float32, bfloat16 or float16.
        chunk_size: ignored.

    Returns:
        (...) float32, differentiable in logits.

    References:
        verl 0.9.1, verl/utils/torch_functional.py.
    """
    return entropy_from_logits(logits)


def vocab_parallel_log_probs_from_logits(
    logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Compute log-probabilities of labels over Megatron's ranks; verl's function of that name.

    Args:
        logits: (..., V / ranks) float32, bfloat16 or float16, the columns of this rank, already
            divided by the temperature.
        labels: (...) integer, all in [0, V).

    Returns:
        (...) float32, differentiable in logits, with the same bits on every rank.

    Raises:
        ValueError: as `selective_log_softmax`.

    References:
        verl 0.9.1, verl/utils/megatron/tensor_parallel.py.
    """
    check_tensor("labels", labels, tuple(logits.shape[:-1]), logits.device, integer=True)
    rows, ids = _flatten(logits, labels)
    logps, _ = selective_log_softmax(rows, ids, **_megatron_shards(logits.shape[-1]))
    return logps.view(labels.shape)


def vocab_parallel_entropy(vocab_parallel_logits: torch.Tensor) -> torch.Tensor:
    """Compute entropies of softmax(logits) over Megatron's ranks; verl's function of that name.

    One exchange instead of three; the softmax is not stored, and logits stay as they are.

    Args:
        vocab_parallel_logits: (..., V / ranks) float32, bfloat16 or float16.

    Returns:
        (...) float32, differentiable in the logits.

    Raises:
        ValueError: as `selective_log_softmax`.

    References:
        verl 0.9.1, verl/utils/megatron/tensor_parallel.py.
    """
    shape, V = vocab_parallel_logits.shape[:-1], vocab_parallel_logits.shape[-1]
    ids = torch.zeros(shape, dtype=torch.int64, device=vocab_parallel_logits.device)
    rows, ids = _flatten(vocab_parallel_logits, ids)
    shards = _megatron_shards(V)
    return selective_log_softmax(rows, ids, compute_entropy=True, **shards)[1].view(shape)


def vocab_parallel_entropy_with_chunking(
    vocab_parallel_logits: torch.Tensor, chunk_size: int = 2048
) -> torch.Tensor:
    """Compute `vocab_parallel_entropy`; verl's function of the same name.

    No chunks are needed, because no softmax is stored.

    Args:
        vocab_parallel_logits: (..., V / ranks) float32, bfloat16 or float16.
        chunk_size: ignored.

    Returns:
        (...) float32, differentiable in the logits.

    References:
        verl 0.9.1, verl/utils/megatron/tensor_parallel.py.
    """
    return vocab_parallel_entropy(vocab_parallel_logits)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: "ProcessGroup | None" = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-probabilities and entropies from hidden states; verl's function of that name.

    `linear_selective_log_softmax` computes the logits hidden weight^T / temperature chunk by chunk,
    in forward and in backward.

    Args:
        hidden: (..., H) float32, bfloat16 or float16.
        weight: (V, H), the dtype of hidden.
        labels: (...) integer, all in [0, V).
        temperature: number or 0-d tensor > 0, or one per token with the shape of labels.
        reduction: "none", "sum" or "mean" of the log-probabilities; entropies are never reduced.
        dist_process_group: None, or tensor-parallel ranks with equal shards of weight in their
            order. As with verl's kernel, the gradient of hidden is then the part of this rank's
            columns: the gather of sequence-parallel hidden states, which verl calls before, sums
            it over the ranks.

    Returns:
        (logprobs, entropy), float32, differentiable in hidden and weight. Both are flat, (N,), as
        from verl's kernel; reduced logprobs are ().

    Raises:
        ValueError: an unknown reduction; shapes that do not match; and as
            `linear_selective_log_softmax`.

    References:
        verl 0.9.1, verl/utils/kernel/linear_cross_entropy.py.
    """
    reductions: dict[str, Any] = {
        "none": lambda values: values,
        "sum": torch.sum,
        "mean": torch.mean,
    }
    check_choice("reduction", reduction, reductions)
    check_tensor("labels", labels, tuple(hidden.shape[:-1]), hidden.device, integer=True)
    shards = {}
    if dist_process_group is not None and dist_process_group.size() > 1:
        shards = _shards(dist_process_group, len(weight)) | {"reduce_hidden_grad": False}
    if isinstance(temperature, torch.Tensor) and temperature.dim():
        check_tensor("temperature", temperature, tuple(labels.shape), labels.device)
        temperature = temperature.flatten()
    rows, ids = _flatten(hidden, labels)
    logps, entropies = linear_selective_log_softmax(
        rows, weight, ids, temperature=temperature, compute_entropy=True, **shards
    )
    return reductions[reduction](logps), entropies  # type: ignore[return-value]


def _fused_linear_for_ppo(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
    """Replace `FusedLinearForPPO.forward`, verl's default backend; results shaped as input_ids."""
    results = linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)
    return tuple(values.view(input_ids.shape) for values in results)


def _shards(group, columns):
    """Keywords for equal shards."""
    return {"vocab_parallel_group": group, "vocab_start": group.rank() * columns}


def _megatron_shards(columns):
    from megatron.core import parallel_state

    return _shards(parallel_state.get_tensor_model_parallel_group(), columns)


def _without_ones(shape):
    return [size for size in shape if size != 1]


def _flatten(values, ids):
    """Flatten (..., columns) to (N, columns) and (...) to (N,)."""
    return values.reshape(-1, values.shape[-1]), ids.reshape(-1)


MEGATRON = (
    "vocab_parallel_log_probs_from_logits",
    "vocab_parallel_entropy",
    "vocab_parallel_entropy_with_chunking",
)


def patch_verl() -> list[str]:
    """Replace verl's functions by those of this module, in this process.

    Modules of verl that imported a function by name are patched too. Engines keep the entropy
    function that they find when they are constructed, so call this first. A second call has no
    effect.

    Returns:
        Qualified names of the functions that were replaced, for instance
        "verl.utils.torch_functional.entropy_from_logits".

    Raises:
        ImportError: verl is not installed, or lacks one of the functions.
    """
    from verl.utils import torch_functional
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy as kernel

    modules = {
        "logprobs_from_logits": torch_functional,
        "entropy_from_logits": torch_functional,
        "entropy_from_logits_with_chunking": torch_functional,
        "linear_cross_entropy": kernel,
    }
    if importlib.util.find_spec("megatron") is not None:
        from verl.utils.megatron import tensor_parallel

        modules |= dict.fromkeys(MEGATRON, tensor_parallel)
    missing = [name for name, module in modules.items() if not hasattr(module, name)]
    if missing or not hasattr(FusedLinearForPPO, "forward"):
        names = ", ".join(missing) or "FusedLinearForPPO.forward"
        raise ImportError(f"patch_verl supports verl 0.9.1; the installed verl has no {names}")
    originals = {name: getattr(module, name) for name, module in modules.items()}
    replaced = []
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").split(".")[0] != "verl":
            continue
        for name, original in originals.items():
            ours = globals()[name]
            if vars(module).get(name) is original and original is not ours:
                setattr(module, name, ours)
                replaced.append(f"{module.__name__}.{name}")
    if FusedLinearForPPO.forward is not _fused_linear_for_ppo:
        FusedLinearForPPO.forward = _fused_linear_for_ppo
        replaced.append(f"{FusedLinearForPPO.__module__}.FusedLinearForPPO.forward")
    return sorted(replaced)
