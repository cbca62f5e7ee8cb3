"""Whole models of transformers, sharded, against one process: checks for `ranks`.

Ranks of data parallelism have parts of a batch, and wrappers average their gradients.
"""

import os
import warnings

import torch
import torch.distributed as dist
from batches import relative_error
from ranks import Exchanges
from tiny_models import fused_loss, gradients, tiny
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, DistributedConfig

from grpo_fused.integrations.transformers import fuse_lm_head

# The gradient is computed in forward, or in backward, which gathers the weight again.
OPTIONS = {}, {"importance_sampling_level": "sequence", "chunk_bytes": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def fsdp1(model, own_unit):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, but still used
        options = {"device_id": torch.device("cpu"), "use_orig_params": True}
        for n, layer in enumerate(model.model.layers):
            model.model.layers[n] = FullyShardedDataParallel(layer, **options)
        if own_unit:
            model.lm_head = FullyShardedDataParallel(model.lm_head, **options)
        return FullyShardedDataParallel(model, **options)


def fsdp2(model, own_unit, **mesh):
    for layer in model.model.layers:
        fully_shard(layer, **mesh)
    if own_unit == "norm":
        fully_shard([model.model.norm, model.lm_head], **mesh)
    elif own_unit:
        fully_shard(model.lm_head, **mesh)
    return fully_shard(model, **mesh)


def ddp(model, own_unit):
    return DistributedDataParallel(model)


# (model, wrapper, unit of the head, whether the head is fused after wrapping)
WRAPPINGS = [
    ("qwen3", fsdp1, "head", False),
    ("qwen3", fsdp1, "head", True),
    ("llama", fsdp1, None, True),  # tied
    ("qwen3", fsdp2, "head", False),
    ("qwen3", fsdp2, "norm", False),
    ("phi", fsdp2, None, True),
    ("llama", fsdp2, None, False),
    ("qwen3", ddp, None, False),
    ("llama", ddp, None, False),
]


def full_gradients(model):
    """{name: gradient} of a wrapped model, gathered."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = gradients(model)
    else:
        found = gradients(model)
    found = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}
    removed = ("_fsdp_wrapped_module.", "module.")
    return {n.replace(removed[0], "").removeprefix(removed[1]): g for n, g in found.items()}


def compare(found, want, case, tolerance=1e-6):
    assert found.keys() == want.keys(), case
    for name, gradient in found.items():
        error = relative_error(gradient, want[name])
        assert error < tolerance, (name, error, case)


def expected(model):
    """[gradients] of all rows in one process, for each of OPTIONS."""
    fuse_lm_head(model)
    found = []
    for options in OPTIONS:
        model.zero_grad()
        fused_loss(model, **options).loss.backward()
        found.append(gradients(model))
    return found


def rows(place, size):
    """Rows of a data-parallel rank; of three ranks one has more of them."""
    return torch.arange(4).tensor_split(size)[place]


def check_data_parallel(rank):
    """FSDP and DDP: gradients are reduced once, and averaged."""
    want = {name: expected(tiny(name)) for name in {case[0]: None for case in WRAPPINGS}}
    for name, wrap, unit, late in WRAPPINGS:
        model = tiny(name)
        if not late:
            fuse_lm_head(model)
        wrapped = wrap(model, unit)
        fuse_lm_head(model)
        for options, reference in zip(OPTIONS, want[name], strict=True):
            wrapped.zero_grad()
            output = fused_loss(wrapped, rows(rank.rank, rank.size), **options)
            (rank.size * output.loss).backward()
            compare(full_gradients(wrapped), reference, (name, wrap.__name__, unit, late, options))


def check_zero3(rank):
    """DeepSpeed ZeRO-3, which `make zero3` installs: untied and tied."""
    if "GRPO_FUSED_ZERO3" not in os.environ:
        return
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(rank.size)}
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}
    config |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    for name in ("qwen3", "llama"):
        want = expected(tiny(name))
        for options, reference in zip(OPTIONS, want, strict=True):
            model = tiny(name)
            fuse_lm_head(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            given = {"model": model, "optimizer": optimizer, "config": config}
            engine, *_ = deepspeed.initialize(**given)
            output = fused_loss(engine, rows(rank.rank, rank.size), **options)
            engine.backward(rank.size * output.loss)
            found = {n: safe_get_full_grad(p) for n, p in model.named_parameters()}
            compare(found, reference, ("zero3", name, options))


def check_gathers(rank):
    """A head that is an FSDP unit is gathered once a pass, its gradient reduced once."""
    model = tiny("qwen3")
    fuse_lm_head(model)
    wrapped = fsdp2(model, "head")
    size = -(-61 // rank.size) * 16 * 4  # bytes of a rank's rows of the head
    for options in OPTIONS:
        with Exchanges() as exchanges:
            output = fused_loss(wrapped, rows(rank.rank, rank.size), **options)
            assert exchanges.sent("gather").count(size) == 1
            output.loss.backward()
        assert exchanges.sent("gather").count(size) == 2, exchanges.log


def check_tensor_parallel(rank):
    """transformers' own plan shards the vocabulary, unevenly: V = 61. Tied, capped, with a bias."""
    if rank.size != 2:
        return
    for name in ("qwen3", "llama", "gemma2", "phi"):
        whole = tiny(name, **HEADS)
        want = expected(whole)
        model = load(rank, whole, DistributedConfig(tp_size=2))
        assert len(model.lm_head.weight.to_local()) == (31, 30)[rank.rank]
        fuse_lm_head(model)
        for options, reference in zip(OPTIONS, want, strict=True):
            model.zero_grad()
            with Exchanges() as exchanges:
                output = fused_loss(model, **options)
                output.loss.backward()
            assert not any(size > 61 * 16 for size in exchanges.sent("gather"))
            rank.assert_same_bits(output.loss, output.logps)
            compare(full_gradients(model), reference, (name, options), 1e-5)


def check_tensor_and_data_parallel(rank):
    """2 x 2: FSDP2 over pairs of ranks that share a vocabulary."""
    if rank.size != 4:
        return
    whole = tiny("qwen3", **HEADS)
    want = expected(whole)
    model = load(rank, whole, DistributedConfig(tp_size=2, fsdp_size=2))
    fuse_lm_head(model)
    for options, reference in zip(OPTIONS, want, strict=True):
        model.zero_grad()
        output = fused_loss(model, rows(rank.rank // 2, 2), **options)
        (2 * output.loss).backward()
        compare(full_gradients(model), reference, options, 1e-5)


def load(rank, whole, config):
    """A model as transformers loads it, distributed."""
    folder = f"{rank.folder}/{whole.config.model_type}"
    if rank.rank == 0:
        whole.save_pretrained(folder)
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()
