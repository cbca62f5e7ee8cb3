"""Run verl's own tests with verl's functions, and with ours in their place.

    python tests/integrations/verl_own_tests.py CHECKOUT [pytest arguments]

CHECKOUT is a clone of verl, of which only the tests are used: the functions are those of the verl
that is installed. Replaced are the policy losses, what `patch_verl` replaces, and by the functions
below averages, KL, advantages, importance weights and the value loss. verl's test of its fused head
wants a GPU: it runs on a CPU with a 64th of its tokens and of its vocabulary. The exit code is 1 if
a test that passes with verl's functions does not with ours.
"""

import argparse
import collections
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from verl.trainer.ppo import core_algos, rollout_corr_helper

import grpo_fused
from grpo_fused.integrations import verl, verl_kernels

TESTS = (
    "trainer/ppo/test_core_algos_on_cpu.py",
    "trainer/ppo/test_dynamic_policy_losses_on_cpu.py",
    "trainer/ppo/test_loss_aggregation_on_cpu.py",
    "trainer/ppo/test_reinforce_pp_multiturn_on_cpu.py",
    "trainer/ppo/test_rollout_corr.py",
    "trainer/ppo/test_rollout_corr_integration.py",
    "trainer/ppo/test_value_loss_normalization_on_cpu.py",
    "trainer/test_multi_trajectories_advantage_on_cpu.py",
    "utils/test_linear_cross_entropy.py",
    "workers/test_distillation_topk_symmetry_on_cpu.py",
)
HEAD = "utils/test_linear_cross_entropy.py"
KL = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
weights_of_verl = rollout_corr_helper.compute_rollout_correction_weights


def agg_loss(loss_mat, loss_mask, loss_agg_mode, **divisors):
    rule, factor, divisors = verl.aggregation(loss_agg_mode, loss_mask, **divisors)
    weights = grpo_fused.token_weights(loss_mask, rule, **divisors)
    return (torch.where(weights != 0, loss_mat, 0.0) * weights).sum() * factor


def kl_penalty(logprob, ref_logprob, kl_penalty):
    base = kl_penalty.removesuffix("+")
    name = KL.get(base, base)
    bounds = {"max_difference": 20.0, "max_kl": 10.0} if name == "k3" else {}
    name += "+" if kl_penalty.endswith("+") and name != "k2" else ""
    return grpo_fused.kl_penalty(logprob, ref_logprob, kl_estimator=name, **bounds)


def compute_value_loss(
    vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode="token-mean", **divisors
):
    rule, factor, divisors = verl.aggregation(loss_agg_mode, response_mask, **divisors)
    options = {"old_values": values, "cliprange": cliprange_value, "normalizer": rule}
    out = grpo_fused.value_loss(vpreds, returns, response_mask, **options, **divisors)
    return out.loss * factor, out.metrics["value/clip_ratio"]


def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam):
    numbers = {"gamma": float(gamma), "lam": float(lam)}
    arguments = (token_level_rewards, values, response_mask)
    advantages, returns = grpo_fused.gae_advantages(*arguments, **numbers)
    return grpo_fused.whiten(advantages, response_mask), returns


def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards, response_mask, config=None, **kwargs
):
    zeros = torch.zeros_like(token_level_rewards)
    numbers = {"gamma": config.gamma, "lam": 1.0}
    _, returns = grpo_fused.gae_advantages(token_level_rewards, zeros, response_mask, **numbers)
    return grpo_fused.whiten(returns, response_mask), returns


def _of_outcomes(token_level_rewards, response_mask, index, **options):
    _, groups = np.unique(index, return_inverse=True)
    scores, ids = token_level_rewards.sum(-1), torch.from_numpy(groups)
    advantages = grpo_fused.outcome_advantages(scores, group_ids=ids, **options)
    advantages = advantages[:, None] * response_mask
    return advantages, advantages


def compute_grpo_outcome_advantage(
    token_level_rewards,
    response_mask,
    index,
    epsilon=1e-6,
    norm_adv_by_std_in_grpo=True,
    config=None,
):
    options = {"scale": "group" if norm_adv_by_std_in_grpo else "none", "epsilon": epsilon}
    return _of_outcomes(token_level_rewards, response_mask, index, **options)


def compute_rloo_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs
):
    options = {"scale": "none", "leave_one_out": True}
    return _of_outcomes(token_level_rewards, response_mask, index, **options)


def compute_rollout_correction_weights(
    log_ratio, response_mask, rollout_is="token", rollout_is_threshold=2.0, **options
):
    """Ours; the metrics, the checks of options and the factor of a normalization are verl's."""
    arguments = (log_ratio, response_mask, rollout_is, rollout_is_threshold)
    _, metrics = weights_of_verl(*arguments, **options)
    cap, floor = rollout_corr_helper._parse_rollout_is_threshold(rollout_is_threshold)
    bounds = {"cap": cap, "floor": floor, "mode": "truncate" if floor is None else "mask"}
    old = torch.zeros_like(log_ratio)
    weights = grpo_fused.rollout_weights(log_ratio, old, response_mask, level=rollout_is, **bounds)
    return weights * response_mask / metrics.get("rollout_is_batch_norm_factor", 1.0), metrics


