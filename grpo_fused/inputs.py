"""Arguments of the public functions, checked and brought into the shapes that launchers take."""

import torch

from grpo_fused import validation
from grpo_fused.autograd import LAUNCHERS, Scales, Tokens, Weights
from grpo_fused.sequences import Packed, Padded
from grpo_fused.weights import divisors


def prepare_tokens(
    source,
    ids,
    mask,
    cu_seqlens,
    implementation="torch",
    ids_name="completion_ids",
    mask_name="mask",
    **values,
):
    """(Tokens, sequences, shape of ids): a packed batch (N, ...) becomes one row (1, N, ...).

    Args:
        source: `sources.Logits` or `sources.Hidden`; checked, and given the dimension of sequences.
        ids, mask, cu_seqlens: as `grpo_loss`.
        implementation: "triton" or "torch": which finds packed sequences.
        ids_name, mask_name: how messages call them.
        values: by the names of `grpo_loss`; those that are missing are None.
    """
    shape = validation.check_layout(source, ids, ids_name, cu_seqlens)
    number = shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    validation.check_tokens(source, shape, number, {ids_name: ids, mask_name: mask, **values})

    def per_token(value):
        """(B, T) of what has the shape of ids."""
        if value is None:
            return None
        return value.detach()[None] if len(shape) == 1 else value.detach()

    def argument(name):
        """Values per sequence as (B,), others as tokens; where N = B they are per sequence."""
        value = values.get(name)
        if value is None or (tuple(value.shape) == shape and value.shape != (number,)):
            value = per_token(value)
        else:
            value = value.detach().flatten()
        return None if value is None else value.contiguous()

    def floats(value):
        return None if value is None else value.float()

    def log_probabilities(name):
        """float32: the kernels take them as they are."""
        value = floats(per_token(values.get(name)))
        return None if value is None else value.contiguous()

    ids, mask = per_token(ids), per_token(mask)
    if len(shape) == 1:
        source.tensor = source.tensor[None]
    validation.check_rows(source, ids, ids_name)
    source.check()
    validation.check_ids(source, ids, ids_name, mask)
    if cu_seqlens is None:
        sequences = Padded(ids, mask)
    else:
        locate = LAUNCHERS["triton"].locate if implementation == "triton" else None
        sequences = Packed(ids, mask, cu_seqlens, locate)
    tokens = Tokens(
        ids.contiguous(),
        sequences.active,
        argument("advantages"),
        log_probabilities("old_logps"),
        log_probabilities("ref_logps"),
        floats(argument("importance_sampling_ratio")),
        argument("policy_mask"),
    )
    return tokens, sequences, shape


def for_launch(inputs, sequences):
    """Tokens or Weights whose values per sequence (B,) are what launchers take instead."""
    if not isinstance(sequences, Packed):
        return inputs  # launchers take (B,) for padded tokens
    made = {}
    for name, value in inputs._asdict().items():
        if isinstance(value, torch.Tensor) and value.dim() == 1:
            same = [other for other in made if getattr(inputs, other) is value]
            made[name] = made[same[0]] if same else sequences.argument(value)
    return inputs._replace(**made)


def prepare_scales(source, shape, sequences, temperature, logit_scale, logit_softcap):
    """Scales; `shape` is that of ids as the caller gave them."""
    temperature = validation.check_temperature(temperature, source, shape, sequences)
    if isinstance(temperature, torch.Tensor) and temperature.dim():
        if len(shape) == 1 and temperature.shape != (sequences.number,):
            temperature = temperature[None]
        temperature = sequences.argument(temperature.float()).contiguous()
    if logit_softcap is not None:
        logit_softcap = validation.check_scale("logit_softcap", logit_softcap, source, True)
    logit_scale = validation.check_scale("logit_scale", logit_scale, source, positive=True)
    return Scales(temperature, logit_scale, logit_softcap)


def prepare_weights(sequences, normalizer, kl_normalizer, entropy_coef, **given):
    """Weights of the three terms; a KL rule of None is the normalizer, a coefficient of 0 none."""
    items, divisor = divisors(sequences, normalizer, **given)
    kl = (items, divisor)
    if kl_normalizer not in (None, normalizer):
        kl = divisors(sequences, kl_normalizer, **given)
    bonus = (None, None)
    if isinstance(entropy_coef, torch.Tensor) or entropy_coef != 0:
        bonus = (sequences.total, entropy_coef)
    return Weights(items, divisor, *kl, *bonus)
