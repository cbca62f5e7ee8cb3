"""Vocabulary-parallel losses on two gloo processes, against gathering logits or the weight.

    python -m benchmarks.ranks [--json FILE]
    python -m benchmarks.ranks --model

Every process has one thread. Ways to compute one loss alternate; times are medians over the rounds
of the slower rank. Collectives and their bytes are counted as they are called. A rank's bytes are
those it contributes to a gather, and the tensor that a reduction sums. `--model` prints the tables
of docs/scaling.md: what a head costs by its bytes and operations on GPUs that share a node.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.measure import environment
from benchmarks.predict import GPUS
from grpo_fused import grpo_loss, linear_grpo_loss

ROUNDS, WORLD = 7, 2
B, T, V, H = 4, 128, 65_536, 512


class Counted:
    """Context manager that counts the bytes of the collectives that a rank calls."""

    NAMES = ("all_gather_into_tensor", "all_gather_single", "all_reduce")

    def __enter__(self):
        self.bytes, self.calls, self.originals = 0, 0, {}
        for name in self.NAMES:
            if original := getattr(dist, name, None):
                self.originals[name] = original
                setattr(dist, name, self._counted(original, 0 if name == "all_reduce" else 1))
        return self

    def _counted(self, function, place):
        def call(*args, **kwargs):
            self.bytes += args[place].nbytes
            self.calls += 1
            return function(*args, **kwargs)

        return call

    def __exit__(self, *exception):
        for name, original in self.originals.items():
            setattr(dist, name, original)


def gathered(part, dimension):
    """Shards of all ranks, joined; the gradient of every rank is that of its own shard."""
    parts = part.new_empty(WORLD, *part.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), part.detach().contiguous())
    parts = list(parts.unbind(0))
    parts[dist.get_rank()] = part
    return torch.cat(parts, dimension)


def ways(rank, device="cpu"):
    """{case: {way: a step without arguments}}."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    own = slice(rank * V // WORLD, (rank + 1) * V // WORLD)
    ids = torch.randint(V, (B, T), generator=generator)
    tokens = (ids, torch.ones(B, T, dtype=torch.bool), normal(B))
    options = {"num_items_in_batch": B * T, "old_logps": normal(B, T) - 11}
    shards = {"vocab_parallel_group": dist.group.WORLD, "vocab_start": own.start}
    logits = (2 * normal(B, T, V))[..., own].clone().requires_grad_()
    hidden = normal(B, T, H).requires_grad_()
    weight = (normal(V, H) * 2.5 * H**-0.5)[own].clone().requires_grad_()

    def sharded_logits():
        grpo_loss(logits, *tokens, **options, **shards).loss.backward()

    def gathered_logits():
        grpo_loss(gathered(logits, -1), *tokens, **options).loss.backward()

    def sharded_head():
        linear_grpo_loss(hidden, weight, *tokens, **options, **shards).loss.backward()

    def gathered_head():
        linear_grpo_loss(hidden, gathered(weight, 0), *tokens, **options).loss.backward()

    return {
        f"logits, {B * T} tokens, V = {V}, float32": {
            "exchange statistics": sharded_logits,
            "gather logits": gathered_logits,
        },
        f"head, {B * T} tokens, H = {H}, V = {V}, float32": {
            "exchange statistics": sharded_head,
            "gather the weight": gathered_head,
        },
    }, (logits, hidden, weight)


def exchange(tokens):
    """A step that only gathers the statistics of so many tokens: 12 bytes a token."""
    part = torch.zeros(3, tokens)
    whole = part.new_empty(3 * WORLD, tokens)
    return lambda: dist.all_gather_into_tensor(whole, part)


