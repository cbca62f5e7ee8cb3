"""Load the adapters of docs/integrations; stand-ins for frameworks; the formula in torch."""

import enum
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from batches import relative_error
from pages import PAGES, blocks
from tiny_models import V

BLOCKS = [(b.value, b.code) for path in PAGES for b in blocks(path) if b.mark == "runs"]
LOW, HIGH, BETA = 0.2, 0.28, 0.1


def load(label, **namespace):
    """Run the blocks of a section in order and return the names that they define."""
    blocks = [code for name, code in BLOCKS if name == label]
    assert blocks, label
    for code in blocks:
        exec(code, namespace)
    return SimpleNamespace(**namespace)


def make_fake(monkeypatch, name, **attributes):
    """Make a module of a framework that is not installed importable until the test ends."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        path = ".".join(parts[:n])
        if path not in sys.modules:
            module = ModuleType(path)
            module.__path__, module.__spec__ = [], ModuleSpec(path, None)
            monkeypatch.setitem(sys.modules, path, module)
            if n > 1:
                setattr(sys.modules[".".join(parts[: n - 1])], parts[n - 1], module)
    vars(sys.modules[name]).update(attributes)
    return sys.modules[name]


def log_softmax_of(logits, ids):
    return torch.log_softmax(logits.double(), -1).gather(-1, ids[..., None])[..., 0]


def clipped(logps, old, advantages, low=LOW, high=HIGH, cap=None):
    """Compute the clipped loss per token, with an optional dual clip."""
    ratio = torch.exp(logps - old.double())
    advantages = advantages.double()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if cap is not None:
        loss = torch.where(advantages < 0, torch.min(loss, -cap * advantages), loss)
    return loss


def k3(logps, ref):
    difference = ref.double() - logps
    return torch.exp(difference) - difference - 1


def make_tokens(B=5, T=7, seed=0):
    """Make logps, old_logps, ref_logps, advantages (B, T) and a mask, one token active in row 3."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(4, B, T, generator=generator)
    logps = -noise[0].abs() - 0.1
    mask = torch.arange(T) < torch.tensor([7, 4, 6, 1, 5])[:B, None]
    return logps, logps + 0.6 * noise[1], logps + 0.3 * noise[2], noise[3], mask


def assert_same(got, wanted, leaf, tolerance=2e-6):
    """Compare losses and their gradients with respect to a leaf."""
    (gradient,) = torch.autograd.grad(got, leaf)
    (expected,) = torch.autograd.grad(wanted, leaf)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    assert relative_error(gradient, expected) < tolerance


def slime_batch(padding):
    """Pack three samples into one row; lists hold one tensor per sample, as in slime."""
    generator = torch.Generator().manual_seed(0)
    totals, responses = [7, 5, 9], [4, 1, 6]

    def of_responses(scale=1.0):
        return [scale * torch.randn(n, generator=generator) for n in responses]

    tokens = [torch.randint(0, V, (n,), generator=generator) for n in totals]
    logits = 2 * torch.randn(1, sum(totals) + padding, V, generator=generator)
    starts = [sum(totals[:i]) for i in range(3)]
    rows = [
        logits[0, s + total - n - 1 : s + total - 1]
        for s, total, n in zip(starts, totals, responses, strict=True)
    ]
    own = [
        log_softmax_of(x / 0.7, ids[-n:]).float()
        for x, ids, n in zip(rows, tokens, responses, strict=True)
    ]
    masks = [torch.ones(n, dtype=torch.int) for n in responses]
    masks[2][3] = 0
    return logits, {
        "unconcat_tokens": tokens,
        "total_lengths": totals,
        "response_lengths": responses,
        "loss_masks": masks,
        "advantages": of_responses(),
        "log_probs": [a + b for a, b in zip(own, of_responses(0.5), strict=True)],
        "ref_log_probs": [a + b for a, b in zip(own, of_responses(0.3), strict=True)],
        "rollout_log_probs": [a + b for a, b in zip(own, of_responses(0.4), strict=True)],
    }


