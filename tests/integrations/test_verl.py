"""Policy losses for verl against those of verl 0.9.1: value, gradient and metrics."""

import inspect
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from batches import relative_error
from verl_peer import actor_config, get_policy_loss_fn, make_verl_batch, run

from grpo_fused import DppoKl, DppoTv, Sapo, Vespo, grpo_loss_from_logps
from grpo_fused.integrations import verl as integration

MODES = integration.AGGREGATIONS
NAMES = ["vanilla", "gspo", "sapo", "cispo", "gpg"]
ADDITIVE = [*NAMES, "geo_mean", "dppo_tv", "dppo_kl", "vespo"]
INFOS = {
    "local": {},
    "global": {
        "dp_size": 2,
        "batch_num_tokens": 37,
        "global_batch_size": 9,
        "loss_scale_factor": 11,
    },
    "partly": {"dp_size": 1, "batch_num_tokens": 37, "global_batch_size": None},
}
BOUNDS = {
    "defaults": {},
    "asymmetric": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 1.4},
    "clip_ratio": {"clip_ratio": 0.3, "clip_ratio_low": None, "clip_ratio_high": None},
    "wide": {"clip_ratio_low": 10.0, "clip_ratio_high": 1.5, "tau_pos": 0.8, "tau_neg": 1.3},
}


def compare(name, batch, config, mode="token-mean", *, value=2e-6, gradient=2e-6):
    """Compare verl in float64, zeros under the mask, with ours in float32, NaN under the mask."""
    wanted = run(name, batch, config, mode)
    got = run(f"grpo_fused_{name}", batch, config, mode, under_mask=math.nan)
    size = wanted.loss.abs() + wanted.gradient.abs().sum()
    assert (got.loss - wanted.loss).abs() < value * size
    # Below e^-80, verl in float64 still has a gradient.
    error = (got.gradient - wanted.gradient).norm()
    assert error < gradient * wanted.gradient.norm() + 1e-30
    for metric, number in wanted.metrics.items():
        assert got.metrics[metric] == pytest.approx(number, rel=3e-6, abs=1e-7), metric
    assert all(isinstance(number, float) for number in got.metrics.values())
    return wanted


def test_verl_imports_plugin_and_patch():
    """A process that only imports verl gets the losses by the entry point group verl.plugins, and
    the patch by an environment variable."""
    code = (
        "import verl.utils.torch_functional as patched\n"
        "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as losses\n"
        "print(*sorted(name for name in losses if name.startswith('grpo_fused_')))\n"
        "print(patched.entropy_from_logits.__module__)"
    )
    patch = {"VERL_USE_EXTERNAL_MODULES": "grpo_fused.integrations.verl_patch"}
    options = {"capture_output": True, "text": True, "cwd": "/", "env": os.environ | patch}
    found = subprocess.run([sys.executable, "-c", code], check=True, **options).stdout
    names = sorted(f"grpo_fused_{name}" for name in integration.RECIPES)
    assert found.split() == [*names, "grpo_fused.integrations.verl_kernels"]


def test_signatures_are_those_of_verl():
    theirs = inspect.signature(get_policy_loss_fn("vanilla")).parameters
    for loss in integration.POLICY_LOSSES.values():
        ours = inspect.signature(loss).parameters
        assert list(ours) == list(theirs)
        assert all(ours[name].default == theirs[name].default for name in theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize("name", NAMES)
def test_aggregations_and_divisors(name, info, mode):
    compare(name, make_verl_batch(), actor_config(INFOS[info]), mode)


@pytest.mark.parametrize("rollout", [False, True], ids=["", "rollout weights"])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("name", NAMES)
def test_bounds_and_rollout_weights(name, bounds, rollout):
    for seed in range(3):
        batch = make_verl_batch(seed, rollout=rollout)
        config = actor_config(INFOS["global"], **BOUNDS[bounds])
        compare(name, batch, config, "seq-mean-token-mean")


def test_batches_reach_every_branch():
    """The batches of the tests above make each metric of verl nonzero."""
    for name, metric in [
        ("vanilla", "actor/pg_clipfrac"),
        ("vanilla", "actor/pg_clipfrac_lower"),
        ("gspo", "actor/pg_clipfrac"),
        ("cispo", "actor/pg_clipfrac"),
    ]:
        found = [run(name, make_verl_batch(seed), actor_config()).metrics for seed in range(3)]
        assert max(metrics[metric] for metrics in found) > 0.02, (name, metric)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [-200.0, -19.0, 9.0, 19.0, 30.0, 200.0])
