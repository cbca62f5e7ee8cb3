"""One rank of two: a trainer of TRL's kind under DDP, started by torchrun; saves what it logged."""

import sys

import torch
from trl import GRPOTrainer
from trl_runs import train

from grpo_fused.integrations.trl import FusedGRPOTrainer

if __name__ == "__main__":
    folder, output = sys.argv[1:]
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "beta": 0.1}
    for trainer in (GRPOTrainer, FusedGRPOTrainer):
        run = train(trainer, folder, output, num_iterations=2, loss_type="grpo", **options)
        assert run.trainer.accelerator.num_processes == 2
        if run.trainer.accelerator.is_main_process:
            torch.save(run._replace(trainer=None)._asdict(), f"{output}/{trainer.__name__}.pt")
