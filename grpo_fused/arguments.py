"""Arguments of the public functions, checked and turned into bundles."""

from typing import NamedTuple

import torch

from grpo_fused import validation
from grpo_fused.bundles import (
    OverSupport,
    Scales,
    Support,
    Tokens,
    TokenValues,
    TokenWeights,
    Weight,
)
from grpo_fused.checks import check_choice, constant
from grpo_fused.losses.weights import check_divisor, evaluate, is_number, rule_weight
from grpo_fused.ops import BACKENDS
from grpo_fused.parallel import find_head_shards, find_shards, is_dtensor
from grpo_fused.sequences import Packed, Padded, over_ranks
from grpo_fused.support import check_support


class Layout(NamedTuple):
    """How tokens are laid out: padded (B, T), or packed (N,) in `num_sequences` sequences."""

    shape: tuple[int, ...]
    num_sequences: int
    cu_seqlens: torch.Tensor | None
    device: torch.device

    @property
    def is_row(self):
        """Whether tokens came as (N,) and are (1, N) inside the package."""
        return len(self.shape) == 1

    def per_token(self, value):
        """A constant of the layout's shape as (B, T)."""
        if value is None:
            return None
        value = constant(value)
        return value[None] if self.is_row else value

    def value(self, value):
        """A constant per sequence as (B,), per token as (B, T); for N = B it is per sequence."""
        if value is None:
            return None
        per_token = tuple(value.shape) == self.shape and value.shape != (self.num_sequences,)
        value = self.per_token(value) if per_token else constant(value).flatten()
        return value.contiguous()

    def restore(self, values):
        """Values (1, N) of tokens that came as (N,) in that shape; None and 0-d as they are."""
        if values is None or values.dim() == 0 or not self.is_row:
            return values
        return values[0]


def local_logits(logits, options):
    """(logits of this rank, `Shards` or None)."""
    validation.check_floats("logits", logits)
    group, start = options.vocab_parallel_group, options.vocab_start
    return find_shards("logits", logits, -1, group, start)


def local_head(weight, bias, options, reduce_hidden_grad):
    """Fields of `HeadInput`: this rank's rows of the head, and where they lie."""
    group, start, shards = options.vocab_parallel_group, options.vocab_start, None
    if group is not None or start is not None or is_dtensor(weight) or is_dtensor(bias):
        validation.check_floats("weight", weight)
        weight, bias, shards = find_head_shards(weight, bias, group, start)
        shards = shards._replace(reduces=bool(reduce_hidden_grad))
    return {"weight": weight, "bias": bias, "shards": shards}


# Keywords of `grpo_loss` with one value per token or, some of them, per sequence.
TENSORS = ("old_logps", "ref_logps", "sampling_logps", "importance_sampling_ratio", "policy_mask")


def lay_out(source, mask, advantages=None, options=None):
    """(Layout, source with a dimension of sequences), after all tensors have been checked.

    Args:
        source: a class of `inputs`.
        mask, advantages: as `grpo_loss`.
        options: its keywords; None for log-probabilities alone.
    """
    named, cu_seqlens = {"mask": mask}, None
    if options is not None:
        named = {"completion_mask": mask, "advantages": advantages}
        named |= {name: getattr(options, name) for name in TENSORS}
        cu_seqlens = options.cu_seqlens
    if source.ids is not None:
        named = {source.ids_name: source.ids, **named}
    shape = validation.check_layout(source, cu_seqlens)
    number = shape[0] if len(shape) == 2 else 1
    number = number if cu_seqlens is None else len(cu_seqlens) - 1
    layout = Layout(shape, number, cu_seqlens, source.tensor.device)
    validation.check_tokens(source, layout, named)
    source = source.with_rows() if layout.is_row else source
    source.check()
    validation.check_ids(source, layout.per_token(mask))
    return layout, source


def make_sequences(layout, mask, implementation, group=None):
    """`Padded` or `Packed` sequences, with a group `OverRanks`."""
    mask = layout.per_token(mask)
    shape = (1, *layout.shape) if layout.is_row else layout.shape
    if layout.cu_seqlens is None:
        sequences = Padded(shape, mask, layout.device)
    else:
        locate = BACKENDS["triton"].locate if implementation == "triton" else None
        sequences = Packed(shape, mask, layout.cu_seqlens, layout.device, locate)
    return over_ranks(sequences, group)


def make_tokens(
    source,
    layout,
    sequences,
    temperature,
    support=None,
    advantages=None,
    options=None,
    uses_sampling=False,
):
    """`Tokens` without weights; advantages as they were given.

    Args:
        temperature, support, advantages: as `grpo_loss`.
        options: its keywords; None for log-probabilities alone.
        uses_sampling: whether the objective reads the log-probabilities of the sampler.
    """
    ids = None if source.ids is None else source.ids.contiguous()
    temperature = _temperature(source, layout, sequences, temperature)
    support = make_support(source, layout, sequences, support)
    if options is None:
        return Tokens(ids, sequences.active, temperature, support=support)

    def floats(value):
        return None if value is None else value.float().contiguous()

    old_logps = floats(layout.per_token(options.old_logps))
    sampling_logps = old_logps if uses_sampling else None
    if uses_sampling and options.sampling_logps is not None:
        sampling_logps = floats(layout.per_token(options.sampling_logps))
    return Tokens(
        ids,
        sequences.active,
        temperature,
        floats(layout.value(advantages)),
        old_logps,
        floats(layout.per_token(options.ref_logps)),
        sampling_logps=sampling_logps,
        support=support,
    )