def test_clamps_of_far_log_ratios(name, shift):
    """Beyond +-20 (sequences: 10), verl clamps the log-ratio; value and gradient agree."""
    batch = make_verl_batch(3)
    old = torch.where(batch.response_mask, batch.old_log_prob - shift, 0.0).float().double()
    # Relative to the loss, which e^20 dominates where the advantage is negative.
    compare(name, batch._replace(old_log_prob=old), actor_config(), value=2e-5, gradient=2e-5)


@pytest.mark.parametrize("rollout", [False, True], ids=["", "rollout weights"])
@pytest.mark.parametrize("per_token", [False, True], ids=["A(B,)", "A(B,T)"])
def test_geo_mean(per_token, rollout):
    """verl ignores the divisors and divides by all rows: equal if the batch is not split."""
    for seed in range(3):
        batch = make_verl_batch(seed, rollout=rollout, per_token=per_token, scale=0.2)
        config = actor_config({"global_batch_size": 8}, clip_ratio_low=0.4, clip_ratio_high=0.4)
        wanted = compare("geo_mean", batch, config, "token-sum")
        metrics = wanted.metrics
        assert min(metrics["actor/pg_clipfrac"], metrics["actor/pg_clipfrac_lower"]) > 0.02


def halves(name, config, batch):
    return sum(run(name, batch.rows(rows), config).loss for rows in (slice(4), slice(4, 8)))


def test_micro_batches_of_geo_mean_add_up():
    """verl's geo_mean ignores the divisors: two halves add up to twice the loss of a batch."""
    batch, config = make_verl_batch(per_token=False), actor_config({"global_batch_size": 8})
    whole = run("geo_mean", batch, config).loss
    assert halves("geo_mean", config, batch) == pytest.approx(2 * whole.item())
    assert halves("grpo_fused_geo_mean", config, batch) == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ADDITIVE)
def test_micro_batches_and_ranks_add_up(name, mode):
    """2 micro-batches on each of 2 ranks, averaged over ranks, give the gradient of the batch."""
    batch = make_verl_batch(1, lengths=(6, 4, 2, 3, 5, 1, 6, 2))
    counts = {"batch_num_tokens": batch.response_mask.sum().item(), "global_batch_size": 8}
    name = f"grpo_fused_{name}"
    whole = run(name, batch, actor_config({"dp_size": 1} | counts), mode)
    config = actor_config({"dp_size": 2} | counts)
    parts = [run(name, batch.rows(slice(b, b + 2)), config, mode) for b in range(0, 8, 2)]
    assert sum(part.loss for part in parts) / 2 == pytest.approx(whole.loss.item(), rel=1e-5)
    gradient = torch.cat([part.gradient for part in parts]) / 2
    assert relative_error(gradient, whole.gradient) < 1e-6


@pytest.mark.parametrize("rollout", [False, True], ids=["", "rollout weights"])
@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dppo(name, mode, info, rollout):
    """Of probabilities: those of `make_verl_batch` may be above 1."""
    batch = make_verl_batch(4, rollout=rollout)
    batch = batch._replace(old_log_prob=batch.old_log_prob.clamp(max=-0.0625))
    bounds = {"clip_ratio_low": 0.02, "clip_ratio_high": 0.04, "clip_ratio_c": 1.25}
    wanted = compare(name, batch, actor_config(INFOS[info], **bounds), mode)
    assert all(wanted.metrics.values())


