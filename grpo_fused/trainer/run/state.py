"""Saves and restores all state that the next training step depends on."""

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as distributed_checkpoint
import transformers
from accelerate import Accelerator
from accelerate.utils import SAFE_WEIGHTS_NAME, DistributedType, set_seed
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import GenerationConfig

from grpo_fused.integrations.transformers import base_model
from grpo_fused.trainer.experience import Experience
from grpo_fused.trainer.reference import full_tensor
from grpo_fused.trainer.run.checkpoint import (
    PARTIAL,
    replace_folder,
    save_checkpoint,
    sync_folder,
    write_together,
)
from grpo_fused.trainer.run.loading import absolute_base
from grpo_fused.trainer.run.resume_checks import check_same_run, run_metadata
from grpo_fused.trainer.run.safe_loading import as_data
from grpo_fused.trainer.run.summary import RunSummary

METADATA, SHARDS, REWARD_TRAINING = "trainer.json", "shards", "reward_training.pt"


def save_state(trainer) -> None:
    """Writes a checkpoint of a trainer. Every rank must call it; see `save_checkpoint`."""

    def write(folder):
        save_model(trainer, folder)
        experience = trainer.experience
        own = {
            "scheduler": trainer.scheduler.state_dict(),
            "critic": None if trainer.critic is None else trainer.critic.scheduler.state_dict(),
            "experience": None if experience is None else experience.state_dict(),
            "random": random_states(trainer.accelerator.device),
        }
        if trainer.ranks.is_first:
            torch.save(own, folder / rank_file(trainer.ranks.index))
        main, reference = trainer.accelerator.is_main_process, trainer.reference
        shared = reference is not None and reference.model is not None
        if reference is not None and not trainer.ranks.distributed and (main or not shared):
            torch.save(reference.state_dict(), folder / reference_file(trainer))
        if main and trainer.reward_training is not None:
            torch.save(trainer.reward_training.state_dict(), folder / REWARD_TRAINING)
        if main:
            metadata = run_metadata(trainer) | {"evaluation_due": trainer.evaluation_due}
            metadata["summary"] = asdict(trainer.summary) | {"seconds": trainer.seconds()}
            (folder / METADATA).write_text(json.dumps(metadata, indent=1))

    config = trainer.config
    save_checkpoint(
        trainer.accelerator, config.output_dir, trainer.step, write, config.save_total_limit
    )


def load_state(trainer, folder: str | Path) -> None:
    """Restores a trainer from a checkpoint. Every rank must call it.

    On another number of data-parallel ranks, the experience is dealt out anew: steps have the same
    gradients, up to rounding. Random states are new ones, so that later samples differ.

    Raises:
        ValueError: the checkpoint was written with other settings or data, cannot be divided among
            the ranks, or names code to be run.
    """
    folder = Path(folder)
    deepspeed = trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
    with as_data(folder, trust=deepspeed):
        _restore(trainer, folder)


