"""torch.compile(fullgraph=True) of losses over ranks, against eager ones: checks for `ranks`."""

import torch
from batches import make_batch, relative_error

from grpo_fused import grpo_loss

V = 96


def compiled(function, leaf):
    """The loss of a compiled function, after backward."""
    loss = torch.compile(function, fullgraph=True)(leaf)
    loss.backward()
    return loss


def check_compiled(rank):
    """Shards of the vocabulary, and parts of sequences; in one launch, and on log-probabilities."""
    own = slice(V // rank.size * rank.rank, V // rank.size * (rank.rank + 1))
    for loss_type in ("dapo", "gspo"):
        batch = make_batch(V=V)
        whole, shard, part = batch.leaf(), batch.leaf(), batch.leaf()
        tokens = (batch.ids, batch.mask, batch.advantages)
        options = {"loss_type": loss_type, "num_items_in_batch": int(batch.mask.sum())}
        want = grpo_loss(whole, *tokens, old_logps=batch.old_logps, **options).loss
        want.backward()
        shards = {"vocab_parallel_group": rank.group, "vocab_start": own.start}

        def of_shard(x, tokens=tokens, options=options | shards, old=batch.old_logps):
            return grpo_loss(x[..., own], *tokens, old_logps=old, **options).loss

        assert relative_error(compiled(of_shard, shard), want) < 1e-6
        assert relative_error(shard.grad[..., own], whole.grad[..., own]) < 2e-6
        places = torch.arange(6).tensor_split(rank.size)[rank.rank]
        mine = (batch.ids[:, places], batch.mask[:, places], batch.advantages)
        group = {"sequence_group": rank.group, "old_logps": batch.old_logps[:, places]}

        def of_part(x, tokens=mine, options=options | group, places=places):
            return grpo_loss(x[:, places], *tokens, **options).loss

        assert relative_error(rank.sum(compiled(of_part, part)), want) < 1e-6
        assert relative_error(part.grad[:, places], whole.grad[:, places]) < 2e-6
