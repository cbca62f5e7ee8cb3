"""Ranks of a gloo group, each of which runs the checks of modules of this folder.

    python ranks.py RANK WORLD_SIZE FOLDER MODULE...

runs one rank by hand. Every function `check_...(rank)` of a module runs; `rank` is a `Rank`.
"""

import importlib
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from interpreter import speed_up  # noqa: E402

from grpo_fused import collectives  # noqa: E402

# By the server that ranks are forked from, for every test that starts ranks.
IMPORTED = ["grpo_fused.demo", "hypothesis", "peft", "transformers"]


class Rank:
    """This process, in a group of all."""

    def __init__(self, rank, size, folder):
        self.rank, self.size, self.folder, self.group = rank, size, folder, dist.group.WORLD

    def gather(self, tensor):
        """The tensors of all ranks, of one shape."""
        found = [torch.empty_like(tensor.detach()) for _ in range(self.size)]
        dist.all_gather(found, tensor.detach().contiguous())
        return found

    def sum(self, tensor):
        return torch.stack(self.gather(tensor)).sum(0)

    def assert_same_bits(self, *tensors):
        """Every rank has the same results."""
        for tensor in tensors:
            first, *others = [values.view(torch.int32) for values in self.gather(tensor)]
            assert all(torch.equal(first, other) for other in others)


def raises(error, text, function):
    try:
        function()
    except error as found:
        assert text in str(found), found
    else:
        raise AssertionError(f"no {error.__name__} with {text!r}")


class Exchanges:
    """Context manager that lists (collective, bytes of this rank) of the exchanges of the package.

    Attributes:
        log: the exchanges, and "wait" where a gather is waited for.
    """

    def __enter__(self):
        self.log, self.doors = [], (dist.all_gather_into_tensor, dist.all_reduce)
        self.single = getattr(dist, "all_gather_single", None)
        self.wait = collectives.Pending.wait
        dist.all_gather_into_tensor = self._count("gather", dist.all_gather_into_tensor, 1)
        dist.all_reduce = self._count("reduce", dist.all_reduce, 0)
        if self.single is not None:
            dist.all_gather_single = self._count("gather", self.single, 1)

        def wait(pending):
            self.log.append("wait")
            return self.wait(pending)

        collectives.Pending.wait = wait
        return self

    def _count(self, name, function, place):
        def call(*args, **kwargs):
            self.log.append((name, args[place].nbytes))
            return function(*args, **kwargs)

        return call

    def __exit__(self, *exception):
        dist.all_gather_into_tensor, dist.all_reduce = self.doors
        if self.single is not None:
            dist.all_gather_single = self.single
        collectives.Pending.wait = self.wait

    def sent(self, name):
        """Bytes of every exchange of a kind."""
        return [entry[1] for entry in self.log if entry[0] == name]


def run(rank, size, folder, modules, slow=False):
    """One rank, in a process of its own."""
    if slow:  # the server's environment is that of the first test
        os.environ["GRPO_FUSED_SLOW"] = "1"
    torch.set_num_threads(1)
    speed_up()
    rendezvous = {"init_method": f"file://{folder}/meet{size}", "timeout": timedelta(seconds=60)}
    # For libraries that ask the environment.
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{size}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # unused: the group exists
    dist.init_process_group("gloo", rank=rank, world_size=size, **rendezvous)
    for module in map(importlib.import_module, modules):
        for name, check in list(vars(module).items()):
            if name.startswith("check_"):
                began = time.perf_counter()
                try:
                    check(Rank(rank, size, folder))
                except BaseException:
                    print(f"{module.__name__}.{name} failed on rank {rank}", file=sys.stderr)
                    raise
                print(f"{module.__name__}.{name}: {time.perf_counter() - began:.1f} s", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def start(size, folder, modules, slow=False, seconds=300):
    """Run all ranks, forked from a server that has imported what they need once for all tests.

    Args:
        size: number of ranks.
        folder: where they meet.
        modules: names of those with the checks.
        slow: run the checks that take long, too.
        seconds: after which all are killed.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of a rank.
        TimeoutError: they took longer.
    """
    Path(folder, f"meet{size}").unlink(missing_ok=True)
    torch.multiprocessing.set_forkserver_preload(IMPORTED)
    context = torch.multiprocessing.start_processes(
        run, (size, str(folder), modules, slow), nprocs=size, join=False, start_method="forkserver"
    )
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=5):
            if time.monotonic() > end:
                raise TimeoutError(f"{size} ranks of {modules} took more than {seconds} s")
    finally:
        for process in context.processes:
            process.kill()


if __name__ == "__main__":
    rank, size, folder, *modules = sys.argv[1:]
    run(int(rank), int(size), folder, modules)
