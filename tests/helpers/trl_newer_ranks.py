"""Train with FusedGRPOTrainer on two ranks, the second with another loss of TRL; by torchrun."""

import gc
import sys
from pathlib import Path

import torch
from trl import GRPOTrainer
from trl_runs import train

from grpo_fused.integrations.trl import FusedGRPOTrainer

if __name__ == "__main__":
    gc.freeze()  # accelerate collects garbage after each run
    folder, output = map(Path, sys.argv[1:])
    compute_loss, calls = GRPOTrainer._compute_loss, []

    def counted(self, model, inputs):
        calls.append(self._comparison.is_comparing)
        loss = compute_loss(self, model, inputs)
        return 2 * loss if self.accelerator.process_index else loss

    GRPOTrainer._compute_loss = counted
    run = train(FusedGRPOTrainer, folder, output, per_device_train_batch_size=4, max_steps=2)
    rank = run.trainer.accelerator.process_index
    assert run.trainer.accelerator.num_processes == 2
    (output / f"rank-{rank}").write_text("\n".join(run.warnings))
    if rank == 0:
        (output / "losses-of-trl").write_text(str(calls.count(False)))
    # No rank may exit while another one still communicates.
    run.trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()
