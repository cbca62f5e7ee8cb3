"""Log-probabilities and entropies with verl's signatures, and `patch_verl` to put them in place.

verl computes these before it calls a policy loss, from logits (`verl.utils.torch_functional`) or,
with model.use_fused_kernels=True, from hidden states and the LM head. Nothing here is in place
unless it is asked for: by `patch_verl()` in one process, by `verl_patch` in every worker.
"""

import sys

import torch

from grpo_fused import linear_selective_log_softmax, selective_log_softmax
from grpo_fused.checks import check_choice, check_tensor
from grpo_fused.validation import holds_values_of_a_leaf


def logprobs_from_logits(logits, labels, inplace_backward=True):
    """Log-probabilities of labels, verl's function: `selective_log_softmax` of any shape.

    Args:
        logits: (..., V) float32, bfloat16 or float16, scaled by the temperature already.
        labels: (...) integer, all within the vocabulary.
        inplace_backward: backward may write the gradient over the logits. It does so unless they
            are a leaf or a view of one, whose values somebody may still want.

    Returns:
        (...) float32, differentiable in logits.

    Raises:
        ValueError: labels of another shape; as `selective_log_softmax`.
        RuntimeError: a second backward in place; autograd's version error where another operation
            has saved the logits for its own backward.

    References:
        verl 0.9.1, verl/utils/torch_functional.py.
    """
    check_tensor("labels", labels, tuple(logits.shape[:-1]), logits.device, integer=True)
    inplace = bool(inplace_backward) and logits.requires_grad
    inplace = inplace and not holds_values_of_a_leaf(logits)
    # Three dimensions as they are: flattening a slice of positions would copy the logits.
    rows, ids = (logits, labels) if logits.dim() == 3 else _as_rows(logits, labels)
    logps, _ = selective_log_softmax(rows, ids, inplace=inplace)
    return logps.view(labels.shape)


def entropy_from_logits(logits):
    """Entropies of softmax(logits), verl's function.

    Args:
        logits: (..., V) float32, bfloat16 or float16.

    Returns:
        (...) float32, differentiable in logits; neither pass stores a softmax.

    Raises:
        ValueError: as `selective_log_softmax`.

    References:
        verl 0.9.1, verl/utils/torch_functional.py.
    """
    shape = logits.shape[:-1]
    # Entropies come from the pass that makes log-probabilities: of the first token, not used.
    ids = torch.zeros(shape, dtype=torch.int64, device=logits.device)
    rows, ids = (logits, ids) if logits.dim() == 3 else _as_rows(logits, ids)
    return selective_log_softmax(rows, ids, compute_entropy=True)[1].view(shape)


def entropy_from_logits_with_chunking(logits, chunk_size=2048):
    """`entropy_from_logits`, verl's function: nothing of V is stored, so that no chunks are made.

    Args:
        logits: (..., V).
        chunk_size: not used.

    Returns, Raises, References:
        As `entropy_from_logits`.
    """
    return entropy_from_logits(logits)


def linear_cross_entropy(
    hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
):
    """Log-probabilities and entropies from hidden states and the LM head, verl's function.

    The logits hidden weight^T / temperature are made a chunk of rows at a time, forward and
    backward: `linear_selective_log_softmax`.

    Args:
        hidden: (..., H) float32, bfloat16 or float16.
        weight: (V, H), of the same dtype.
        labels: (...) integer, all within the vocabulary.
        temperature: number or 0-d tensor > 0, or one per token, the shape of labels.
        reduction: "none", "sum" or "mean" of the log-probabilities; entropies are never reduced.
        dist_process_group: None, or a group of one: a vocabulary in shards is refused.

    Returns:
        (logprobs, entropy): float32, flat (N,) as verl's kernel returns them, logprobs () where
        they are reduced; differentiable in hidden and weight.

    Raises:
        ValueError: a group of several ranks; an unknown reduction; shapes that do not agree; as
            `linear_selective_log_softmax`.

    References:
        verl 0.9.1, verl/utils/kernel/linear_cross_entropy.py.
    """
    reductions = {"none": lambda values: values, "sum": torch.sum, "mean": torch.mean}
    check_choice("reduction", reduction, reductions)
    check_tensor("labels", labels, tuple(hidden.shape[:-1]), hidden.device, integer=True)
    if dist_process_group is not None and dist_process_group.size() > 1:
        raise ValueError(
            f"dist_process_group has {dist_process_group.size()} ranks: the vocabulary must not be "
            "sharded, use verl's own kernel under tensor parallelism"
        )
    if isinstance(temperature, torch.Tensor) and temperature.dim():
        check_tensor("temperature", temperature, tuple(labels.shape), labels.device)
        temperature = temperature.flatten()
    rows, ids = _as_rows(hidden, labels)
    logps, entropies = linear_selective_log_softmax(
        rows, weight, ids, temperature=temperature, compute_entropy=True
    )
    return reductions[reduction](logps), entropies


def _fused_linear_for_ppo(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
    """`FusedLinearForPPO.forward`, verl's default backend: results (...) like input_ids."""
    results = linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)
    return tuple(values.view(input_ids.shape) for values in results)


def _as_rows(values, ids):
    """(N, columns) and (N,) of (..., columns) and (...)."""
    return values.reshape(-1, values.shape[-1]), ids.reshape(-1)


def patch_verl():
    """Put the functions of this module in the place of verl's, in this process.

    Also where a module of verl has imported them by name. Engines keep the entropy function that
    they find when they are made: call this before. A second call finds nothing left to do.

    Returns:
        Names of what was replaced, e.g. "verl.utils.torch_functional.entropy_from_logits".

    Raises:
        ImportError: verl is not installed, or does not have what is to be replaced.
    """
    from verl.utils import torch_functional
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy as kernel

    homes = {
        "logprobs_from_logits": torch_functional,
        "entropy_from_logits": torch_functional,
        "entropy_from_logits_with_chunking": torch_functional,
        "linear_cross_entropy": kernel,
    }
    missing = [name for name, home in homes.items() if not hasattr(home, name)]
    if missing or not hasattr(FusedLinearForPPO, "forward"):
        raise ImportError(f"this verl does not have {', '.join(missing)}: patch_verl knows 0.9.1")
    originals = {name: getattr(home, name) for name, home in homes.items()}
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
