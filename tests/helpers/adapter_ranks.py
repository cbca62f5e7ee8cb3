"""Adapters of trainers with tensor parallelism, against whole vocabularies: for `ranks`."""

import contextlib
import copy
import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch
from adapters import (
    NEMO_RL,
    SLIME,
    fake_megatron,
    fake_nemo_rl,
    load,
    nemo_batch,
    slime_batch,
    sum_of_sample_mean,
)
from batches import relative_error
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from grpo_fused.integrations import verl_kernels


@contextlib.contextmanager
def megatron(rank):
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_megatron(monkeypatch, rank.group)
        yield monkeypatch


def columns_of(rank, logits):
    """Megatron's shard: vocabularies are padded to a multiple of the ranks."""
    size = logits.shape[-1] // rank.size
    return slice(rank.rank * size, (rank.rank + 1) * size)


def divisible(rank, logits):
    V = logits.shape[-1]
    padded = torch.nn.functional.pad(logits, (0, -V % rank.size), value=-1e4)
    return padded.detach()


def compare(rank, whole, shard, logits, part):
    """Losses of whole rows and of shards, and their gradients; returns that of whole rows."""
    assert relative_error(shard, whole) < 3e-6
    (want,) = torch.autograd.grad(whole, logits)
    (got,) = torch.autograd.grad(shard, part)
    columns = columns_of(rank, logits)
    assert relative_error(got[..., columns], want[..., columns]) < 4e-6
    return want


def check_slime(rank):
    with megatron(rank):
        for estimator in ("grpo", "gspo"):
            logits, data = slime_batch(6)
            logits = divisible(rank, logits).requires_grad_()
            part = logits.detach().clone().requires_grad_()
            args = SLIME | {"advantage_estimator": estimator}
            sharded = args | {"tensor_model_parallel_size": rank.size}
            loss, reduce = load("slime").fused_policy_loss, sum_of_sample_mean(data)
            whole, _ = loss(SimpleNamespace(**args), data, logits, reduce)
            columns = columns_of(rank, logits)
            shard, _ = loss(SimpleNamespace(**sharded), data, part[..., columns], reduce)
            compare(rank, whole, shard, logits, part)


def check_nemo_rl(rank):
    """Megatron's local shards, and the DTensors of its other workers."""
    with megatron(rank) as monkeypatch:
        fake_nemo_rl(monkeypatch)
        losses = load("nemo_rl")
        logits, data = nemo_batch()
        logits = divisible(rank, logits).requires_grad_()
        part = logits.detach().clone().requires_grad_()
        counts = {"global_valid_seqs": torch.tensor(9.0), "global_valid_toks": torch.tensor(50.0)}
        config = SimpleNamespace(**NEMO_RL | {"ratio_clip_c": 1.5})
        whole, want = losses.FusedPGLossFn(config)(data=data, **counts, logits=logits)
        columns = columns_of(rank, logits)
        loss = losses.MegatronPGLossFn(config)
        shard, metrics = loss(data=data, **counts, logits=part[..., columns])
        assert metrics["probs_ratio"] == pytest.approx(want["probs_ratio"], rel=1e-5)
        gradient = compare(rank, whole, shard, logits, part)
        mesh = init_device_mesh("cpu", (rank.size,), mesh_dim_names=("tp",))
        placed = distribute_tensor(logits.detach(), mesh, [Shard(-1)]).requires_grad_()
        shard, _ = losses.FusedPGLossFn(config)(data=data, **counts, logits=placed)
        (got,) = torch.autograd.grad(shard, placed)
        assert relative_error(got.full_tensor(), gradient) < 4e-6


def check_verl(rank):
    """Its functions over Megatron's shards, of logits and of the head."""
    generator = torch.Generator().manual_seed(0)
    V, H = 16 * rank.size, 8
    hidden = torch.randn(2, 5, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    labels = torch.randint(0, V, (2, 5), generator=generator)
    upstream = torch.randn(2, 10, generator=generator)
    own = slice(16 * rank.rank, 16 * (rank.rank + 1))
    found = []
    for rows, group in ((slice(None), None), (own, rank.group)):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        pair = verl_kernels.linear_cross_entropy(x, w[rows], labels, 0.7, "none", group)
        loss = sum((u * v).sum() for u, v in zip(upstream, pair, strict=True))
        gradients = torch.autograd.grad(loss, (x, w))
        found.append([*pair, *gradients])
    (want, got), rows = found, (slice(None),) * 3 + (own,)
    got[2] = rank.sum(got[2])  # the gather of sequence-parallel hidden states does
    for a, b, place in zip(got, want, rows, strict=True):
        assert relative_error(a[place], b[place]) < 5e-6
    with megatron(rank):
        theirs = _verl_on_megatron()
        logits = (hidden @ weight.T).detach()
        exact = logits.double().log_softmax(-1)
        x = logits.clone().requires_grad_()
        logps = verl_kernels.vocab_parallel_log_probs_from_logits(x[..., own], labels)
        assert relative_error(logps, exact.gather(-1, labels[..., None])[..., 0]) < 2e-6
        entropies = verl_kernels.vocab_parallel_entropy(x[..., own])
        assert relative_error(entropies, -(exact.exp() * exact).sum(-1)) < 2e-6
        chunked = verl_kernels.vocab_parallel_entropy_with_chunking(x[..., own], 3)
        assert torch.equal(chunked, entropies)
        (gradient,) = torch.autograd.grad(entropies.sum(), x)
        if theirs is None:
            return
        y = logits.clone().requires_grad_()
        with torch.compiler.set_stance("force_eager"):  # it compiles a product
            peers = theirs.vocab_parallel_entropy(y[..., own].clone())
            (peer,) = torch.autograd.grad(peers.sum(), y)
        assert relative_error(entropies, peers) < 1e-5 and relative_error(gradient, peer) < 1e-5
        originals = copy.copy(vars(theirs))
        replaced = verl_kernels.patch_verl()
        for name in verl_kernels.MEGATRON:
            assert f"verl.utils.megatron.tensor_parallel.{name}" in replaced
            assert getattr(theirs, name) is getattr(verl_kernels, name) is not originals[name]


def _verl_on_megatron():
    """verl's module, if verl is installed: GRPO_FUSED_SLOW=1, for it takes long to import."""
    if "GRPO_FUSED_SLOW" not in os.environ or importlib.util.find_spec("verl") is None:
        return None
    from verl.utils.megatron import tensor_parallel

    return tensor_parallel
