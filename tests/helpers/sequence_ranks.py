"""Sequences whose tokens lie on several ranks, against whole ones: checks for `ranks`."""

import torch
from batches import make_batch, relative_error
from heads import chunk_bytes, make_head_batch
from launch_counter import FULL, PLAIN, options_of
from packing import cu_seqlens
from ranks import Exchanges, raises

from grpo_fused import (
    LOSSES,
    entropy_quantile_mask,
    grpo_loss,
    grpo_loss_from_logps,
    linear_grpo_loss,
    off_policy_mask,
    rollout_weights,
    token_weights,
    value_loss,
    whiten,
)
from grpo_fused.losses.metrics import means
from grpo_fused.losses.weights import RULES

T = 12


def columns(rank, order):
    """Indices of the tokens of a rank: contiguous, or the two ends of ring attention (zigzag)."""
    if order == "contiguous":
        cut = [0, *(5 + k for k in range(rank.size - 1)), T]  # of different lengths
        return torch.arange(cut[rank.rank], cut[rank.rank + 1])
    parts = torch.arange(T).chunk(2 * rank.size)
    return torch.cat([parts[rank.rank], parts[-1 - rank.rank]])


def of_rank(options, places):
    """Values per token as those of a rank."""
    per_token = {
        n for n, v in options.items() if isinstance(v, torch.Tensor) and v.shape[-1:] == (T,)
    }
    return {n: v[:, places] if n in per_token else v for n, v in options.items()}


def batch_of(seed):
    """A batch with a sequence of one token, so that some ranks have none of it."""
    batch = make_batch(T=T, extra=0, seed=seed)
    for tensor, value in ((batch.mask, 0), (batch.ids, -100)):
        tensor[2, 1:] = value
    for tensor in (batch.logits, batch.old_logps, batch.ref_logps):
        tensor[2, 1:] = torch.nan
    return batch


def check_losses(rank):
    """Every loss: the losses and sums of the ranks add up, gradients are those of whole ones."""
    for i, (loss_type, row) in enumerate(LOSSES.items()):
        if not row.objective.over_ranks:
            continue
        for names in (PLAIN, FULL):
            batch = batch_of(i)
            places = columns(rank, ("contiguous", "zigzag")[i % 2])
            options = options_of(batch, *names) | {"loss_type": loss_type, "compute_entropy": True}
            if names == FULL:
                options |= {"use_bias_correction_kl": LOSSES[loss_type].level == "sequence"}
                generator = torch.Generator().manual_seed(i)
                ratio, chance = torch.rand(2, 4, T, generator=generator)
                options |= {"importance_sampling_ratio": ratio + 0.5, "policy_mask": chance < 0.7}
            elif i % 3 == 0:
                options["importance_sampling_ratio"] = torch.tensor([0.3, 0.9, 1.2, 1.0])
            options["max_completion_length"] = T
            whole, part = batch.leaf(), batch.leaf()
            want = grpo_loss(whole, batch.ids, batch.mask, batch.advantages, **options)
            want.loss.backward()
            here = of_rank(options, places) | {"sequence_group": rank.group}
            tokens = (batch.ids[:, places], batch.mask[:, places], batch.advantages)
            out = grpo_loss(part[:, places], *tokens, **here)
            out.loss.backward()
            where = (loss_type, names)
            loss = rank.sum(out.loss)
            assert relative_error(loss, want.loss) < 4e-6 * max(1, 0.1 / abs(loss)), where
            assert relative_error(part.grad[:, places], whole.grad[:, places]) < 4e-6, where
            assert relative_error(rank.sum(out.sums), want.sums) < 2e-6, where
            found = means(rank.sum(out.sums))
            for name, value in means(want.sums).items():
                assert relative_error(found[name], value) < 1e-5, (where, name)


