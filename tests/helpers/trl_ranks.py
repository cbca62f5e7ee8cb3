"""Train with TRL and with FusedGRPOTrainer under DDP, and save the runs; started by torchrun."""

import gc
import sys

import torch
from trl import GRPOTrainer
from trl_runs import train

from grpo_fused.integrations.trl import FusedGRPOTrainer

OPTIONS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "beta": 0.1}

if __name__ == "__main__":
    gc.freeze()  # accelerate collects garbage after each run
    folder, output, *losses = sys.argv[1:]
    for loss in losses:
        for trainer in (GRPOTrainer, FusedGRPOTrainer):
            run = train(trainer, folder, output, num_iterations=2, loss_type=loss, **OPTIONS)
            assert run.trainer.accelerator.num_processes == 2
            if run.trainer.accelerator.is_main_process:
                saved = run._replace(trainer=None)._asdict()
                torch.save(saved, f"{output}/{loss}-{trainer.__name__}.pt")
    # No rank may exit while another one still communicates.
    run.trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()
