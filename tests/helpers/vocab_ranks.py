"""Vocabulary-parallel functions against unsharded ones: checks for `ranks`.

In Triton's slow interpreter only the checks run that depend on its kernels.
"""

import torch
import torch.distributed as dist
from batches import make_batch, relative_error
from heads import chunk_bytes, loss_of, make_head_batch
from launch_counter import FULL, PLAIN, options_of
from packing import cu_seqlens, pack
from ranks import Exchanges, Rank, raises

from grpo_fused import (
    LOSSES,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
)

V = 97
SIZES = {2: ((40, 57), (1, 96)), 3: ((30, 41, 26), (1, 95, 1))}  # columns of each rank


class Shard(Rank):
    """A rank, and where its columns lie."""

    def __init__(self, rank, sizes):
        super().__init__(rank.rank, rank.size, rank.folder)
        self.sizes, self.start = sizes, sum(sizes[: self.rank])
        self.columns = slice(self.start, self.start + sizes[self.rank])

    def options(self, given):
        """Keywords of a sharded call; the start is given or exchanged."""
        start = {"vocab_start": self.start} if given else {}
        return {"vocab_parallel_group": self.group, **start}


def check_everything(rank):
    usual, odd = (Shard(rank, sizes) for sizes in SIZES[rank.size])
    of_kernels = (losses, log_probabilities, half_precision)
    of_torch = (packed, dtensors, heads, head_dtensors, head_log_probabilities, errors, traffic)
    for implementation in ("torch", "triton"):
        for check in of_kernels + of_torch * (implementation == "torch"):
            check(usual, implementation)
        log_probabilities(odd, implementation)
    head_traffic(usual)


def losses(rank, implementation):
    """Every loss of the family, with few options and with all; in Triton one of each kind."""
    for i, loss_type in enumerate(LOSSES if implementation == "torch" else ("dapo", "gspo")):
        for names in (PLAIN, FULL) if implementation == "torch" else (FULL,):
            batch = make_batch(V=V, dtype=torch.float32, seed=i)
            options = options_of(batch, *names) | {"loss_type": loss_type}
            options |= {"implementation": implementation, "compute_entropy": True}
            if names == FULL:
                temperature = 0.5 + torch.rand(4, 6, generator=torch.Generator().manual_seed(i))
                options |= {"temperature": temperature, "logit_softcap": 5.0}
                options |= {"logit_scale": 0.8, "use_bias_correction_kl": loss_type == "dapo"}
            tokens = (batch.ids, batch.mask, batch.advantages)
            whole, shard = batch.leaf(), batch.leaf()
            want = grpo_loss(whole, *tokens, **options)
            want.loss.backward()
            part = shard[..., rank.columns] * 1.0
            inplace = names == FULL
            got = grpo_loss(part, *tokens, inplace=inplace, **rank.options(i % 2), **options)
            got.loss.backward()
            where = (loss_type, names, implementation)
            errors = relative_error(got.loss, want.loss), want.loss.item()
            assert errors[0] < 2e-6 * max(1.0, 0.1 / abs(errors[1])), (where, errors)
            assert relative_error(got.logps, want.logps) < 1e-6, where
            assert relative_error(got.entropies, want.entropies) < 2e-6, where
            for name, value in want.metrics.items():
                assert relative_error(got.metrics[name], value) < 1e-5, (where, name)
            gradient = shard.grad[..., rank.columns]
            error = relative_error(gradient, whole.grad[..., rank.columns])
            assert error < 4e-6, (where, error)
            rank.assert_same_bits(got.loss, got.logps, got.entropies, got.sums)