def check_normalizers(rank):
    for rule in RULES:
        batch, places = batch_of(1), columns(rank, "zigzag")
        options = {"normalizer": rule, "max_completion_length": T, "entropy_coef": 0.1}
        options |= {"old_logps": batch.old_logps}
        whole, part = batch.leaf(), batch.leaf()
        grpo_loss(whole, batch.ids, batch.mask, batch.advantages, **options).loss.backward()
        here = of_rank(options, places) | {"sequence_group": rank.group}
        tokens = (batch.ids[:, places], batch.mask[:, places], batch.advantages)
        grpo_loss(part[:, places], *tokens, **here).loss.backward()
        assert relative_error(part.grad[:, places], whole.grad[:, places]) < 4e-6, rule
        more = {"max_completion_length": T}
        want = token_weights(batch.mask, rule, **more)[:, places]
        got = token_weights(batch.mask[:, places], rule, sequence_group=rank.group, **more)
        assert relative_error(got, want) < 1e-6


def check_value_loss(rank):
    """The value losses and sums of the ranks add up, gradients are those of whole sequences."""
    for rule in RULES:
        batch, places = batch_of(2), columns(rank, "zigzag")
        target = batch.old_logps + batch.ref_logps.flip(0).nan_to_num(0)
        options = {"normalizer": rule, "max_completion_length": T, "cliprange": 0.3}
        whole, part = (batch.ref_logps.clone().requires_grad_() for _ in range(2))
        want = value_loss(whole, target, batch.mask, old_values=batch.old_logps, **options)
        want.loss.backward()
        options |= {"old_values": batch.old_logps[:, places], "sequence_group": rank.group}
        got = value_loss(part[:, places], target[:, places], batch.mask[:, places], **options)
        got.loss.backward()
        assert relative_error(rank.sum(got.loss), want.loss) < 2e-6, rule
        assert relative_error(part.grad[:, places], whole.grad[:, places]) < 2e-6, rule
        assert relative_error(rank.sum(got.sums), want.sums) < 2e-6, rule
        assert 0 < want.metrics["value/clip_ratio"] < 1


def check_whitening(rank):
    """Parts of different sizes, one of them without an active token, as the whole batch."""
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 5 + k, generator=draw) * (k + 1) + k for k in range(rank.size)]
    masks = [torch.rand(part.shape, generator=draw) < 0.7 for part in parts]
    for mine in (masks, [torch.zeros_like(masks[0]), *masks[1:]]):
        own = mine[rank.rank]
        got = whiten(parts[rank.rank].masked_fill(~own, torch.nan), own, group=rank.group)
        active = [part[mask] for part, mask in zip(parts, mine, strict=True)]
        want = whiten(torch.cat(active)).split([len(part) for part in active])[rank.rank]
        assert got[~own].eq(0).all()
        assert not len(want) or relative_error(got[own], want) < 1e-6
    raises(ValueError, "group must be a Proc", lambda: whiten(parts[0], group="dp"))


def check_without_a_mask(rank):
    """All tokens are active, and ranks have different numbers of them."""
    generator = torch.Generator().manual_seed(0)
    logps, old = torch.randn(2, 3, T, generator=generator) / 10
    advantages, places = torch.tensor([0.5, -1.0, 2.0]), columns(rank, "contiguous")
    for loss_type in ("gspo", "gmpo", "grpo"):
        whole, part = logps.clone().requires_grad_(), logps.clone().requires_grad_()
        options = {"loss_type": loss_type}
        grpo_loss_from_logps(whole, None, advantages, old_logps=old, **options).loss.backward()
        options |= {"sequence_group": rank.group, "old_logps": old[:, places]}
        grpo_loss_from_logps(part[:, places], None, advantages, **options).loss.backward()
        assert (
            relative_error(
                part.grad, torch.zeros_like(logps).index_copy(1, places, whole.grad[:, places])
            )
            < 4e-6
        )