SOFTMAXES = ("support", "vocabulary")
OVER = tuple(f"{term}_over" for term in OverSupport._fields)  # keywords


def make_over(options):
    """`OverSupport` from keywords, of which log-probabilities have entropy_over alone."""
    chosen = []
    for name in OVER:
        value = getattr(options, name, "vocabulary")
        check_choice(name, value, SOFTMAXES)
        chosen.append(value == "support")
    chosen = OverSupport(*chosen)
    if options.support is not None:
        return chosen
    if chosen.kl:
        raise ValueError('kl_over="support" requires a support, got None')
    return OverSupport()


def make_support(source, layout, sequences, support):
    """`Support` of (offsets, ids), checked, or None."""
    if support is None:
        return None
    offsets, ids = check_support(source, layout, sequences, support)
    # Rising within the ids, whatever a device has that is not read: kernels follow them.
    offsets, shape = offsets.long().clamp(0, len(ids)).cummax(0).values, sequences.shape
    return Support(offsets[:-1].view(shape), offsets[1:].clone().view(shape), ids)


def _temperature(source, layout, sequences, temperature):
    temperature = validation.check_temperature(source, layout, sequences, temperature)
    if not isinstance(temperature, torch.Tensor) or temperature.dim() == 0:
        return temperature
    return sequences.broadcast(layout.value(temperature).float())


def make_scales(source, logit_scale, logit_softcap):
    """`Scales`, checked."""
    if logit_softcap is not None:
        logit_softcap = validation.check_scale(source, "logit_softcap", logit_softcap, True)
    logit_scale = validation.check_scale(source, "logit_scale", logit_scale, positive=True)
    return Scales(logit_scale, logit_softcap)


def make_values(layout, sequences, advantages, normalizer, options, coefficients, corrects):
    """`TokenValues` of a loss, and the rollout ratio (B,) or (B, T), or None.

    Args:
        advantages: (B,) or (B, T).
        normalizer: a rule, or None for reduction="none".
        options: keywords of `grpo_loss`.
        coefficients: its beta and entropy_coef, checked.
        corrects: whether the rollout ratio multiplies the policy term.
    """
    ratio = layout.value(options.importance_sampling_ratio)
    ratio = None if ratio is None else ratio.float()
    given = {
        "num_items_in_batch": options.num_items_in_batch,
        "num_sequences_in_batch": options.num_sequences_in_batch,
        "max_completion_length": options.max_completion_length,
    }
    beta, entropy_coef = coefficients
    rule = "token-sum" if normalizer is None else normalizer
    coefficient = ratio if corrects and ratio is not None else 1.0
    policy = rule_weight(sequences, rule, coefficient, **given)
    kl = Weight(beta, policy.items, policy.divisor)
    if options.kl_normalizer not in (None, rule):
        kl = rule_weight(sequences, options.kl_normalizer, beta, **given)
    if not isinstance(beta, torch.Tensor) and beta == 0:
        kl = Weight(0.0, 1.0, 1.0)
    name, entropy = "num_entropy_items_in_batch", None
    items = check_divisor(name, getattr(options, name), sequences, at_least=0)
    if isinstance(entropy_coef, torch.Tensor) or entropy_coef != 0:
        if normalizer is None:
            items = 1.0
        elif items is None:
            items = sequences.total
        entropy = Weight(entropy_coef, items, 1.0)
    policy_mask = layout.value(options.policy_mask)
    return TokenValues(advantages, policy_mask, policy, kl, entropy), ratio


NOTHING = TokenWeights(None, None, None, None)


def weigh(tokens, values, sequences, computed=NOTHING):
    """Tokens with their weights; those that `token_weights` has computed are taken as they are."""
    advantages, w_policy, w_kl, w_entropy = computed
    if w_policy is None:
        w_policy = evaluate(values.policy, sequences, values.policy_mask)
    if w_kl is None:
        w_kl = evaluate(values.kl, sequences)
    if w_entropy is None and values.entropy is not None:
        w_entropy = evaluate(values.entropy, sequences)
    if advantages is None:
        advantages = values.advantages
    return tokens._replace(advantages=advantages, w_policy=w_policy, w_kl=w_kl, w_entropy=w_entropy)


def weigh_and_broadcast(tokens, values, sequences, implementation, by_sequence=False):
    """Tokens with their weights, and advantages per token: in one launch, if any is needed.

    Args:
        by_sequence: whether advantages may stay (B,) where nothing else needs the launch.
    """
    if implementation == "torch":
        advantages = sequences.broadcast(values.advantages)
        return weigh(tokens, values._replace(advantages=advantages), sequences)

    def memory(wanted):
        shape, device = sequences.shape, sequences.device
        return torch.empty(shape, dtype=torch.float32, device=device) if wanted else None

    wanted = (
        values.policy_mask is not None or not is_number(values.policy),
        not is_number(values.kl),
        values.entropy is not None and not is_number(values.entropy),
    )
    packed = isinstance(sequences.local, Packed)
    spread = values.advantages.dim() == 1 and (any(wanted) or packed or not by_sequence)
    outputs = TokenWeights(memory(spread), *map(memory, wanted))
    if spread or any(wanted):
        index = sequences.index if packed else None
        BACKENDS[implementation].token_weights(values, index, outputs)
    return weigh(tokens, values, sequences, outputs)