def _restore(trainer, folder: Path) -> None:
    saved = json.loads((folder / METADATA).read_text())
    check_same_run(saved, run_metadata(trainer), trainer.config)
    device, ranks = trainer.accelerator.device, trainer.ranks
    load_model(trainer, folder)
    same = saved["ranks"] == ranks.size
    if not same:
        set_seed((trainer.config.seed + 1009 * saved["step"] + ranks.index) % 2**32)
    numbers = [ranks.index] if same else range(saved["ranks"])
    parts = [
        torch.load(folder / rank_file(number), map_location="cpu", weights_only=True)
        for number in numbers
    ]
    trainer.scheduler.load_state_dict(parts[0]["scheduler"])
    if trainer.critic is not None:
        trainer.critic.scheduler.load_state_dict(parts[0]["critic"])
    trainer.experience = None
    if parts[0]["experience"] is not None:
        cpu = torch.device("cpu")
        found = [Experience.from_state_dict(part["experience"], cpu) for part in parts]
        where = (trainer.config.minibatches, ranks.index, ranks.size, trainer.sampler.pad_id)
        experience = found[0] if same else Experience.deal(found, *where)
        experience.batch = experience.batch.to(device)
        trainer.experience = experience
    if trainer.reference is not None and not ranks.distributed:
        shared = trainer.reference.model is not None
        file = folder / (reference_file(trainer) if same or shared else "reference_0.pt")
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not (same or shared or state is None):
            raise ValueError(
                "resume: adapters that the reference has taken over are saved by rank, so that "
                f"{ranks.size} ranks cannot resume what {saved['ranks']} ranks saved"
            )
        trainer.reference.load_state_dict(state, trainer.unwrapped)
    if trainer.reward_training is not None:
        state = torch.load(folder / REWARD_TRAINING, map_location="cpu", weights_only=True)
        trainer.reward_training.load_state_dict(state)
    trainer.step, trainer.rollouts = saved["step"], saved["rollouts"]
    position = trainer.rollouts * trainer.config.prompts_per_rollout
    trainer.data_position = saved.get("data position", position)  # older checkpoints lack it
    trainer.order.load_state_dict(saved.get("place in data"), trainer.data_position)
    trainer.evaluation_due = saved.get("evaluation_due", False)
    trainer.summary = RunSummary(**saved.get("summary", {}))
    trainer.refreshed = saved.get("refreshed", 0)
    if same:
        set_random_states(parts[0]["random"], device)


def save_model(trainer, folder: Path) -> None:
    """Saves model, optimizer and, by Accelerate, a loss scale; every rank its shards."""
    if not trainer.ranks.distributed:
        # It skips random states that it cannot read.
        trainer.accelerator.save_state(str(folder))
        return
    distributed_checkpoint.save(distributed_state(trainer), checkpoint_id=folder / SHARDS)