SLIME = {
    "tensor_model_parallel_size": 1,
    "context_parallel_size": 1,
    "advantage_estimator": "grpo",
    "eps_clip": LOW,
    "eps_clip_high": HIGH,
    "eps_clip_c": 1.5,
    "rollout_temperature": 0.7,
    "rollout_top_p": 1.0,
    "use_rollout_logprobs": False,
    "use_opsm": False,
    "use_tis": False,
    "tis_clip_low": 0.0,
    "tis_clip": 1.2,
    "custom_tis_function_path": None,
    "use_kl_loss": True,
    "kl_loss_type": "k3",
    "use_unbiased_kl": False,
    "kl_loss_coef": BETA,
    "entropy_coef": 0.02,
}


def sum_of_sample_mean(data):
    """slime's reduction of packed values, for a batch of it."""

    def reduce(values):
        parts = values.split(data["response_lengths"])
        masks = data["loss_masks"]
        return sum((p * m).sum() / m.sum() for p, m in zip(parts, masks, strict=True))

    return reduce


# The defaults of ClippedPGLossConfig but for the clips and the coefficient of the KL.
NEMO_RL = {
    "disable_ppo_ratio": False,
    "token_level_loss": True,
    "sequence_level_importance_ratios": False,
    "ratio_clip_min": LOW,
    "ratio_clip_max": HIGH,
    "ratio_clip_c": None,
    "reference_policy_kl_penalty": BETA,
    "reference_policy_kl_type": "k3",
    "kl_input_clamp_value": 20.0,
    "kl_output_clamp_value": 10.0,
    "use_kl_in_reward": False,
    "use_importance_sampling_correction": False,
    "truncated_importance_sampling_type": None,
    "truncated_importance_sampling_ratio": None,
    "truncated_importance_sampling_ratio_min": None,
    "use_on_policy_kl_approximation": False,
    "force_on_policy_ratio": False,
    "use_cispo": False,
    "positive_example_nll_weight": 0.0,
}


def nemo_batch():
    """(logits, data) of NeMo-RL."""
    _, old, ref, advantages, mask = make_tokens(T=7)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, mask.shape, generator=generator)
    logits = 2 * torch.randn(*mask.shape, V, generator=generator)
    own = log_softmax_of(logits[:, :-1], ids[:, 1:])
    shifts = (0.5 * old[:, 1:], 0.3 * ref[:, 1:])
    old[:, 1:], ref[:, 1:] = (own + shift for shift in shifts)
    sampled = old + 0.2 * torch.randn(old.shape, generator=generator)
    return logits, {
        "generation_logprobs": sampled,
        "input_ids": ids,
        "token_mask": mask.long(),
        "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]),
        "advantages": advantages,
        "prev_logprobs": old,
        "reference_policy_logprobs": ref,
    }


def fake_nemo_rl(monkeypatch):
    """The enums of its interfaces: (LossInputType, LossType)."""
    inputs = enum.Enum("LossInputType", {"LOGIT": "logit", "LOGPROB": "logprob"})
    types = enum.Enum("LossType", {"TOKEN_LEVEL": "token", "SEQUENCE_LEVEL": "sequence"})
    interfaces = "nemo_rl.algorithms.loss.interfaces"
    normalizers = enum.Enum("MetricNormalizer", {"TOKENS": "tokens", "NONE": "none"})
    names = {"LossInputType": inputs, "LossType": types, "MetricNormalizer": normalizers}
    make_fake(monkeypatch, interfaces, **names)
    return inputs, types


def fake_megatron(monkeypatch, group):
    """Megatron, whose tensor-parallel ranks are a group."""
    state = {"get_tensor_model_parallel_group": lambda: group}
    state = make_fake(monkeypatch, "megatron.core.parallel_state", **state)
    make_fake(monkeypatch, "megatron.core", mpu=state)