@pytest.mark.parametrize("rollout", [False, True], ids=["", "rollout weights"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name, options",
    [
        ("dro", {"dro_beta": 0.3}),
        ("kl_cov", {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}),
        ("kl_cov", {"kl_cov_ratio": None, "ppo_kl_coef": None}),
        # A share of all those between the bounds, where verl draws at random.
        ("clip_cov", {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 0.6}),
    ],
)
def test_losses_with_options_of_their_own(name, options, mode, rollout):
    from verl.workers.config import PolicyLossConfig

    batch = make_verl_batch(1, rollout=rollout)
    policy_loss = PolicyLossConfig(loss_mode=name, **options)
    bounds = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3}
    config = actor_config(INFOS["global"], policy_loss=policy_loss, **bounds)
    metrics = compare(name, batch, config, mode).metrics
    assert all(metrics.values())


def test_vespo_is_grpo_loss_from_logps():
    batch = make_verl_batch(2, rollout=True)
    got = run("grpo_fused_vespo", batch, actor_config({"batch_num_tokens": 50}))
    logps = batch.log_prob.float().requires_grad_(True)
    out = grpo_loss_from_logps(
        logps,
        batch.response_mask,
        batch.advantages.float(),
        old_logps=batch.old_log_prob.float(),
        importance_sampling_ratio=batch.rollout_is_weights.float(),
        objective=Vespo(),
        normalizer="token-mean",
        num_items_in_batch=50,
    )
    out.loss.backward()
    assert got.loss == out.loss
    assert torch.equal(got.gradient, logps.grad)


def test_user_objective():
    batch, config = make_verl_batch(), actor_config()
    mine = integration.policy_loss(lambda config: integration.Recipe(Sapo(0.9, 1.2)))
    theirs = run("sapo", batch, actor_config(tau_pos=0.9, tau_neg=1.2))
    values = batch._asdict() | {"loss_agg_mode": "seq-mean-token-mean", "config": config}
    values = {
        k: v.float() if k != "response_mask" and k in batch._fields and v is not None else v
        for k, v in values.items()
    }
    assert mine(**values)[0].item() == pytest.approx(theirs.loss.item(), rel=1e-5)


def test_no_active_token_is_a_differentiable_zero():
    """verl divides 0 by 0: one empty micro-batch makes the step NaN."""
    batch = make_verl_batch()
    batch = batch._replace(response_mask=torch.zeros_like(batch.response_mask))
    for name in NAMES:
        got = run(f"grpo_fused_{name}", batch, actor_config())
        assert got.loss == 0 and (got.gradient == 0).all()
        assert all(number == 0 for number in got.metrics.values())
    assert run("vanilla", batch, actor_config()).loss.isnan()


def test_verl_multiplies_by_the_mask():
    """Its sequence means of NaN times 0 are NaN; `compare` gives ours NaN in every test."""
    batch = make_verl_batch()
    theirs = run("vanilla", batch, actor_config(), "seq-mean-token-mean", under_mask=math.nan)
    assert theirs.loss.isnan()


@pytest.mark.parametrize(
    "match, name, mode, options",
    [
        ("loss_agg_mode must be one of", "vanilla", "token-median", {}),
        ("batch_num_tokens is required", "vanilla", "token-mean", {"dp_size": 2}),
        ("global_batch_size is required", "gspo", "seq-mean-token-sum", {"dp_size": 2}),
        ("clip_ratio_c must be", "vanilla", "token-mean", {"clip_ratio_c": 1.0}),
        ("clip_ratio_c must be", "vanilla", "token-mean", {"clip_ratio_high": 2.5}),
        ("equal for Gmpo", "geo_mean", "token-mean", {"clip_ratio_low": 0.3}),
    ],
)
def test_invalid_arguments_raise(match, name, mode, options):
    info = {key: options[key] for key in options if key == "dp_size"}
    config = actor_config(info, **{key: options[key] for key in options.keys() - info.keys()})
    with pytest.raises(ValueError, match=match):
        run(f"grpo_fused_{name}", make_verl_batch(), config, mode)