AVERAGES = (agg_loss, kl_penalty, compute_value_loss)
ADVANTAGES = (
    compute_gae_advantage_return,
    compute_reinforce_plus_plus_outcome_advantage,
    compute_grpo_outcome_advantage,
    compute_rloo_outcome_advantage,
)


def replace():
    """Put ours into verl's modules and registries, before tests import them."""
    verl_kernels.patch_verl()
    rollout_corr_helper.compute_rollout_correction_weights = compute_rollout_correction_weights
    for function in AVERAGES + ADVANTAGES:
        original = getattr(core_algos, function.__name__)
        setattr(core_algos, function.__name__, function)
        for name, registered in core_algos.ADV_ESTIMATOR_REGISTRY.items():
            if registered is original:
                core_algos.ADV_ESTIMATOR_REGISTRY[name] = function
    for name, loss in verl.POLICY_LOSSES.items():
        if name in core_algos.POLICY_LOSS_REGISTRY:
            core_algos.POLICY_LOSS_REGISTRY[name] = loss
            setattr(core_algos, f"compute_policy_loss_{name}", loss)


class OnCpu(TorchFunctionMode):
    """Tensors that ask for the device "cuda" are made on the CPU."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if str(keywords.get("device")) == "cuda":
            keywords = keywords | {"device": "cpu"}
        return function(*arguments, **keywords)


class Event:
    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def elapsed_time(self, other):
        return 0.0


@pytest.mark.parametrize("case", range(5))
def test_linear_cross_entropy_on_a_cpu(case, monkeypatch):
    """The cases of verl's own script, one iteration each."""
    if os.environ["GRPO_FUSED_VERL_WHOSE"] == "verl":
        pytest.skip("verl's kernel needs a GPU")
    path = Path(os.environ["GRPO_FUSED_VERL_TESTS"]) / HEAD
    spec = importlib.util.spec_from_file_location("of_verl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    kind = module.TestLinearCrossEntropy
    whole = kind.generate_hyper

    def generate_hyper(self):
        whole(self)
        self.num_tokens //= 64
        self.vocab_size //= 64

    monkeypatch.setattr(kind, "generate_hyper", generate_hyper)
    torch.manual_seed(case)
    with OnCpu(), torch.compiler.set_stance("force_eager"):
        kind(case).verify_correctness(iterations=2)  # the first one is left out of its means


class Results:
    """What became of each test."""

    def __init__(self):
        self.of = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid] = report.outcome

    def pytest_collectreport(self, report):
        if report.failed:
            self.of[report.nodeid] = "not collected"


def run_inside(whose, checkout, results, arguments):
    """The process that runs the tests, with the functions of verl or with ours."""
    if whose == "ours":
        replace()
    plugin, tests = Results(), Path(checkout).resolve() / "tests"
    paths = [str(tests / name) for name in TESTS] + [__file__]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--rootdir", str(tests)]
    options += ["-c", os.devnull, "--noconftest", "--continue-on-collection-errors"]
    pytest.main([*options, *arguments, *paths], [plugin])
    Path(results).write_text(json.dumps(plugin.of))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--inside", choices=["verl", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    options, arguments = parser.parse_known_args()
    if not (options.checkout / "tests").is_dir():
        parser.error(f"{options.checkout} is no clone of verl: it has no folder tests")
    if options.inside:
        return run_inside(options.inside, options.checkout, options.results, arguments)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for whose in ("verl", "ours"):
            results = Path(folder, f"{whose}.json")
            tests = options.checkout.resolve() / "tests"
            names = {"GRPO_FUSED_VERL_TESTS": str(tests), "GRPO_FUSED_VERL_WHOSE": whose}
            command = [sys.executable, __file__, str(options.checkout), "--inside", whose]
            command += ["--results", str(results), *arguments]
            subprocess.run(command, env=os.environ | names, check=True)
            found[whose] = json.loads(results.read_text())
    for whose, outcomes in found.items():
        counts = collections.Counter(outcomes.values())
        print(f"with {whose}:", ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    lost = [name for name, what in found["verl"].items() if what == "passed"]
    lost = [name for name in lost if found["ours"].get(name) != "passed"]
    lost += [
        name
        for name, what in found["ours"].items()  # of the head's test verl's are skipped
        if what != "passed" and found["verl"].get(name) == "skipped"
    ]
    print(*(f"only with verl's functions: {name}" for name in lost), sep="\n")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
