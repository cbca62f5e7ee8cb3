"""Compare with TRL's own loss on two ranks, then train; started by torchrun.

    torchrun ... trl_newer_ranks.py ddp|fsdp2|zero3 FOLDER OUTPUT CASE...

A case is "stock", "same", "other" (the loss of TRL on rank 1 alone) or "failing" (our loss). Each
rank writes to OUTPUT what it warned of, its metrics, and how often TRL computed the loss of a step.
"""

import gc
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from trl import GRPOTrainer
from trl_runs import train

from grpo_fused.integrations.trl import FusedGRPOTrainer

OPTIONS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "beta": 0.1}
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}
KINDS = {
    "ddp": ({}, DistributedType.MULTI_CPU),
    "fsdp2": ({"fsdp": True, "fsdp_config": {"version": 2}}, DistributedType.FSDP),
    "zero3": ({"deepspeed": ZERO3}, DistributedType.DEEPSPEED),
}
compute_loss = GRPOTrainer._compute_loss
make_state = AcceleratorState.__init__


def make_state_on_cpu(self, *args, fsdp_plugin=None, **options):
    """Accelerate leaves FSDP aside on CPUs, where PyTorch has it."""
    make_state(self, *args, fsdp_plugin=fsdp_plugin, **options)
    self.fsdp_plugin = fsdp_plugin or getattr(self, "fsdp_plugin", None)
    if self.fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP


class FailingTrainer(FusedGRPOTrainer):
    """Ours with a fault in the loss."""

    def _objective(self):
        raise RuntimeError("no objective")


def run(case, kind, folder, output):
    """Train; return the run and the number of losses that TRL computed for a step."""
    calls, trainers = [], {"stock": GRPOTrainer, "failing": FailingTrainer}

    def counted(self, model, inputs):
        calls.append(case != "stock" and self._comparison.is_comparing)
        loss = compute_loss(self, model, inputs)
        return 2 * loss if case == "other" and self.accelerator.process_index == 1 else loss

    GRPOTrainer._compute_loss = counted
    options, expected = KINDS[kind]
    trainer = trainers.get(case, FusedGRPOTrainer)
    found = train(trainer, folder, output, max_steps=2, **OPTIONS, **options)
    assert found.trainer.accelerator.num_processes == 2
    assert found.trainer.accelerator.distributed_type is expected
    return found, calls.count(False)


if __name__ == "__main__":
    gc.freeze()  # accelerate collects garbage after each run
    kind, folder, output, *cases = sys.argv[1:]
    if kind == "fsdp2":
        AcceleratorState.__init__ = make_state_on_cpu
    if kind == "zero3":
        os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": os.environ["WORLD_SIZE"]}
        import deepspeed

        deepspeed.init_distributed("gloo")  # a model is sharded when it is loaded
    for case in cases:
        found, losses = run(case, kind, folder, output)
        result = {"warnings": found.warnings, "log": found.log, "losses_of_trl": losses}
        rank = found.trainer.accelerator.process_index
        torch.save(result, Path(output) / f"{case}-{rank}.pt")
    # No rank may exit while another one still communicates.
    found.trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()
