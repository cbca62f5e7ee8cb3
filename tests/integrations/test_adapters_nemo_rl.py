"""The adapter of NeMo-RL in docs/integrations/others.md against the formulas in plain torch."""

from types import SimpleNamespace

import pytest
import torch
from adapters import (
    BETA,
    HIGH,
    LOW,
    NEMO_RL,
    assert_same,
    clipped,
    fake_megatron,
    fake_nemo_rl,
    load,
    log_softmax_of,
    nemo_batch,
)

IS = {
    "use_importance_sampling_correction": True,
    "truncated_importance_sampling_ratio": 1.1,
    "truncated_importance_sampling_ratio_min": 0.9,
}
GSPO = {"token_level_loss": False, "sequence_level_importance_ratios": True}
CASES = {
    "defaults": {},
    "dual clip": {"ratio_clip_c": 1.5},
    "without KL": {"reference_policy_kl_penalty": 0.0},
    "KL in the rewards": {"use_kl_in_reward": True},
    "k1": {"reference_policy_kl_type": "k1", "kl_input_clamp_value": 0.3},
    "k2": {"reference_policy_kl_type": "k2", "kl_output_clamp_value": None},
    "clamps": {"kl_input_clamp_value": 0.4, "kl_output_clamp_value": 0.05},
    "KL over the sampler": {"use_on_policy_kl_approximation": True, "kl_output_clamp_value": 0.05},
    "means of sequences": {"token_level_loss": False},
    "gspo": GSPO,
    "cispo": {"use_cispo": True},
    "reinforce": {"disable_ppo_ratio": True},
    "on policy": {"force_on_policy_ratio": True} | IS,
    "untruncated": {"use_importance_sampling_correction": True},
    "tis": IS | {"truncated_importance_sampling_type": "tis"},
    "icepop": IS | {"truncated_importance_sampling_type": "icepop"},
    "seq-mask-tis": IS | {"truncated_importance_sampling_type": "seq-mask-tis"},
    "gspo, tis": GSPO | IS | {"truncated_importance_sampling_type": "tis"},
}


@pytest.fixture(autouse=True)
def nemo_rl(monkeypatch):
    fake_megatron(monkeypatch, None)
    return fake_nemo_rl(monkeypatch)


def mean_of(values, mask, config, seqs, toks):
    """NeMo-RL's average over all tokens of the step, or over sequences."""
    if config.token_level_loss:
        return (values * mask).sum() / toks
    return ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / seqs


def policy_term(logps, old, advantages, mask, config):
    if config.disable_ppo_ratio:
        return -advantages * logps
    if config.use_cispo:
        ratio = torch.exp(logps.detach() - old)
        return -advantages * ratio.clamp(1 - LOW, 1 + HIGH) * logps
    if config.sequence_level_importance_ratios:
        counts = mask.sum(1, keepdim=True).clamp(min=1)
        logps = old + ((logps - old) * mask).sum(1, keepdim=True) / counts
    return clipped(logps, old, advantages, cap=config.ratio_clip_c)


def weights_of(old, sampled, mask, config):
    if not config.use_importance_sampling_correction:
        return torch.ones_like(old)
    difference = (old - sampled) * mask
    if config.sequence_level_importance_ratios:
        difference = difference.sum(1, keepdim=True).expand_as(old)
    weights = difference.exp()
    kind = config.truncated_importance_sampling_type
    if kind is None:
        return weights
    low = config.truncated_importance_sampling_ratio_min
    high = config.truncated_importance_sampling_ratio
    if kind == "tis":
        return weights.clamp(low, high)
    criterion = weights
    if kind == "seq-mask-tis":
        criterion = (difference.sum(1) / mask.sum(1).clamp(min=1)).exp()[:, None]
    return weights * ((criterion >= low) & (criterion <= high))


def kl_term(logps, ref, sampled, config):
    d, bound = ref - logps, config.kl_input_clamp_value
    anchor = sampled if config.use_on_policy_kl_approximation else logps.detach()
    weight = torch.exp(logps - anchor)
    weight = torch.where(d.abs() > bound, weight.detach(), weight)
    d = d.clamp(-bound, bound)
    kl = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - 1 - d}[config.reference_policy_kl_type]
    most = config.kl_output_clamp_value
    return weight * kl if most is None else (weight * kl).clamp(-most, most)


