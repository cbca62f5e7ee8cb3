"""One optimizer step has the gradient of the full batch, for any micro-batches and ranks."""

import socket

import pytest
import torch
from ranks import IMPORTED
from trainer_ranks import STEP, close, gradients_of, run_rank
from trainer_runs import trainer_of

from grpo_fused import LOSSES, GRPOTrainerConfig, grpo_loss
from grpo_fused.trainer.collect import collect


def expected_gradients(trainer, experience):
    """Gradients of the full batch at once, from logits, with the default divisors."""
    model, batch, config = trainer.unwrapped, experience.batch, trainer.config
    model.zero_grad()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    output = grpo_loss(
        logits[:, -batch.completion_ids.shape[1] - 1 :],
        batch.completion_ids,
        batch.completion_mask,
        batch.advantages,
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        loss_type=config.loss_type,
        beta=config.beta,
        entropy_coef=config.entropy_coef,
        temperature=config.temperature,
        max_completion_length=config.max_completion_length,
    )
    output.loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, output


@pytest.mark.parametrize("loss_type", LOSSES)
def test_micro_batches_have_the_gradient_of_the_full_batch(tmp_path, loss_type):
    gradients, experience, _, trainer = gradients_of(tmp_path, loss_type, micro_batch_size=16)
    assert 0 < experience.batch.completion_mask.any(1).sum() < 16, "some rows are masked"
    truth, output = expected_gradients(trainer, experience)
    close(gradients, truth, 1e-6)
    if LOSSES[loss_type].objective.couples == "batch":
        return  # its tokens are selected in a micro-batch
    uneven, _, metrics, _ = gradients_of(tmp_path, loss_type, micro_batch_size=5)
    close(uneven, truth, 1e-6)
    for name in ("kl", "entropy", "clip_ratio/region_mean", "ratio/max"):
        assert metrics[name] == pytest.approx(float(output.metrics[name]), abs=1e-5), name
    assert metrics["loss"] == pytest.approx(output.loss.item(), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"gradient_checkpointing": True}])
def test_logits_instead_of_hidden_states_give_the_same(tmp_path, options):
    hidden = gradients_of(tmp_path, "grpo", **options)[0]
    close(gradients_of(tmp_path, "grpo", loss_input="logits", **options)[0], hidden, 1e-6)


def test_old_logps_are_the_bits_of_the_first_update(tmp_path):
    """The ratio is exactly 1 for micro-batches that are trimmed to different lengths."""
    trainer, records = trainer_of(
        tmp_path, max_steps=8, minibatches=2, num_iterations=2, micro_batch_size=3
    )
    trainer.train()
    for step, metrics in records.items():
        if step % 4 == 1:
            assert metrics["ratio/max"] == metrics["ratio/mean"] == 1.0
    assert any(metrics["ratio/max"] > 1 for metrics in records.values())


def test_every_pass_trains_on_every_sequence_once(tmp_path):
    """The advantages are set to the indices of the sequences, to recognise them in the loss."""
    trainer, _ = trainer_of(
        tmp_path, max_steps=8, minibatches=4, num_iterations=2, micro_batch_size=3
    )
    seen, loss = [], trainer.policy.loss

    def recorded(model, batch, num_items, num_sequences):
        assert num_sequences == 4 and num_items == batch.completion_mask.shape[1] * 4
        seen.append(batch.advantages.tolist())
        return loss(model, batch, num_items, num_sequences)

    trainer.policy.loss = recorded
    trainer.experience = collect(trainer)
    trainer.experience.batch.advantages = torch.arange(16.0)
    trainer.experience.batch.completion_mask[:] = True
    trainer.experience.num_items = [8.0] * 4
    trainer.run()
    assert [len(part) for part in seen] == [3, 1] * 8
    assert sum(seen, []) == list(range(16)) * 2


def test_a_step_without_old_logps_is_the_one_with_them(tmp_path, monkeypatch):
    """With one step per rollout, skipping the old log-probabilities changes nothing."""
    weights = []
    for is_off_policy in (False, True):
        monkeypatch.setattr(GRPOTrainerConfig, "is_off_policy", is_off_policy)
        trainer, _ = trainer_of(tmp_path / str(is_off_policy), max_steps=2)
        trainer.train()
        weights.append(trainer.unwrapped.lm_head.weight.detach().clone())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """One loss for each normaliser and level: nothing else of a loss depends on ranks."""
    rows = reversed(LOSSES.items())
    representatives = {(row.normalizer, row.level): name for name, row in rows}
    expected = {}
    for loss_type in representatives.values():
        gradients, _, metrics, _ = gradients_of(tmp_path / "one", loss_type)
        expected[loss_type] = {"gradients": gradients, "metrics": metrics}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(
        run_rank, (str(tmp_path), port, expected), nprocs=2, start_method="forkserver"
    )


def test_the_gradient_norm_is_logged_without_clipping(tmp_path):
    assert STEP["max_grad_norm"] == 0
    gradients, _, metrics, _ = gradients_of(tmp_path, "dapo")
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