def test_dro_needs_a_strength():
    from verl.workers.config import PolicyLossConfig

    config = actor_config(policy_loss=PolicyLossConfig(loss_mode="dro"))
    with pytest.raises(ValueError, match="policy_loss.dro_beta must be > 0, got None"):
        run("grpo_fused_dro", make_verl_batch(), config)


def test_config_is_required():
    values = make_verl_batch()._asdict()
    with pytest.raises(ValueError, match="config must be"):
        get_policy_loss_fn("grpo_fused_vanilla")(**values)


def padded_data(batch, **info):
    """Imitate the TensorDict that verl passes to ppo_loss, with padded tensors."""
    values = {
        "response_mask": batch.response_mask,
        "old_log_probs": batch.old_log_prob.float(),
        "advantages": batch.advantages.float(),
        "ref_log_prob": batch.log_prob.float() - 0.3,
    }

    class Data(dict):
        def select(self, *names):
            return Data({name: self[name] for name in names})

        def to_padded_tensor(self):
            return self

    return Data(values | {"dp_size": 2, "batch_num_tokens": 37, "global_batch_size": 9} | info)


def test_inside_ppo_loss(monkeypatch):
    """verl's ppo_loss, with entropy bonus and KL penalty: only loss_mode changes."""
    import verl.workers.utils.losses as worker
    from verl.workers.config import PolicyLossConfig

    monkeypatch.setattr(worker, "no_padding_2_padding", lambda values, data: values)
    batch, results = make_verl_batch(), []
    for mode in ("vanilla", "grpo_fused_vanilla"):
        config = actor_config(
            policy_loss=PolicyLossConfig(loss_mode=mode), entropy_coeff=0.01, use_kl_loss=True
        )
        log_prob = batch.log_prob.float().requires_grad_(True)
        output = {"log_probs": log_prob, "entropy": log_prob.detach().abs()}
        loss, metrics = worker.ppo_loss(config, output, padded_data(batch))
        loss.backward()
        numbers = {
            name: getattr(metric, "aggregate", lambda metric=metric: metric)()
            for name, metric in metrics.items()
        }
        results.append(SimpleNamespace(gradient=log_prob.grad, numbers=numbers))
    theirs, ours = results
    assert relative_error(ours.gradient, theirs.gradient) < 1e-6
    assert ours.numbers == pytest.approx(theirs.numbers, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("name", "cls"), [("dppo_tv", DppoTv), ("dppo_kl", DppoKl)])
def test_dppo_is_that_of_verl(name, cls):
    """Loss and gradient of a batch with tokens outside on both sides, in float64."""
    generator = torch.Generator().manual_seed(0)
    old = -3.0 * torch.rand(4, 50, generator=generator, dtype=torch.float64)
    logp = (old + 0.5 * torch.randn(4, 50, generator=generator, dtype=torch.float64)).clamp(max=0.0)
    advantages = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    config = actor_config(clip_ratio_low=0.05, clip_ratio_high=0.1, clip_ratio_c=1.5)
    theirs = logp.clone().requires_grad_()
    want, _ = get_policy_loss_fn(name)(
        old, theirs, advantages, torch.ones(4, 50), "token-mean", config, None
    )
    want.backward()
    loss, derivative, clipped = cls(0.05, 0.1, 1.5).evaluate(logp, logp - old, advantages)
    assert (clipped == -1).any() and (clipped == 1).any()
    assert loss.mean().item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(derivative / 200, theirs.grad, rtol=1e-6, atol=1e-9)