def log_probabilities(rank, implementation):
    """Any upstream gradients; shards that are -inf as a whole; far logits; half precision."""
    for seed in range(3):
        batch = make_batch(V=V, seed=seed)
        logits = batch.logits + (3000.0 if seed == 1 else 0.0)
        if seed == 2:  # of the row's columns only the target's own are finite
            own = torch.arange(V) == batch.ids[..., None].clamp(min=0)
            logits[0, :6] = logits[0, :6].where(own[0], -torch.inf)
            logits[1, 0, : rank.sizes[0]] = -1e30
        upstream = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(seed))
        found = []
        for sharded in (False, True):
            leaf = logits.clone().requires_grad_()
            x = leaf[..., rank.columns] if sharded else leaf
            options = rank.options(True) if sharded else {}
            pair = selective_log_softmax(
                *(x, batch.ids, batch.mask),
                compute_entropy=True,
                implementation=implementation,
                **options,
            )
            sum((u * v.nan_to_num()).sum() for u, v in zip(upstream, pair, strict=True)).backward()
            found.append([*pair, leaf.grad[..., rank.columns]])
        for name, got, want in zip(("logp", "H", "gradient"), *found[::-1], strict=True):
            error = relative_error(got, want)
            assert error < 4e-6, (name, error, seed, rank.sizes, implementation)
        rank.assert_same_bits(*found[1][:2])


def packed(rank, implementation):
    batch, lengths = make_batch(V=V), (6, 1, 0, 4)
    logits, ids, mask = pack(lengths, batch.logits[:, :-1], batch.ids, batch.mask)
    options = {"cu_seqlens": cu_seqlens(lengths, "cpu"), "implementation": implementation}
    for loss_type in ("dapo", "gspo"):
        gradients = []
        for more in ({}, rank.options(False)):
            leaf = logits.clone().requires_grad_()
            x = leaf[..., rank.columns] if more else leaf
            out = grpo_loss(x, ids, mask, batch.advantages, loss_type=loss_type, **options, **more)
            out.loss.backward()
            gradients.append(leaf.grad[..., rank.columns])
        assert relative_error(gradients[1], gradients[0]) < 4e-6


def half_precision(rank, implementation):
    """bfloat16 shards: the gradient is rounded once, as that of whole rows."""
    batch = make_batch(V=V, dtype=torch.bfloat16)
    tokens = (batch.ids, batch.mask, batch.advantages)
    whole, shard = batch.leaf(), batch.leaf()
    grpo_loss(whole, *tokens, implementation=implementation).loss.backward()
    part = shard[..., rank.columns]
    out = grpo_loss(part, *tokens, implementation=implementation, **rank.options(True))
    out.loss.backward()
    got, want = (x.grad[..., rank.columns].float() for x in (shard, whole))
    assert relative_error(got, want) < 2e-3