def check_packed(rank):
    """Packed on every rank, with lengths of their own: some of a rank's sequences are empty."""
    batch = batch_of(2)
    own = [n for n in ((5, 1, 0, 7), (3, 6, 1, 0), (4, 5, 0, 5))][: rank.size]
    starts = [sum(lengths[b] for lengths in own[: rank.rank]) for b in range(4)]
    whole = [sum(lengths[b] for lengths in own) for b in range(4)]
    batch = make_batch(T=18, extra=0, mask=torch.ones(4, 18, dtype=torch.long))
    for loss_type in ("gspo", "vespo", "grpo"):
        gradients = []
        for group in (None, rank.group):
            logits = batch.leaf()
            lengths = own[rank.rank] if group else whole
            first = starts if group else [0] * 4
            rows = [t for t in (logits, batch.ids, batch.mask, batch.old_logps)]
            rows = [
                torch.cat([row[a : a + n] for row, a, n in zip(t, first, lengths, strict=True)])
                for t in rows
            ]
            out = grpo_loss(
                *rows[:3],
                batch.advantages,
                old_logps=rows[3],
                loss_type=loss_type,
                cu_seqlens=cu_seqlens(lengths, "cpu"),
                sequence_group=group,
            )
            out.loss.backward()
            gradients.append(logits.grad)
        want, got = gradients
        for b, (a, n) in enumerate(zip(starts, own[rank.rank], strict=True)):
            assert relative_error(got[b, a : a + n], want[b, a : a + n]) < 4e-6


def check_heads(rank):
    """Chunks of a head; tokens whose gradient depends on weights of another rank alone."""
    head = make_head_batch(T=T, extra=0)
    b, places = head.batch, columns(rank, "contiguous")
    policy_mask = torch.zeros(4, T)
    policy_mask[:, 0] = 1.0  # of the first rank's tokens alone
    for loss_type in ("gspo", "gmpo", "vespo", "topr", "dapo", "grpo"):
        options = {"loss_type": loss_type, "old_logps": b.old_logps, "policy_mask": policy_mask}
        hidden, weight, bias = leaves = head.leaves()
        linear_grpo_loss(
            *(hidden, weight, b.ids, b.mask, b.advantages), bias=bias, **options
        ).loss.backward()
        part, part_weight, part_bias = head.leaves()
        here = of_rank(options, places) | {"sequence_group": rank.group}
        here |= {"bias": part_bias, "chunk_bytes": chunk_bytes(7)}
        tokens = (b.ids[:, places], b.mask[:, places], b.advantages)
        linear_grpo_loss(part[:, places], part_weight, *tokens, **here).loss.backward()
        error = relative_error(part.grad[:, places], leaves[0].grad[:, places])
        assert error < 4e-6, (loss_type, error)
        for got, leaf in ((part_weight, weight), (part_bias, bias)):
            assert relative_error(rank.sum(got.grad), leaf.grad) < 4e-6, loss_type


def check_corrections(rank):
    batch, places = batch_of(3), columns(rank, "zigzag")
    generator = torch.Generator().manual_seed(0)
    noise, entropies = torch.rand(2, 4, T, generator=generator)
    sampling = (batch.old_logps + noise - 0.4).nan_to_num()
    old, group = batch.old_logps.nan_to_num(), {"sequence_group": rank.group}
    rows = [t[:, places] for t in (old, sampling, batch.mask)]
    for mode in ("truncate", "mask"):
        options = {"level": "sequence", "mode": mode, "cap": 1.5, "floor": 0.7}
        want = rollout_weights(old, sampling, batch.mask, **options)
        assert relative_error(rollout_weights(*rows, **options, **group), want) < 1e-6
    advantages = torch.tensor([-1.0, -1.0, 1.0, -1.0])
    want = off_policy_mask(advantages, old, sampling, batch.mask, threshold=0.05)
    got = off_policy_mask(advantages, *rows, threshold=0.05, **group)
    assert torch.equal(got, want) and 0 < want.sum() < 4
    want = entropy_quantile_mask(entropies, batch.mask, share=0.3)[:, places]
    got = entropy_quantile_mask(
        entropies[:, places], batch.mask[:, places], share=0.3, process_group=rank.group
    )
    assert torch.equal(got, want)