def load_model(trainer, folder: Path) -> None:
    """Loads what `save_model` saved."""
    if not trainer.ranks.distributed:
        trainer.accelerator.load_state(str(folder))
        return
    state = distributed_state(trainer)
    distributed_checkpoint.load(state, checkpoint_id=folder / SHARDS)
    set_state_dict(
        trainer.unwrapped,
        trainer.optimizer.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def distributed_state(trainer) -> dict[str, Any]:
    """Model, optimizer and reference of a distributed model, by names, as `DTensor`s."""
    model, optimizer = get_state_dict(trainer.unwrapped, trainer.optimizer.optimizer)
    state = {"model": model, "optimizer": optimizer}
    if trainer.reference is not None:
        values = enumerate(trainer.reference.values)
        state["reference"] = {str(number): value for number, value in values}
    return state


def rank_file(index: int) -> str:
    """File of a data-parallel rank's own state; Accelerate saves custom objects on rank 0 only."""
    return f"rank_{index}.pt"


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


def share_random_states(ranks, device: torch.device) -> None:
    """Gives ranks that share a batch the random states of the first: they sample together."""
    if ranks.tensor_group is not None:
        set_random_states(ranks.broadcast(random_states(device)), device)


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
    parameters = list(trainer.model.named_parameters(remove_duplicate=False))
    frozen = {name: p for name, p in parameters if not p.requires_grad}
    if not frozen:
        return None

    # Quantized weights have entries of their own besides parameters and buffers.
    kept = trainer.model.state_dict().keys() - frozen.keys()
    kept &= {n for n, _ in parameters if n not in frozen} | dict(
        trainer.model.named_buffers()
    ).keys()

    def drop_frozen(models, states, folder):
        policy = states[0]  # empty for sharded models, which Accelerate saves itself
        for name in policy.keys() - kept:
            del policy[name]

    def load_trained(models, folder):
        folder = Path(folder)
        while models:  # the policy is the first; a critic has all of its weights
            model, file = models.pop(), Path(SAFE_WEIGHTS_NAME)
            if models:
                file = file.with_stem(f"{file.stem}_{len(models)}")
            missing, unexpected = model.load_state_dict(load_file(folder / file), strict=False)
            assert not unexpected and (kept.isdisjoint(missing) if not models else not missing)

    trainer.accelerator.register_save_state_pre_hook(drop_frozen)
    trainer.accelerator.register_load_state_pre_hook(load_trained)
    distinct = {id(p): p for p in frozen.values()}.values()
    total = float(sum(full_tensor(p).cpu().double().abs().sum() for p in distinct))
    return f"{total:.6e}"  # rounded: devices sum in different orders


def write_model(trainer, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the policy, or its adapters, as `save_pretrained` of transformers and peft do.

    Every rank must call it; the main process writes.

    Args:
        trainer: GRPOTrainer.
        folder: created if missing.
        dtype: of the weights, and a tied head is then written too; None: as they are. A model
            that transformers has distributed is written as it is.
    """
    distributed, main = trainer.ranks.distributed, trainer.accelerator.is_main_process
    weights = None
    if not distributed:
        weights = trainer.accelerator.get_state_dict(trainer.model)  # gathers sharded weights
        weights = {k: v for k, v in weights.items() if "value_head" not in k.split(".")}
    if dtype is not None and weights is not None:  # copies: what shares memory would be left out
        weights = {
            name: value.to(dtype if value.is_floating_point() else value.dtype, copy=True)
            for name, value in weights.items()
        }
    if main or distributed:  # of a distributed model, transformers gathers the weights
        with absolute_base(trainer.unwrapped), silent_progress():
            trainer.unwrapped.save_pretrained(folder, state_dict=weights, is_main_process=main)


@contextlib.contextmanager
def silent_progress() -> Iterator[None]:
    """Shows no bar of transformers beside that of the run."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def save_pretrained(trainer) -> Path:
    """Writes `model/` and, if they are trained, `critic/` and `reward_model/`.

    The model generates as it did in training: with the end tokens that ended completions, and the
    chat template. Every rank must call it; see `write_folder`.

    Returns:
        The folder of the model.
    """
    accelerator, main = trainer.accelerator, trainer.accelerator.is_main_process

    def write(folder):
        with saved_generation(trainer) as generation:
            write_model(trainer, folder)
            if main and generation is not None:  # which peft leaves out
                generation.save_pretrained(folder)
        if main:
            trainer.tokenizer.save_pretrained(folder)

    folder = Path(trainer.config.output_dir)
    write_folder(accelerator, folder / "model", write)
    if trainer.critic is not None:
        critic = trainer.critic.unwrapped
        write_folder(
            accelerator, folder / "critic", lambda path: critic.save_pretrained(path) if main else 0
        )
    training = trainer.reward_training
    if training is not None:
        write_folder(
            accelerator,
            folder / "reward_model",
            training.save_pretrained if main else lambda path: None,
        )
    return folder / "model"


def write_folder(accelerator: Accelerator, final: Path, write: Callable[[Path], Any]) -> None:
    """Writes a folder, replacing an older one only when complete.

    A process killed between the two renames leaves the old folder as `NAME.old.partial` and the new
    one as `NAME.partial`. Every rank must call it.

    Args:
        accelerator: of the run.
        final: the folder.
        write: called with another path on every rank; writes what the folder has.

    Raises:
        TrainingError: the folder could not be written; the unfinished one is deleted.
    """
    main, partial = accelerator.is_main_process, final.with_name(f"{final.name}{PARTIAL}")

    def write_and_rename():
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        write(partial)
        if main:
            sync_folder(partial)
            replace_folder(partial, final)

    write_together(accelerator, partial, write_and_rename, f"{final} could not be written")


@contextlib.contextmanager
def saved_generation(trainer) -> Iterator[GenerationConfig | None]:
    """Gives the model, for a while, the generation config that is to be saved, and returns it.

    That is its own, with every end token of training and a padding token. Many models come with
    sampling settings but do_sample False, which transformers refuses to save: they get True.
    """
    model = base_model(trainer.unwrapped)
    own = getattr(model, "generation_config", None)
    if own is None:
        yield None
        return
    config = copy.deepcopy(own)
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if missing := [i for i in trainer.sampler.eos_ids if i not in ids]:
        config.eos_token_id = [i for i in ids if i is not None] + missing
        if len(config.eos_token_id) == 1:
            (config.eos_token_id,) = config.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = trainer.sampler.pad_id
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
    model.generation_config = config
    try:
        yield config
    finally:
        model.generation_config = own