def dtensors(rank, implementation):
    """Sharded logits bring their group, and get a gradient that is sharded as they are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as Placed

    mesh = init_device_mesh("cpu", (rank.size,), mesh_dim_names=("tp",))
    batch = make_batch(V=V)
    tokens, options = (batch.ids, batch.mask, batch.advantages), {"implementation": implementation}
    whole = batch.leaf()
    want = grpo_loss(whole, *tokens, **options)
    want.loss.backward()
    leaf = distribute_tensor(batch.logits.clone(), mesh, [Placed(2)]).requires_grad_()
    out = grpo_loss(leaf, *tokens, **options)
    out.loss.backward()
    assert leaf.grad.placements == (Placed(2),)
    assert relative_error(out.loss, want.loss) < 2e-6
    assert relative_error(leaf.grad.full_tensor(), whole.grad) < 4e-6
    for placement in (Placed(0), Replicate()):
        wrong = distribute_tensor(batch.logits.clone(), mesh, [placement])
        raises(ValueError, "redistribute", lambda w=wrong: grpo_loss(w, *tokens, **options))
    group = {"vocab_parallel_group": rank.group}
    grpo_loss(leaf, *tokens, **group, **options)  # the same ranks
    groups = [dist.new_group([k]) for k in range(rank.size)]
    alone = {"vocab_parallel_group": groups[rank.rank]}
    raises(ValueError, "must have the ranks", lambda: grpo_loss(leaf, *tokens, **alone, **options))
    start = {"vocab_start": 0}
    raises(ValueError, "must be None", lambda: grpo_loss(leaf, *tokens, **start, **options))


def heads(rank, implementation):
    """Every rank holds rows of the head; the gradient of hidden states is summed, or is not."""
    options = {"implementation": implementation, "chunk_bytes": chunk_bytes(7, V)}
    for loss_type in LOSSES if implementation == "torch" else ("dapo", "gspo"):
        head = make_head_batch(V=V)
        more = {"loss_type": loss_type, "old_logps": head.batch.old_logps, "entropy_coef": 0.02}
        want, leaves = loss_of(head, implementation, chunk_bytes=chunk_bytes(7, V), **more)
        want.loss.backward()
        for reduces in (True, False) if loss_type == "dapo" else (True,):
            hidden, weight, bias = head.leaves()
            part = (hidden, weight[rank.columns], head.batch.ids, head.batch.mask)
            out = linear_grpo_loss(
                *(*part, head.batch.advantages),
                bias=bias[rank.columns],
                reduce_hidden_grad=reduces,
                **options | more | rank.options(reduces),
            )
            out.loss.backward()
            if not reduces:
                dist.all_reduce(hidden.grad)
            assert relative_error(out.logps, want.logps) < 1e-6, loss_type
            rank.assert_same_bits(out.loss, out.logps, hidden.grad)
            rows = (slice(None), rank.columns, rank.columns)
            for got, leaf, place in zip((hidden, weight, bias), leaves, rows, strict=True):
                assert relative_error(got.grad[place], leaf.grad[place]) < 5e-6, loss_type


def head_dtensors(rank, implementation):
    """A head on a mesh ("tp",) is vocabulary-parallel; on another mesh only with its group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as Placed

    head, whole = make_head_batch(V=V), make_head_batch(V=V)
    tokens = (head.batch.ids, head.batch.mask, head.batch.advantages)
    want, leaves = loss_of(whole, implementation)
    want.loss.backward()
    for names, more in (("tp",), {}), (("data",), {"vocab_parallel_group": rank.group}):
        mesh = init_device_mesh("cpu", (rank.size,), mesh_dim_names=names)
        hidden, *parameters = head.leaves()
        weight, bias = (
            distribute_tensor(t.detach(), mesh, [Placed(0)]).requires_grad_() for t in parameters
        )
        out = linear_grpo_loss(hidden, weight, *tokens, bias=bias, **more)
        out.loss.backward()
        assert relative_error(out.loss, want.loss) < 2e-6
        assert weight.grad.placements == (Placed(0),)
        for got, leaf in zip((hidden, weight, bias), leaves, strict=True):
            got = got.grad if got is hidden else got.grad.full_tensor()
            assert relative_error(got, leaf.grad) < 5e-6
    plain = parameters[1].detach()
    narrow = distribute_tensor(parameters[0].detach()[:1], mesh, [Placed(0)])
    text = "must have columns on each"
    options = {"vocab_parallel_group": rank.group}
    raises(ValueError, text, lambda: linear_grpo_loss(hidden, narrow, *tokens, **options))
    plane = init_device_mesh("cpu", (1, rank.size), mesh_dim_names=("dp", "tp"))
    wide = distribute_tensor(parameters[0].detach(), plane, [Replicate(), Placed(0)])
    raises(ValueError, "one dimension", lambda: linear_grpo_loss(hidden, wide, *tokens, **options))
    unclear = (
        ("full_tensor", {"weight": weight, "bias": bias}),
        ("bias is a DTensor", {"weight": parameters[0], "bias": bias}),
        (
            "hidden is a DTensor",
            {"hidden": distribute_tensor(hidden.detach(), mesh, [Replicate()])},
        ),
    )
    for text, wrong in unclear:
        arguments = {"hidden": hidden, "weight": parameters[0], "bias": plain} | wrong
        given = (arguments.pop("hidden"), arguments.pop("weight"))
        raises(ValueError, text, lambda g=given, a=arguments: linear_grpo_loss(*g, *tokens, **a))