def check_quantiles(rank):
    """Ranks have different numbers of tokens, none, or all."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        entropies = torch.rand(3, 40, generator=generator).pow(3)
        mask = torch.rand(3, 40, generator=generator) < 0.6
        cut = [13, 0, 40, 27][seed]
        bounds = [0, cut, 40, 40]
        mine = slice(*bounds[rank.rank : rank.rank + 2])
        for share in (0.2, 0.5):
            want = entropy_quantile_mask(entropies, mask, share=share)[:, mine]
            options = {"share": share, "process_group": rank.group}
            got = entropy_quantile_mask(entropies[:, mine], mask[:, mine], **options)
            assert torch.equal(got, want)


def check_exchanges(rank):
    """Numbers of (B,) alone; none for token-level losses with global divisors."""
    batch, places = batch_of(0), columns(rank, "contiguous")
    tokens = (batch.ids[:, places], batch.mask[:, places], batch.advantages)
    counts, sums, clips = 4 * 4, 4 * 4, 4 * 4
    for loss_type, forward, backward in (
        ("dapo", [], []),
        ("grpo", [counts], []),
        ("gspo", [counts, sums, clips], [sums]),
        ("gspo_token", [counts, sums], []),
        ("vespo", [sums], []),
        ("gmpo", [counts, sums], [sums]),
    ):
        with Exchanges() as exchanges:
            loss = grpo_loss(
                batch.leaf()[:, places],
                *tokens,
                old_logps=batch.old_logps[:, places],
                loss_type=loss_type,
                num_items_in_batch=30,
                sequence_group=rank.group,
            ).loss
            assert exchanges.sent("reduce") == forward, (loss_type, exchanges.log)
            loss.backward()
        assert exchanges.sent("reduce")[len(forward) :] == backward, (loss_type, exchanges.log)


def check_errors(rank):
    batch = batch_of(0)
    tokens = (batch.ids, batch.mask, batch.advantages)
    options = {"sequence_group": rank.group, "loss_type": "dr_grpo"}
    raises(ValueError, "max_completion_length", lambda: grpo_loss(batch.logits, *tokens, **options))
    for loss_type in ("fipo", "clip_cov", "kl_cov", "m2po"):
        options = {"sequence_group": rank.group, "loss_type": loss_type}
        message = "sequence_group must be None"
        raises(ValueError, message, lambda: grpo_loss(batch.logits, *tokens, **options))  # noqa: B023
    options = {"sequence_group": "cp"}
    raises(ValueError, "sequence_group", lambda: grpo_loss(batch.logits, *tokens, **options))
    raises(ValueError, "'cp'", lambda: token_weights(batch.mask, "token-sum", **options))


def check_divisors(rank):
    """Batches cut over ranks and micro-batches add up to the whole, the entropy bonus too.

    Ranks hold different numbers of micro-batches, and one micro-batch has no active token.
    """
    batch = make_batch(B=8, T=T, extra=0)
    batch.mask[6:] = 0
    bounds = {2: ((0, 1), (1, 3), (3, 6), (6, 8)), 3: ((0, 3), (3, 5), (5, 6), (6, 8))}[rank.size]
    own = [pair for k, pair in enumerate(bounds) if min(k, rank.size - 1) == rank.rank]
    for rule in sorted({*RULES} - {"token-mean-local"}):
        options = {"old_logps": batch.old_logps, "ref_logps": batch.ref_logps, "beta": 0.05}
        more = {"normalizer": rule, "entropy_coef": 0.1, "max_completion_length": T}
        whole, part = batch.leaf(), batch.leaf()
        tokens = (batch.ids, batch.mask, batch.advantages)
        want = grpo_loss(whole, *tokens, **options, **more)
        want.loss.backward()
        items = batch.mask.sum()
        more |= {"num_items_in_batch": items, "num_sequences_in_batch": 8}
        more |= {"num_entropy_items_in_batch": items}
        sums, highest = torch.zeros(8), torch.zeros(())
        for first, last in own:
            rows = {n: v[first:last] for n, v in options.items() if n != "beta"}
            micro = [t[first:last] for t in (part, *tokens)]
            out = grpo_loss(*micro, beta=0.05, **rows, **more)
            out.loss.backward()
            sums, highest = sums + out.sums, highest.maximum(out.metrics["ratio/max"])
        sums, highest = rank.sum(sums), torch.stack(rank.gather(highest)).amax()
        assert relative_error(sums[0], want.loss) < 4e-6
        assert relative_error(highest, want.metrics["ratio/max"]) < 1e-6
        assert relative_error(rank.sum(part.grad.nan_to_num()), whole.grad) < 2e-6, rule
        for name, value in means(sums).items():
            assert relative_error(value, want.metrics.get(name, value)) < 2e-6
