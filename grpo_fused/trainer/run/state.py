"""Saves and restores all state that the next training step depends on."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import SAFE_WEIGHTS_NAME
from safetensors.torch import load_file

from grpo_fused.trainer.experience import Experience
from grpo_fused.trainer.reference import full_tensor
from grpo_fused.trainer.run.checkpoint import (
    PARTIAL,
    replace_folder,
    save_checkpoint,
    sync_folder,
)
from grpo_fused.trainer.run.errors import TrainingError, any_rank
from grpo_fused.trainer.run.resume_checks import check_same_run, run_metadata

METADATA = "trainer.json"


def save_state(trainer) -> None:
    """Writes a checkpoint of a trainer. Every rank must call it; see `save_checkpoint`."""

    def write(folder):
        # Model, optimizer and loss scale. It skips random states that it cannot read.
        trainer.accelerator.save_state(str(folder))
        experience = trainer.experience
        own = {
            "scheduler": trainer.scheduler.state_dict(),
            "experience": None if experience is None else experience.state_dict(),
            "random": random_states(trainer.accelerator.device),
        }
        torch.save(own, folder / rank_file(trainer))
        main, reference = trainer.accelerator.is_main_process, trainer.reference
        if reference is not None and (main or reference.model is None):
            torch.save(reference.state_dict(), folder / reference_file(trainer))
        if main:
            (folder / METADATA).write_text(json.dumps(run_metadata(trainer), indent=1))

    config = trainer.config
    save_checkpoint(
        trainer.accelerator, config.output_dir, trainer.step, write, config.save_total_limit
    )


def load_state(trainer, folder: str | Path) -> None:
    """Restores a trainer from a checkpoint. Every rank must call it.

    Raises:
        ValueError: the checkpoint was written with other settings, data or number of ranks.
    """
    folder = Path(folder)
    saved = json.loads((folder / METADATA).read_text())
    check_same_run(saved, run_metadata(trainer), trainer.config)
    device = trainer.accelerator.device
    trainer.accelerator.load_state(str(folder))
    own = torch.load(folder / rank_file(trainer), map_location="cpu", weights_only=True)
    trainer.scheduler.load_state_dict(own["scheduler"])
    trainer.experience = None
    if own["experience"] is not None:
        trainer.experience = Experience.from_state_dict(own["experience"], device)
    if trainer.reference is not None:
        state = torch.load(folder / reference_file(trainer), map_location="cpu", weights_only=True)
        trainer.reference.load_state_dict(state, trainer.unwrapped)
    trainer.step, trainer.rollouts = saved["step"], saved["rollouts"]
    set_random_states(own["random"], device)


def rank_file(trainer) -> str:
    """File of this rank's own state; Accelerate saves custom objects on rank 0 only."""
    return f"rank_{trainer.accelerator.process_index}.pt"


def reference_file(trainer) -> str:
    """File of the reference: one for a copied model, one per rank for sharded adapters."""
    if trainer.reference.model is not None:
        return "reference.pt"
    return f"reference_{trainer.accelerator.process_index}.pt"


def random_states(device: torch.device) -> dict[str, Any]:
    """Returns the states of all random generators that sampling and reward functions use."""
    kind, keys, *rest = np.random.get_state()
    states = {"torch": torch.get_rng_state(), "python": random.getstate()}
    states["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), *rest)
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Restores what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def exclude_frozen_weights(trainer) -> str | None:
    """Keeps frozen weights out of checkpoints: the base model of adapters is loaded elsewhere.

    Returns:
        A checksum by which a checkpoint recognises them; None if nothing is frozen.
    """
    # A tied head is in the state dict under both of its names.
    parameters = trainer.model.named_parameters(remove_duplicate=False)
    frozen = {name: p for name, p in parameters if not p.requires_grad}
    if not frozen:
        return None

    def drop_frozen(models, states, folder):
        for state in states:  # empty for sharded models, which Accelerate saves itself
            for name in frozen.keys() & state.keys():
                del state[name]

    def load_trained(models, folder):
        while models:
            state = load_file(Path(folder) / SAFE_WEIGHTS_NAME)
            missing, unexpected = models.pop().load_state_dict(state, strict=False)
            assert frozen.keys() >= set(missing) and not unexpected

    trainer.accelerator.register_save_state_pre_hook(drop_frozen)
    trainer.accelerator.register_load_state_pre_hook(load_trained)
    distinct = {id(p): p for p in frozen.values()}.values()
    total = float(sum(full_tensor(p).cpu().double().abs().sum() for p in distinct))
    return f"{total:.6e}"  # rounded: devices sum in different orders


def save_pretrained(trainer) -> None:
    """Writes `model/` for `from_pretrained`, replacing an older one only when complete.

    A process killed between the two renames leaves the old model as `model.old.partial` and the
    new one as `model.partial`. Every rank must call it.

    Raises:
        TrainingError: the model could not be written; the unfinished folder is deleted.
    """
    accelerator, error = trainer.accelerator, None
    weights = accelerator.get_state_dict(trainer.model)  # gathers sharded weights from all ranks
    final = Path(trainer.config.output_dir) / "model"
    if accelerator.is_main_process:
        partial = final.with_name(f"model{PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            trainer.unwrapped.save_pretrained(partial, state_dict=weights)
            trainer.tokenizer.save_pretrained(partial)
            sync_folder(partial)
            replace_folder(partial, final)
        except Exception as raised:  # safetensors raises exceptions of its own
            error = raised
            shutil.rmtree(partial, ignore_errors=True)
    if any_rank(accelerator, error is not None):
        raise TrainingError(f"{final} could not be written ({error or 'on rank 0'})") from error