def head_log_probabilities(rank, implementation):
    """Logits kept for backward or computed again, any upstream gradients, a frozen head."""
    head = make_head_batch(V=V)
    tokens = (head.batch.ids, head.batch.mask)
    upstream = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    for save_logits in (False, True):
        for wanted in ("hwb", "h"):
            gradients = []
            for more in ({}, rank.options(True)):
                hidden, weight, bias = head.leaves(wanted)
                rows = rank.columns if more else slice(None)
                pair = linear_selective_log_softmax(
                    *(hidden, weight[rows], *tokens),
                    bias=bias[rows],
                    compute_entropy=True,
                    chunk_bytes=chunk_bytes(7, V),
                    save_logits=save_logits,
                    implementation=implementation,
                    **more,
                )
                sum((u * v).sum() for u, v in zip(upstream, pair, strict=True)).backward()
                grads = [t.grad[rank.columns] for t in (weight, bias) if t.grad is not None]
                gradients.append([hidden.grad, *grads])
            for want, got in zip(*gradients, strict=True):
                assert relative_error(got, want) < 5e-6


def errors(rank, implementation):
    """On every rank: an id that no rank has, a group of the wrong kind, a start without a group."""
    batch = make_batch(V=V)
    part = batch.logits[..., rank.columns]
    ids = batch.ids.clone()
    ids[0, 1] = V + 3
    for given in (False, True):
        more = rank.options(given) | {"implementation": implementation}
        text = f"[0, {V})" if not given else "no rank"
        raises(ValueError, text, lambda m=more: selective_log_softmax(part, ids, batch.mask, **m))
    wrong = {"vocab_parallel_group": "tp"}
    raises(ValueError, "'tp'", lambda: selective_log_softmax(part, ids, batch.mask, **wrong))
    group = {"vocab_parallel_group": rank.group}
    raises(ValueError, "logits must", lambda: selective_log_softmax(None, ids, **group))
    start = {"vocab_start": 0}
    raises(ValueError, "requires", lambda: selective_log_softmax(part, ids, batch.mask, **start))


def traffic(rank, implementation):
    """One exchange of 16 bytes a token and rank, 12 without entropies; none in backward."""
    batch, sent = make_batch(V=V), []
    for entropy in (False, True):
        part = batch.leaf()[..., rank.columns]
        more = {"implementation": implementation, "compute_entropy": entropy}
        with Exchanges() as exchanges:
            out = selective_log_softmax(part, batch.ids, batch.mask, **rank.options(True), **more)
            out[0].sum().backward()
        assert not exchanges.sent("reduce")
        sent += exchanges.sent("gather")
    assert sent == [12 * 24, 16 * 24]


def head_traffic(rank):
    """One exchange a chunk, waited for after the next chunk's began; one sum over hidden states."""
    head = make_head_batch(V=V, mask=torch.ones(4, 6))
    hidden, weight, bias = head.leaves()
    b, options = head.batch, {"chunk_bytes": 2 * chunk_bytes(8, max(rank.sizes))}
    with Exchanges() as exchanges:
        linear_grpo_loss(
            *(hidden, weight[rank.columns], b.ids, b.mask, b.advantages),
            bias=bias[rank.columns],
            implementation="torch",
            **options | rank.options(True),
        ).loss.backward()
    assert exchanges.sent("gather") == [8] + [12 * 8] * 3
    assert exchanges.sent("reduce") == [hidden.nbytes]
    gather = ("gather", 12 * 8)
    assert exchanges.log[2:-1] == [gather, gather, "wait", gather, "wait", "wait"]
