"""What a run is made of, written and read: nothing that its next step depends on is left out."""

import dataclasses
import json
import random
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import SAFE_WEIGHTS_NAME
from safetensors.torch import load_file

from grpo_fused.trainer.checkpoint import (
    PARTIAL,
    any_rank,
    check_same_run,
    put_in_place,
    save_checkpoint,
    sync_all,
    write_json,
)
from grpo_fused.trainer.errors import TrainingError
from grpo_fused.trainer.experience import Experience
from grpo_fused.trainer.policy import is_adapted, whole

RUN = "trainer.json"


def save(trainer):
    """Writes a checkpoint of a trainer, on all ranks; see `save_checkpoint`."""

    def write(folder):
        # Model, optimizer, loss scale; random states too, which it reads only if it can.
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
            write_json(folder / RUN, describe(trainer))

    config = trainer.config
    save_checkpoint(
        trainer.accelerator, config.output_dir, trainer.step, write, config.save_total_limit
    )


def load(trainer, folder):
    """Puts a trainer where it was when it saved.

    Raises:
        ValueError: a checkpoint of a run with other settings, rows or ranks.
    """
    folder = Path(folder)
    saved = json.loads((folder / RUN).read_text())
    now = describe(trainer)
    names = ("ranks", "rows", "content of rows", "frozen weights", "adapters")
    check_same_run(saved, trainer.config, {name: now[name] for name in names})
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


def random_states(device):
    """What sampling on a rank, and rewards in Python, draw from."""
    kind, keys, *rest = np.random.get_state()
    states = {"torch": torch.get_rng_state(), "python": random.getstate()}
    states["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), *rest)
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states, device):
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def describe(trainer):
    return {
        "step": trainer.step,
        "rollouts": trainer.rollouts,
        "ranks": trainer.accelerator.num_processes,
        "rows": len(trainer.data),
        "content of rows": trainer.checksum,
        "frozen weights": trainer.frozen,
        "adapters": adapters_of(trainer.unwrapped),
        "config": dataclasses.asdict(trainer.config),
    }


def adapters_of(model):
    """Settings of a peft model's adapters as JSON has them, by name; None of another model."""
    if not is_adapted(model):
        return None
    settings = {name: config.to_dict() for name, config in model.peft_config.items()}
    text = json.dumps(settings, default=lambda x: sorted(x) if isinstance(x, set) else str(x))
    return json.loads(text)


def checksum(rows, most=100):
    """Of some rows, evenly spread: other data of the same length is other data."""
    step = max(1, len(rows) // most)
    return zlib.crc32(repr([_plain(rows[i]) for i in range(0, len(rows), step)]).encode())


def _plain(value):
    """What is the same in every process: no address, no order of a set."""
    if isinstance(value, dict):
        return sorted(repr((_plain(key), _plain(inner))) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_plain(inner)) for inner in value)
    known = value is None or isinstance(value, (str, bytes, int, float))
    return value if known else type(value).__name__


def leave_out_frozen(trainer):
    """Checkpoints of adapters are as small as these: what is frozen is where it came from.

    Returns:
        Their sum, by which a checkpoint knows them, as a str; None if nothing is frozen.
    """
    # By all of their names: a tied head is in the state too.
    parameters = trainer.model.named_parameters(remove_duplicate=False)
    frozen = {name: p for name, p in parameters if not p.requires_grad}
    if not frozen:
        return None

    def leave_out(models, states, folder):
        for state in states:  # none of sharded models, which Accelerate saves itself
            for name in frozen.keys() & state.keys():
                del state[name]

    def load_rest(models, folder):
        while models:
            state = load_file(Path(folder) / SAFE_WEIGHTS_NAME)
            missing, unexpected = models.pop().load_state_dict(state, strict=False)
            assert frozen.keys() >= set(missing) and not unexpected

    trainer.accelerator.register_save_state_pre_hook(leave_out)
    trainer.accelerator.register_load_state_pre_hook(load_rest)
    distinct = {id(p): p for p in frozen.values()}.values()
    total = float(sum(whole(p).cpu().double().abs().sum() for p in distinct))
    return f"{total:.6e}"  # the order of a sum is its device's


def rank_file(trainer):
    """Accelerate keeps state of one's own on rank 0 alone: here every rank writes its own."""
    return f"rank_{trainer.accelerator.process_index}.pt"


def reference_file(trainer):
    """A copy is the same on all ranks; of adapters, which may be sharded, each has its share."""
    if trainer.reference.model is not None:
        return "reference.pt"
    return f"reference_{trainer.accelerator.process_index}.pt"


def save_pretrained(trainer):
    """Writes `model/`, which `from_pretrained` loads; an older one stays until it is whole.

    Between two renames a kill leaves the older as `model.old.partial`, the new as `model.partial`.

    Raises:
        TrainingError: it could not be written; what there was of it is deleted.
    """
    accelerator, error = trainer.accelerator, None
    weights = accelerator.get_state_dict(trainer.model)  # of sharded models too, from all ranks
    final = Path(trainer.config.output_dir) / "model"
    if accelerator.is_main_process:
        partial = final.with_name(f"model{PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            trainer.unwrapped.save_pretrained(partial, state_dict=weights)
            trainer.tokenizer.save_pretrained(partial)
            sync_all(partial)
            put_in_place(partial, final)
        except Exception as raised:  # of any kind: safetensors has its own
            error = raised
            shutil.rmtree(partial, ignore_errors=True)
    if any_rank(accelerator, error is not None):
        raise TrainingError(f"{final} could not be written ({error or 'on rank 0'})") from error
