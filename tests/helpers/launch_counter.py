"""Counts what a device would launch, without one."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import grpo_fused.kernels.launch as launch
from grpo_fused import LOSSES

# Operators of torch that launch nothing: they allocate, or make another view.
FREE = {"empty", "detach", "view", "expand", "select", "unsqueeze", "squeeze", "unbind", "t"}
# Python reads a 0-d tensor on a CPU, where it is free.
FREE |= {
    "_local_scalar_dense",
    "alias",
    "_unsafe_view",
    "slice",
    "as_strided",
    "lift_fresh",
    "empty_like",
    "empty_strided",
}


class Counter(TorchDispatchMode):
    """Kernels that a device would launch: ours, and operators of torch that are not free."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.launches = []

        def counted(function, programs, *args, **options):
            self.launches.append(function.__name__)
            with _disable_current_modes():  # the interpreter's own copies are not launches
                function[(programs,)](*args, **options)

        monkeypatch.setattr(launch, "launch", counted)
        for module in ("arguments", "autograd.common", "autograd.logits"):  # no poisoned memory
            monkeypatch.setattr(f"grpo_fused.{module}.torch", torch)
        monkeypatch.setattr("grpo_fused.checks.is_readable", lambda device: False)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.launches.append(name)
        return function(*args, **(kwargs or {}))

    def take(self):
        launches, self.launches = self.launches, []
        return launches


def options_of(batch, *names):
    every = {
        "old_logps": batch.old_logps,
        "ref_logps": batch.ref_logps,
        "beta": 0.1,
        "importance_sampling_ratio": torch.ones(batch.mask.shape[0], 1),
        "policy_mask": batch.mask != 0,
        "entropy_coef": 0.01,
        "kl_normalizer": "token-mean",
    }
    return {name: every[name] for name in names}


PLAIN = ("old_logps", "ref_logps", "beta")
FULL = (*PLAIN, "importance_sampling_ratio", "policy_mask", "entropy_coef", "kl_normalizer")
TOKEN_LEVEL = [
    name
    for name, row in LOSSES.items()
    if row.level == "token" and hasattr(row.objective, "per_token")
]


READS = ("_fused_loss_kernel", "_logprob_fwd_kernel", "_logprob_bwd_kernel")


def reads_of_logits(launches):
    """How often launches read the logits; the fused loss reads a row again from the caches."""
    return sum(name in READS for name in launches)