def seconds(step):
    """Seconds of a step on the slower rank."""
    dist.barrier()
    start = time.perf_counter()
    step()
    found = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def run_rank(rank, folder, queue):
    torch.set_num_threads(1)
    rendezvous = {"init_method": f"file://{folder}/meet", "timeout": timedelta(seconds=300)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, **rendezvous)
    cases, leaves = ways(rank)
    found = {}
    for case, steps in cases.items():
        times = {way: [] for way in steps}
        for number in range(ROUNDS + 1):
            for way, step in steps.items():
                took = seconds(step)
                if number:  # the first round warms up
                    times[way].append(took)
                for leaf in leaves:
                    leaf.grad = None
        found[case] = {}
        for way, step in steps.items():
            with Counted() as counted:
                step()
            row = {"seconds": statistics.median(times[way]), "min": min(times[way])}
            found[case][way] = row | {"collectives": counted.calls, "bytes": counted.bytes}
    for tokens in (512, 4096, 32_768):
        step = exchange(tokens)
        times = [seconds(step) for _ in range(20)]
        found.setdefault("the exchange alone", {})[f"{tokens} tokens"] = {
            "seconds": statistics.median(times),
            "min": min(times),
            "collectives": 1,
            "bytes": 12 * tokens,
        }
    if rank == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()


NVLINK = 0.8 * 450e9  # bytes per second into an H100 or H200, as collectives reach them
LATENCY = 20e-6  # seconds of a small collective


class Head(NamedTuple):
    """A head's loss and gradients in bfloat16 over tensor-parallel ranks, for one rank."""

    tokens: int
    V: int
    H: int
    ranks: int

    @property
    def matmuls(self):
        """Seconds of three matmuls."""
        return 6 * self.tokens * self.H * self.V / self.ranks / GPUS[2].flops

    @property
    def chunks(self):
        """Two chunks of logits exist at a time, in 1 GiB."""
        rows = 2**29 // (2 * math.ceil(self.V / self.ranks))
        return math.ceil(self.tokens / rows)

    @property
    def exchanged(self):
        """Bytes into this rank: statistics, and the sum of the gradients of hidden states."""
        others = self.ranks - 1
        return 12 * self.tokens * others, 2 * 2 * self.tokens * self.H * others // self.ranks

    @property
    def exchanges(self):
        """Seconds in collectives, if none is hidden behind a matmul."""
        if self.ranks == 1:
            return 0.0
        return sum(self.exchanged) / NVLINK + LATENCY * (self.chunks + 2)

    @property
    def logits(self):
        """Bytes into this rank if logits are gathered."""
        return 2 * self.tokens * self.V * (self.ranks - 1) // self.ranks

    @property
    def weight(self):
        """Bytes into this rank if the weight is gathered and its gradient scattered."""
        return 2 * 2 * self.V * self.H * (self.ranks - 1) // self.ranks


def model_tables(tokens=32_768, H=4096):
    print(f"{tokens} tokens, H = {H}, bfloat16, H200 (modelled)\n")
    print("| V | ranks | matmuls ms | collectives ms | statistics MB | dhidden MB | ", end="")
    print("logits instead MB | weight instead MB |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for V in (32_000, 128_256, 151_936, 262_144):
        for ranks in (1, 2, 4, 8):
            head = Head(tokens, V, H, ranks)
            cells = [1e3 * head.matmuls, 1e3 * head.exchanges]
            cells += [size / 1e6 for size in (*head.exchanged, head.logits, head.weight)]
            print(f"| {V:,} | {ranks} | {' | '.join(f'{cell:,.1f}' for cell in cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--model", action="store_true", help="print the modelled tables")
    options = parser.parse_args()
    if options.model:
        model_tables()
        return
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (folder, queue), nprocs=WORLD)
    found = queue.get()
    print("| case | way | ms | collectives | bytes of a rank |\n| --- | --- | ---: | ---: | ---: |")
    for case, rows in found.items():
        for way, row in rows.items():
            numbers = f"{row['collectives']} | {row['bytes']:,}"
            print(f"| {case} | {way} | {1e3 * row['seconds']:.2f} | {numbers} |")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"environment": environment("cpu"), "cases": found}, file, indent=1)


if __name__ == "__main__":
    main()
