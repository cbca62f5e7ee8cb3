"""Invalid arguments raise a ValueError that names the argument."""

import subprocess
import sys

import pytest
import torch
from batches import make_batch

import grpo_fused.kernels.launch as launch
import grpo_fused.validation as validation
from grpo_fused import grpo_loss, linear_selective_log_softmax, selective_log_softmax


def arguments(device="cpu", **changes):
    batch = make_batch(B=2, T=3, V=11, mask=torch.ones(2, 3), device=device)
    given = {
        "logits": batch.logits,
        "completion_ids": batch.ids,
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
    }
    return given | {k: v(given) if callable(v) else v for k, v in changes.items()}


BAD = {
    "unknown loss": (dict(loss_type="grop"), "loss_type must be one of grpo, .* got 'grop'"),
    "unknown rule": (dict(normalizer="mean"), "normalizer must be one of"),
    "no objective": (dict(objective=0.2), "objective must be an Objective"),
    "integer logits": (dict(logits=lambda a: a["logits"].long()), "logits must be float32"),
    "float64 logits": (dict(logits=lambda a: a["logits"].double()), "logits must be float32"),
    "2-D logits": (dict(logits=lambda a: a["logits"][0]), "cu_seqlens is required"),
    "T+2 positions": (
        dict(logits=lambda a: torch.cat([a["logits"], a["logits"][:, :1]], 1)),
        "logits must be",
    ),
    "other B": (dict(logits=lambda a: a["logits"][:1]), "logits must be"),
    "no vocabulary": (dict(logits=lambda a: a["logits"][..., :0]), "logits must be"),
    "strided vocabulary": (dict(logits=lambda a: a["logits"][..., ::2]), "contiguous"),
    "float ids": (dict(completion_ids=lambda a: a["completion_ids"].float()), "completion_ids"),
    "bool ids": (dict(completion_ids=lambda a: a["completion_ids"] > 0), "completion_ids"),
    "id too large": (
        dict(completion_ids=lambda a: a["completion_ids"] + 11),
        r"completion_ids must lie in \[0, 11\)",
    ),
    "negative id": (
        dict(completion_ids=lambda a: a["completion_ids"] * 0 - 100),
        r"completion_ids must lie in .* got -100",
    ),
    "mask shape": (dict(completion_mask=torch.ones(2, 4)), "completion_mask must have shape"),
    "mask (B,)": (dict(completion_mask=torch.ones(2)), "completion_mask must have shape"),
    "advantages shape": (dict(advantages=torch.ones(3)), "advantages must have shape"),
    "advantages (B, 1)": (dict(advantages=torch.ones(2, 1)), "advantages must have shape"),
    "integer advantages": (dict(advantages=torch.ones(2).long()), "advantages must be floating"),
    "old_logps shape": (dict(old_logps=torch.ones(2)), "old_logps must have shape"),
    "integer old_logps": (dict(old_logps=torch.ones(2, 3).int()), "old_logps must be floating"),
    "ref_logps shape": (dict(ref_logps=torch.ones(2, 4), beta=1.0), "ref_logps must have shape"),
    "beta alone": (dict(beta=0.1), "ref_logps is needed"),
    "beta tensor alone": (dict(beta=torch.tensor(0.1)), "ref_logps is needed"),
    "beta NaN": (dict(beta=float("nan"), ref_logps=torch.ones(2, 3)), "beta must be a finite"),
    "beta (1,)": (dict(beta=torch.ones(1), ref_logps=torch.ones(2, 3)), "beta must be a number or"),
    "temperature 0": (dict(temperature=0.0), "temperature must be a finite number > 0, got 0.0"),
    "temperature < 0": (dict(temperature=torch.tensor(-1.0)), "temperature must be"),
    "temperature text": (dict(temperature="hot"), "temperature must be a number"),
    "grad_scale 0": (dict(grad_scale=0), "grad_scale must be a finite number != 0"),
    "grad_scale inf": (dict(grad_scale=float("inf")), "grad_scale"),
    "advantages None": (dict(advantages=None), "advantages must be a tensor"),
    "ids in a list": (dict(completion_ids=[[1, 2, 3]] * 2), "completion_ids must be a tensor"),
    "objective 0": (dict(objective=0), "objective must be an Objective"),
    "empty rule": (dict(normalizer=""), "normalizer must be one of"),
    "scale elsewhere": (dict(temperature=torch.ones((), device="meta")), "temperature is on meta"),
    "items (T,)": (dict(num_items_in_batch=torch.ones(3)), "num_items_in_batch must be a number"),
    "items tensor": (dict(num_items_in_batch=torch.tensor(-3)), "num_items_in_batch must be >= 0"),
    "items text": (dict(num_items_in_batch="6"), "num_items_in_batch must be a number"),
    "items": (dict(num_items_in_batch=-3), "num_items_in_batch"),
    "entropy items": (
        dict(num_entropy_items_in_batch=-3),
        "num_entropy_items_in_batch must be >= 0",
    ),
    "sequences": (dict(num_sequences_in_batch=0, loss_type="grpo"), "num_sequences_in_batch"),
    "length": (dict(max_completion_length=0, loss_type="dr_grpo"), "max_completion_length"),
    "implementation": (dict(implementation="cuda"), "implementation must be one of"),
    "infinite items": (dict(num_items_in_batch=float("inf")), "num_items_in_batch must be >= 0"),
    "infinite length": (
        dict(max_completion_length=float("inf"), loss_type="dr_grpo"),
        "max_completion_length must be > 0 and finite",
    ),
    "packed without cu_seqlens": (
        dict(logits=lambda a: a["logits"][0], completion_ids=lambda a: a["completion_ids"][0]),
        r"cu_seqlens is required with packed logits \(4, 11\), got None",
    ),
    "0-d ids": (dict(completion_ids=torch.tensor(1)), r"completion_ids must be \(B, T\)"),
    "level": (dict(importance_sampling_level="group"), "importance_sampling_level must be one of"),
    "vespo at sequence level": (
        dict(loss_type="vespo", importance_sampling_level="sequence"),
        "importance_sampling_level must be token for Vespo, got 'sequence'",
    ),
    "gmpo at token level": (
        dict(loss_type="gmpo", importance_sampling_level="token"),
        "importance_sampling_level must be sequence for Gmpo, got 'token'",
    ),
    "gpg at sequence level": (
        dict(loss_type="gpg", importance_sampling_level="sequence_token"),
        "must be token for PolicyGradient, got 'sequence_token'",
    ),
    "estimator": (dict(kl_estimator="k4"), r"kl_estimator must be one of k1, k2.* got 'k4'"),
    "reduction": (dict(reduction="mean"), "reduction must be one of sum, none"),
    "KL rule": (dict(kl_normalizer="mean"), "kl_normalizer must be one of"),
    "rule of no sum": (
        dict(reduction="none", normalizer="token-mean"),
        "normalizer must be None with reduction=\"none\", got 'token-mean'",
    ),
    "KL rule of no sum": (
        dict(reduction="none", kl_normalizer="token-sum"),
        "kl_normalizer must be None",
    ),
    "ratio shape": (
        dict(importance_sampling_ratio=torch.ones(3)),
        r"importance_sampling_ratio must have shape \(2,\) or \(2, 1\) or \(2, 3\)",
    ),
    "integer ratio": (
        dict(importance_sampling_ratio=torch.ones(2).long()),
        "importance_sampling_ratio must be floating",
    ),
    "sampler shape": (
        dict(sampling_logps=torch.ones(2)),
        r"sampling_logps must have shape \(2, 3\)",
    ),
    "integer sampler": (
        dict(sampling_logps=torch.ones(2, 3).long()),
        "sampling_logps must be floating",
    ),
    "policy mask shape": (dict(policy_mask=torch.ones(1, 3)), "policy_mask must have shape"),
    "temperature (T,)": (dict(temperature=torch.ones(3)), "temperature must have shape"),
    "temperature of a token": (
        dict(temperature=torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])),
        "temperature must be finite and > 0 on active tokens, got 0.0",
    ),
    "softcap 0": (dict(logit_softcap=0), "logit_softcap must be a finite number > 0"),
    "scale < 0": (dict(logit_scale=-1.0), "logit_scale must be a finite number > 0"),
    "coefficient": (dict(entropy_coef=float("nan")), "entropy_coef must be a finite number"),
    "coefficient text": (dict(entropy_coef=None), "entropy_coef must be a number or"),
}

