"""One rank of two: trainers of TRL's kind under DDP, started by torchrun; saves their logs."""

import sys

import torch
from trl import GRPOTrainer
from trl_runs import train

from grpo_fused.integrations.trl import FusedGRPOTrainer

OPTIONS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "beta": 0.1}
LOSSES = ("grpo", "dapo", "vespo")

if __name__ == "__main__":
    folder, output = sys.argv[1:]
    for loss in LOSSES:
        for trainer in (GRPOTrainer, FusedGRPOTrainer):
            run = train(trainer, folder, output, num_iterations=2, loss_type=loss, **OPTIONS)
            assert run.trainer.accelerator.num_processes == 2
            if run.trainer.accelerator.is_main_process:
                saved = run._replace(trainer=None)._asdict()
                torch.save(saved, f"{output}/{loss}-{trainer.__name__}.pt")
    run.trainer.accelerator.wait_for_everyone()  # a rank that is gone must not be waited for
    torch.distributed.destroy_process_group()