@pytest.mark.parametrize("kind", ["FusedPGLossFn", "PGLossFnFromLogps"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(case, kind, nemo_rl):
    """Call the loss as NeMo-RL's wrapper does: by keywords that depend on input_type."""
    inputs, types = nemo_rl
    config = SimpleNamespace(**NEMO_RL | CASES[case])
    loss_fn = getattr(load("nemo_rl"), kind)(config)
    logits, data = nemo_batch()
    logits.requires_grad_(True)
    logps = log_softmax_of(logits[:, :-1], data["input_ids"][:, 1:])
    given = {"logits": logits}
    if loss_fn.input_type is inputs.LOGPROB:
        ours = log_softmax_of(logits[:, :-1], data["input_ids"][:, 1:])  # a graph of its own
        given = {"next_token_logprobs": ours.float()}
    counts = {"global_valid_seqs": torch.tensor(9.0), "global_valid_toks": torch.tensor(50.0)}
    loss, metrics = loss_fn(data=data, **counts, **given)

    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    names = ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs", "advantages")
    old, sampled, ref, advantages = (data[name][:, 1:].double() for name in names)
    old = logps.detach() if config.force_on_policy_ratio else old
    average = (mask, config, 9, 50)
    terms = weights_of(old, sampled, mask, config)
    terms = terms * policy_term(logps, old, advantages, mask, config)
    wanted, kl = mean_of(terms, *average), mean_of(kl_term(logps, ref, sampled, config), *average)
    if config.reference_policy_kl_penalty and not config.use_kl_in_reward:
        wanted = wanted + BETA * kl
        assert metrics["kl_penalty"] == pytest.approx(kl.item(), rel=1e-5)
    assert_same(loss, wanted, logits)
    assert metrics["loss"] == loss.item() and metrics["num_valid_samples"] == 4
    if case == "defaults":
        ratio = (torch.exp(logps - old) * mask).sum() / 50
        assert metrics["probs_ratio"] == pytest.approx(ratio.item(), rel=1e-5)
    level = types.TOKEN_LEVEL if config.token_level_loss else types.SEQUENCE_LEVEL
    assert loss_fn.loss_type is level


def test_the_bounds_of_the_cases_are_reached():
    """Some tokens, or sequences, are outside of each bound, and others are not."""
    logits, data = nemo_batch()
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None] != 0
    names = ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs")
    old, sampled, ref = (data[name][:, 1:] for name in names)
    own = log_softmax_of(logits[:, :-1], data["input_ids"][:, 1:])
    difference = (ref - own).abs()[mask]
    for bound in (0.3, 0.4):
        assert 2 < (difference > bound).sum() < len(difference) - 2
    ratios = (old - sampled).exp()
    means = ((old - sampled) * mask).sum(1) / mask.sum(1).clamp(min=1)
    for values in (ratios[mask], means.exp()[mask.any(1)]):
        kept = (values >= 0.9) & (values <= 1.1)
        assert kept.any() and not kept.all()


def test_unfiltered_log_probabilities_of_the_kl():
    """With top-k or top-p, NeMo-RL hands the KL other log-probabilities than the ratio's."""
    loss_fn = load("nemo_rl").PGLossFnFromLogps(SimpleNamespace(**NEMO_RL))
    logits, data = nemo_batch()
    logps = log_softmax_of(logits[:, :-1], data["input_ids"][:, 1:]).float()
    unfiltered = (logps - 0.2).requires_grad_()
    counts = {"global_valid_seqs": torch.tensor(9.0), "global_valid_toks": torch.tensor(50.0)}
    data["curr_logprobs_unfiltered"] = unfiltered
    loss, metrics = loss_fn(data=data, **counts, next_token_logprobs=logps)
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    ref = data["reference_policy_logprobs"][:, 1:].double()
    config = SimpleNamespace(**NEMO_RL)
    wanted = mean_of(kl_term(unfiltered.double(), ref, None, config), mask, config, 9, 50)
    assert metrics["kl_penalty"] == pytest.approx(wanted.item(), rel=1e-5)
    assert_same(loss - loss.detach(), BETA * (wanted - wanted.detach()), unfiltered)


def test_an_option_that_it_does_not_have():
    config = SimpleNamespace(**NEMO_RL | {"positive_example_nll_weight": 0.1})
    with pytest.raises(ValueError, match="positive_example_nll_weight must be 0"):
        load("nemo_rl").FusedPGLossFn(config)
