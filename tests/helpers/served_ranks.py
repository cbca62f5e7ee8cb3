"""Rollouts from a server on several ranks: checks for `ranks`, as `trainer_parallel_ranks`."""

import torch.distributed as dist
from parallel_trainer import load_start, trainer_on
from ranks import raises
from trainer_parallel_ranks import KINDS
from vllm_stub import Refused, Stub

from grpo_fused.trainer.run.checkpoint import list_checkpoints
from grpo_fused.trainer.run.errors import RolloutError


def check_served_rollouts(rank):
    """The main process asks for all ranks; groups straddle them; an error is one of every rank."""
    stub = Stub(f"{rank.folder}/start") if rank.rank == 0 else None
    urls = [stub and [stub.url]]
    dist.broadcast_object_list(urls)
    for kind in KINDS[rank.size]:
        folder = f"{rank.folder}/served-{kind}"
        given = {"rollout_fn": None, "rollout_source": "vllm", "vllm_servers": urls[0]}
        given |= {"vllm_retries": 0, "vllm_start_timeout": 5.0}
        trainer, records = trainer_on(folder, load_start(f"{rank.folder}/start", kind), **given)

        def fail(body, trainer=trainer):
            if trainer.step == 4:
                raise Refused(500, {"error": {"message": "out of memory"}})

        if stub:
            stub.log.clear()
            stub.faults["/v1/completions"] = fail
        raises(RolloutError, "HTTP 500: out of memory", trainer.train)
        assert sorted(records) == [1, 2, 3, 4]
        assert all(metrics["rollout/logp_difference"] < 1e-4 for metrics in records.values())
        assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-4"]
        if stub:
            assert stub.paths().count("/collective_rpc") == 3, "one sync a rollout"
            asked = [body["n"] for _, path, body in stub.log if path == "/v1/completions"]
            assert asked[:6] == [4] * 6, "one request per prompt, not one per rank"
            stub.faults.clear()
        resumed, later = trainer_on(
            folder, load_start(f"{rank.folder}/start", kind), resume="latest", **given
        )
        resumed.train()
        assert sorted(later) == [5, 6] and later[6]["rollout/logp_difference"] < 1e-4
    dist.barrier()
    if stub:
        stub.stop()