PACKED = {
    "a list": ([0, 2, 6], "cu_seqlens must be a tensor"),
    "no sequences": (torch.tensor([0]), "cu_seqlens must end with N = 6, got shape"),
    "floats": (torch.tensor([0.0, 2.0, 6.0]), "cu_seqlens must be int32 or int64"),
    "2-D": (torch.zeros(2, 2).long(), r"cu_seqlens must have shape \(B \+ 1,\), got \(2, 2\)"),
    "not from 0": (
        torch.tensor([1, 2, 6]),
        r"cu_seqlens must be nondecreasing from 0 to N = 6, got \[1, 2, 6\]",
    ),
    "not to N": (torch.tensor([0, 2, 5]), r"cu_seqlens must be .* to N = 6, got \[0, 2, 5\]"),
    "negative length": (
        torch.tensor([0, 4, 2, 6]),
        r"cu_seqlens must be nondecreasing from 0 to N = 6, got \[0, 4, 2, 6\]",
    ),
    "elsewhere": (
        torch.tensor([0, 2, 6], device="meta"),
        "cu_seqlens must be int32 or int64 on cpu, got torch.int64 on meta",
    ),
}


@pytest.mark.parametrize("case", PACKED)
def test_invalid_cu_seqlens(case):
    cu_seqlens, message = PACKED[case]
    logits, ids = torch.randn(6, 11), torch.zeros(6, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        grpo_loss(logits, ids, None, torch.ones(2), cu_seqlens=cu_seqlens)


def test_invalid_packed_arguments():
    logits, ids, ends = (
        torch.randn(6, 11),
        torch.zeros(6, dtype=torch.long),
        torch.tensor([0, 2, 6]),
    )
    for bad, message in (
        (dict(advantages=torch.ones(3)), r"advantages must have shape \(2,\) or \(6,\)"),
        (dict(completion_ids=ids[None]), r"logits must be \(N, V\) for completion_ids \(N,\)"),
        (dict(logits=logits[None]), r"logits must be \(N, V\) for completion_ids \(N,\)"),
        (dict(old_logps=torch.ones(2, 3)), r"old_logps must have shape \(6,\)"),
        (dict(loss_type="dr_grpo"), "max_completion_length is required with cu_seqlens"),
    ):
        good = dict(
            logits=logits, completion_ids=ids, completion_mask=None, advantages=torch.ones(2)
        )
        with pytest.raises(ValueError, match=message):
            grpo_loss(**(good | bad), cu_seqlens=ends)


@pytest.mark.parametrize("case", BAD)
def test_invalid_arguments(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        grpo_loss(**arguments(**changes))


def test_devices_must_match():
    with pytest.raises(ValueError, match="old_logps is on meta, logits are on cpu"):
        grpo_loss(**arguments(old_logps=torch.ones(2, 3, device="meta")))
    with pytest.raises(ValueError, match="completion_ids is on meta, logits are on cpu"):
        ids = torch.zeros(2, 3, dtype=torch.long, device="meta")
        grpo_loss(**arguments(completion_ids=ids))


def test_invalid_arguments_of_log_probabilities():
    logits, ids = torch.randn(2, 3, 11), torch.zeros(2, 3, dtype=torch.long)
    for bad, message in (
        (dict(ids=ids[:1]), "logits must be"),
        (dict(logits=logits[0], ids=ids[0, :2]), r"logits must be \(N, V\) for ids \(N,\)"),
        (dict(logit_softcap=0.0), "logit_softcap must be a finite number > 0"),
        (dict(temperature=torch.ones(5)), "temperature must have shape"),
        (dict(ids=ids + 11), r"ids must lie in \[0, 11\)"),
        (dict(mask=torch.ones(2)), "mask must have shape"),
        (dict(temperature=-1), "temperature"),
        (dict(implementation="eager"), "implementation"),
    ):
        with pytest.raises(ValueError, match=message):
            selective_log_softmax(**({"logits": logits, "ids": ids} | bad))


def test_a_first_column_requires_a_group():
    """Of logits and of a head: without other ranks there are no other columns."""
    batch = make_batch(V=11)
    with pytest.raises(ValueError, match="vocab_start requires vocab_parallel_group, got None"):
        selective_log_softmax(batch.logits, batch.ids, batch.mask, vocab_start=0)
    weight = torch.randn(5, 11)
    with pytest.raises(ValueError, match="vocab_start requires vocab_parallel_group, got None"):
        linear_selective_log_softmax(batch.logits, weight, batch.ids, batch.mask, vocab_start=0)


def test_invalid_arguments_leave_logits_unchanged():
    """Arguments are checked before inplace=True overwrites anything."""
    for bad in (dict(advantages=torch.ones(5)), dict(beta=0.1), dict(num_items_in_batch=-1)):
        given = arguments(**bad)
        leaf = given.pop("logits").requires_grad_(True)
        logits = leaf * 1
        with pytest.raises(ValueError):
            grpo_loss(logits, **given, inplace=True)
        assert torch.equal(logits[:, :3], leaf[:, :3])  # position T + 1 is NaN


def test_triton_on_a_cpu_requires_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        grpo_loss(**arguments(), implementation="triton")


def test_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr(validation, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="not installed"):
        grpo_loss(**arguments(), implementation="triton")


def test_the_package_runs_without_triton():
    """As on macOS and Windows."""
    code = """
import sys
sys.modules["triton"] = None
import torch, grpo_fused
logits = torch.randn(2, 3, 7, requires_grad=True)
ids = torch.zeros(2, 3, dtype=torch.long)
grpo_fused.grpo_loss(logits, ids, None, torch.ones(2)).loss.backward()
assert torch.isfinite(logits.grad).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_auto_depends_on_the_device():
    """Not on whether Triton is installed."""
    cpu = torch.zeros(1)
    assert validation.choose_implementation("auto", cpu) == "torch"
    if torch.cuda.is_available():
        assert validation.choose_implementation("auto", cpu.cuda()) == "triton"


def test_ids_outside_of_the_vocabulary_without_checks(implementation, device, monkeypatch):
    """On a device they are not checked: they give NaN in their own row and no other."""
    if implementation == "torch" and device == "cuda":
        pytest.skip("tested with the kernels")
    monkeypatch.setattr(validation, "check_ids", lambda *args: None)
    given = arguments(device)
    given["completion_ids"] = given["completion_ids"].clone()
    given["completion_ids"][0, 1] = 2**40
    given["completion_ids"][1, 2] = -1
    logits = given.pop("logits").requires_grad_(True)
    out = grpo_loss(logits, **given, implementation=implementation)
    out.loss.backward()
    unknown = torch.tensor([[False, True, False], [False, False, True]], device=device)
    assert torch.isnan(out.loss)
    assert torch.equal(torch.isnan(out.logps), unknown)
    assert torch.equal(torch.isnan(logits.grad[:, :3]).any(-1), unknown)
    assert torch.equal(torch.isnan(logits.grad[:, :3]).all(-1), unknown)
