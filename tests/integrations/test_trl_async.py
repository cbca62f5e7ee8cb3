"""What TRL's asynchronous trainer, and its fused head, get of ours."""

from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl", reason="trl is not installed: make test installs it")

from tiny_models import V, gradients, tiny  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402

if not hasattr(trl_utils, "add_fused_lm_head"):
    pytest.skip("TRL before 1.15 has no such head", allow_module_level=True)

# TRL 1.15 imports aiohttp there, which it does not depend on.
async_grpo_trainer = pytest.importorskip(
    "trl.experimental.async_grpo.async_grpo_trainer", exc_type=ImportError
)

from grpo_fused.integrations.trl_async import FusedAsyncGRPOTrainer, fuse_log_probs  # noqa: E402

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
EXPERTS |= {"router_aux_loss_coef": 0.1, "output_router_logits": True}
OUTPUTS = ("log_probs", "entropy")


def batch():
    ids = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = labels[1, 7:] = -100
    return ids, labels


@pytest.mark.parametrize("name, options", [("gemma2", {}), ("phi", {}), ("qwen3_moe", EXPERTS)])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_fields_of_trls_head(name, options, shifted):
    ids, labels = batch()
    given = {"labels": labels}
    if shifted:
        given = {"shift_labels": torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)}
    found = []
    for fuse in (
        lambda model: trl_utils.add_fused_lm_head(model, temperature=0.7, outputs=OUTPUTS),
        lambda model: fuse_log_probs(model, temperature=0.7),
    ):
        model = tiny(name, **options)
        logits = model(ids).logits
        fuse(model)
        assert torch.equal(model(ids).logits, logits)
        output = model(ids, **given, fused_lm_head=True, num_items_in_batch=5)
        (output.loss + 0.1 * output.entropy.sum()).backward()
        found.append((output, gradients(model)))
    (theirs, expected), (ours, gradient) = found
    for field in ("loss", *OUTPUTS, "aux_loss"):
        if field in theirs:
            torch.testing.assert_close(ours[field], theirs[field], rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert ours.keys() == theirs.keys() and ("aux_loss" in ours) == (name == "qwen3_moe")
    assert gradient.keys() == expected.keys()
    for name in gradient:
        torch.testing.assert_close(gradient[name], expected[name], rtol=1e-4, atol=1e-6)


class Stub(SimpleNamespace):
    """The part of the trainer that its loss reads: rollouts and weight transfer need servers."""

    def __init__(self, model):
        accelerator = SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        )
        super().__init__(
            model=model,
            accelerator=accelerator,
            aux_loss_enabled=False,
            epsilon_low=0.2,
            epsilon_high=0.2,
            current_gradient_accumulation_steps=2,
            _metrics={"train": async_grpo_trainer.defaultdict(list)},
            _step_forward_tokens=0.0,
            _step_trained_tokens=0.0,
            _step_seq_len_weighted=0.0,
            _step_samples=0.0,
            _step_forward_s=0.0,
        )


def test_the_loss_of_the_trainer(monkeypatch):
    """On one packed row; its metrics, and the gradient of the model."""
    ids, labels = (x[:1] for x in batch())
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    index = (targets[0] != -100).nonzero().T
    inputs = {
        "attention_mask": torch.ones_like(ids),
        "input_ids": ids,
        "position_ids": torch.arange(9)[None],
        "shift_labels": targets,
        "token_index": index,
        "old_log_probs": torch.linspace(-6.0, -3.0, index.shape[1])[None],
        "advantages": torch.linspace(-1.0, 1.0, index.shape[1])[None],
        "segment_id": torch.zeros_like(index),
        "global_n_tokens": torch.tensor([6.0]),
        "global_n_forward_tokens": torch.tensor([9.0]),
        "mean_seq_len": torch.tensor([9.0]),
        "tree_max_seqlens": torch.tensor([[9, 9]]),
    }
    names = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")
    inputs |= dict.fromkeys(names, torch.zeros(1, 1, dtype=torch.int64))

    def init(self, model):  # of AsyncGRPOTrainer, which starts a server
        self.temperature, self.model = 0.7, model
        trl_utils.add_fused_lm_head(model, temperature=0.7, outputs=OUTPUTS)

    monkeypatch.setattr(async_grpo_trainer.AsyncGRPOTrainer, "__init__", init)
    found = []
    for trainer in (async_grpo_trainer.AsyncGRPOTrainer, FusedAsyncGRPOTrainer):
        model = trainer(tiny()).model
        stub = Stub(model)
        loss = trainer.compute_loss(stub, model, inputs)
        loss.backward()
        found.append((loss, gradients(model), stub._metrics["train"]))
    (theirs, expected, metrics), (ours, gradient, ours_metrics) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert theirs != 0 and ours_metrics.keys() == metrics.keys()
    for name, (value,) in metrics.items():
        assert ours_metrics[name] == [pytest.approx(value, rel=1e-5, abs=1e-6)], name
    for name in gradient:
        torch.testing.assert_close(gradient[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_head_that_cannot_be_fused():
    model = tiny()
    model.lm_head.forward = lambda hidden: hidden
    model.get_output_embeddings = lambda: None
    with pytest.raises(
        ValueError, match="the LM head of model cannot be fused: the model has none"
    ):
        fuse_log_probs(model)
