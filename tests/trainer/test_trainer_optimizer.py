"""Weights in half precision are trained by float32 masters, also across a resume."""

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from trainer_runs import trainer_of, weights_of

from grpo_fused import GRPOTrainerConfig
from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.optimizer import MasterAdamW, make_optimizer

SETTINGS = {"learning_rate": 1e-6, "weight_decay": 0.1, "adam_betas": [0.9, 0.99]}


def half_model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return make_model(make_tokenizer()).to(dtype)


def train(model, steps, first=0, optimizer=None):
    """Takes AdamW steps with the same gradients for every dtype of the model."""
    optimizer = optimizer or make_optimizer(model, GRPOTrainerConfig(**SETTINGS))
    for step in range(first, first + steps):
        draw = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=draw).bfloat16()
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_the_weights_of_a_float32_run(dtype):
    half = half_model(dtype)
    single = copy.deepcopy(half).float()
    optimizer = train(half, 20)
    assert type(train(single, 20)) is torch.optim.AdamW
    for mine, exact in zip(half.parameters(), single.parameters(), strict=True):
        assert torch.equal(optimizer.state[mine]["master"], exact)
        assert torch.equal(mine, exact.to(dtype))


def test_every_weight_moves_at_a_small_learning_rate(tmp_path):
    model = half_model()
    before = [p.detach().float() for p in model.parameters()]
    trainer, _ = trainer_of(tmp_path, model=model, learning_rate=1e-6)
    trainer.train()
    masters = [trainer.optimizer.state[p]["master"] for p in trainer.unwrapped.parameters()]
    moved = [(a != b).float().mean() for a, b in zip(before, masters, strict=True)]
    assert len(moved) == len(before) and min(moved) > 0.5  # unused rows of embeddings stay


def test_weights_that_cannot_move_are_counted_in_a_warning(tmp_path, recwarn):
    off = {"master_weights": False}
    make_optimizer(half_model(), GRPOTrainerConfig(**off, learning_rate=0.5))
    make_optimizer(half_model(torch.float32), GRPOTrainerConfig(**off))
    assert not recwarn  # these weights can move
    with pytest.warns(UserWarning, match=r"9\d% of the weights .* of learning_rate = 1e-06"):
        trainer, _ = trainer_of(tmp_path, model=half_model(), learning_rate=1e-6, **off)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    kept = [(a == b).sum() for a, b in zip(before, trainer.model.parameters(), strict=True)]
    assert sum(kept) > 0.9 * sum(p.numel() for p in before)  # as it says


def test_a_saved_optimizer_keeps_every_bit():
    model = half_model()
    whole = train(model, 2)
    for name in ("torch", "torch.distributed.checkpoint"):
        again = copy.deepcopy(model)
        optimizer = make_optimizer(again, GRPOTrainerConfig(**SETTINGS))
        if name == "torch":
            optimizer.load_state_dict(copy.deepcopy(whole.state_dict()))
        else:
            saved = copy.deepcopy(get_optimizer_state_dict(model, whole))
            set_optimizer_state_dict(again, optimizer, saved)
        expected = copy.deepcopy(model)
        goes_on = make_optimizer(expected, GRPOTrainerConfig(**SETTINGS))
        goes_on.state.update(
            (mine, copy.deepcopy(whole.state[theirs]))
            for mine, theirs in zip(expected.parameters(), model.parameters(), strict=True)
        )
        train(again, 3, first=2, optimizer=optimizer)
        train(expected, 3, first=2, optimizer=goes_on)
        for mine, wanted in zip(again.parameters(), expected.parameters(), strict=True):
            assert torch.equal(optimizer.state[mine]["master"], goes_on.state[wanted]["master"])


def test_a_resumed_run_of_bfloat16_weights_is_bit_identical(tmp_path):
    options = {"learning_rate": 1e-5, "beta": 0.1, "num_iterations": 2, "save_steps": 1}
    options |= {"save_total_limit": None}
    whole, expected = trainer_of(tmp_path / "whole", model=half_model(), **options)
    whole.train()
    assert isinstance(whole.optimizer.optimizer, MasterAdamW)
    for step in (1, 2):
        path = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed, records = trainer_of(
            tmp_path / f"{step}", model=half_model(), resume=path, **options
        )
        resumed.train()
        assert list(records.values()) == [expected[later] for later in records]
        for name, weight in weights_of(resumed).items():
            assert torch.equal(weight, weights_of(whole)[name]), (step, name)
        masters = [state["master"] for state in resumed.optimizer.state.values()]
        wanted = [state["master"] for state in whole.optimizer.state.values()]
        assert all(map(torch.equal, masters, wanted))
