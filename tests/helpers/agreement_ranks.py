"""Ranks that disagree: an error on every one of them, and no wait for each other; for `ranks`."""

import torch
from batches import make_batch
from heads import make_head_batch
from ranks import raises

from grpo_fused import (
    agreement,
    grpo_loss,
    grpo_loss_from_logps,
    linear_grpo_loss,
    linear_selective_log_softmax,
    sampling_support,
    selective_log_softmax,
)

V, T = 96, 6


def check_agreement(rank):
    agreement.ENABLED = True
    try:
        for check in (vocabularies, heads, sequences):
            check(rank)
    finally:
        agreement.ENABLED = False


def cases(rank, right, wrong):
    """Yield (text of the error, arguments of this rank): the last rank has a wrong one."""
    for text, change in wrong:
        yield text, right | (change if rank.rank == rank.size - 1 else {})


def vocabularies(rank):
    batch, own = make_batch(V=V), V // rank.size
    start = own * rank.rank
    support = sampling_support(batch.logits[:, :T].nan_to_num(), top_k=V)
    right = {
        "logits": batch.logits[..., start : start + own],
        "completion_ids": batch.ids,
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_logps": batch.old_logps,
        "num_items_in_batch": 14,
        "beta": 0.0,
        "support": support,
        "vocab_start": start,
        "vocab_parallel_group": rank.group,
    }
    short = {name: right[name][:3] for name in list(right)[:5]}
    wrong = [
        ("disagree on loss_type: 'dapo' on rank 0", {"loss_type": "bnpo"}),
        ("disagree on num_items_in_batch", {"num_items_in_batch": 15}),
        ("disagree on num_items_in_batch", {"num_items_in_batch": torch.tensor(14.0)}),
        ("disagree on completion_ids", {"completion_ids": batch.ids + 1}),
        ("disagree on logits", short),
        ("disagree on logits", {"logits": right["logits"].bfloat16()}),
        ("disagree on old_logps", {"old_logps": None}),
        ("disagree on support", {"support": None}),
        ("disagree on support ids", {"support": (support[0], support[1] + 1)}),
        ("disagree on vocab_start", {"vocab_start": None}),
        ("columns start at", {"vocab_start": start + 1}),
        ("columns start at", {"vocab_start": start - 1}),
        ("disagree on advantages", {"advantages": batch.advantages + 1}),
    ]
    for text, arguments in cases(rank, right, wrong):
        raises(ValueError, text, lambda a=arguments: grpo_loss(**a))
    grpo_loss(**right)
    scores = {"logits": right["logits"], "ids": batch.ids, "mask": batch.mask}
    scores |= {"vocab_start": start, "vocab_parallel_group": rank.group}
    wrong = [("disagree on temperature", {"temperature": 0.9}), ("on mask", {"mask": None})]
    for text, arguments in cases(rank, scores, wrong):
        raises(ValueError, text, lambda a=arguments: selective_log_softmax(**a))
    # Shards of which one is missing: the others' starts tell.
    right["vocab_start"] += own
    raises(ValueError, "vocab_start is", lambda: grpo_loss(**right))
    raises(ValueError, "must be a ProcessGroup", lambda: grpo_loss(**right | {"sequence_group": 1}))


def heads(rank):
    head, own = make_head_batch(V=V), V // rank.size
    rows = slice(own * rank.rank, own * (rank.rank + 1))
    right = {
        "hidden": head.hidden,
        "weight": head.weight[rows],
        "bias": head.bias[rows],
        "ids": head.batch.ids,
        "mask": head.batch.mask,
        "vocab_parallel_group": rank.group,
    }
    wrong = [
        ("disagree on bias", {"bias": None}),
        ("disagree on weight", {"weight": head.weight[rows, :-1]}),
        ("disagree on chunk_bytes", {"chunk_bytes": 1000}),
        ("disagree on hidden", {"hidden": head.hidden[:, :-1]}),
    ]
    for text, arguments in cases(rank, right, wrong):
        raises(ValueError, text, lambda a=arguments: linear_selective_log_softmax(**a))
    linear_selective_log_softmax(**right)
    losses = right | {"completion_ids": right.pop("ids"), "completion_mask": right.pop("mask")}
    losses = {n: v for n, v in losses.items() if n not in ("ids", "mask")}
    losses |= {"advantages": head.batch.advantages}
    wrong = [("disagree on entropy_coef", {"entropy_coef": 0.1})]
    for text, arguments in cases(rank, losses, wrong):
        raises(ValueError, text, lambda a=arguments: linear_grpo_loss(**a))
    linear_grpo_loss(**losses)


def sequences(rank):
    """Ranks have different numbers of tokens; a wrong tensor of one is an error of all."""
    batch = make_batch(extra=0)
    places = slice(0, 4) if rank.rank == 0 else slice(4, 6)
    right = {
        "logps": batch.old_logps[:, places],
        "completion_mask": batch.mask[:, places],
        "advantages": batch.advantages,
        "old_logps": batch.old_logps[:, places],
        "loss_type": "gspo",
        "sequence_group": rank.group,
    }
    wrong = [
        ("disagree on loss_type", {"loss_type": "luspo"}),
        ("disagree on old_logps", {"old_logps": batch.old_logps}),
        ("disagree on advantages", {"advantages": 2 * batch.advantages}),
        ("disagree on logps", {n: right[n][:3] for n in list(right)[:4]}),
        ("disagree on max_completion_length", {"max_completion_length": 7}),
    ]
    for text, arguments in cases(rank, right, wrong):
        raises(ValueError, text, lambda a=arguments: grpo_loss_from_logps(**a))
    grpo_loss_from_logps(**right)
    # Supports are of the tokens of a rank; all must have one.
    logits, tensors = batch.logits[:, places], (batch.ids, batch.mask)
    support = sampling_support(logits.nan_to_num(), top_k=V)
    inputs = (logits, *(t[:, places] for t in tensors), batch.advantages)
    options = {"loss_type": "gspo", "sequence_group": rank.group, "support": support}
    grpo_loss(*inputs, **options)
    for text, more in cases(rank, options, [("disagree on support", {"support": None})]):
        raises(ValueError, text, lambda a=more: grpo_loss(*inputs, **a))
    # Packed; the last rank has as many tokens as there are sequences, all values per sequence.
    tokens = [1, 1, 1, 1] if rank.rank == rank.size - 1 else [2, 0, 3, 1]
    logps = torch.linspace(-1.0, -0.1, sum(tokens))
    per_sequence = {"advantages": batch.advantages, "policy_mask": torch.ones(4)}
    packed = {"logps": logps, "completion_mask": None, "old_logps": logps, **per_sequence}
    packed |= {"cu_seqlens": torch.tensor([0, *tokens]).cumsum(0), "loss_type": "gspo"}
    grpo_loss_from_logps(**packed, sequence_group=rank.group)
