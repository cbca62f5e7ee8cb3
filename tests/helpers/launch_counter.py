"""Counts what a device would launch, without one."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import grpo_fused.kernels.launch as launch
from grpo_fused import LOSSES

# Operators of torch that launch nothing: they allocate, or make another view.
FREE = {"empty", "detach", "view", "expand", "select", "unsqueeze", "squeeze", "unbind", "t"}
FREE |= {"alias", "_unsafe_view", "slice", "as_strided", "lift_fresh", "empty_strided"}


class Counter(TorchDispatchMode):
    """Kernels that a device would launch: ours, and operators of torch that are not free."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.launches, self.traffic = [], []

        def counted(function, programs, *args, traffic=None, **options):
            self.launches.append(function.__name__)
            self.traffic.append((function.__name__, traffic))
            with _disable_current_modes():  # the interpreter's own copies are not launches
                function[(programs,)](*args, **options)

        monkeypatch.setattr(launch, "launch", counted)
        monkeypatch.setattr("grpo_fused.autograd.torch", torch)  # no poison in its memory
        # Values are looked at on the CPU only.
        monkeypatch.setattr("grpo_fused.validation.check_ids", lambda *args: None)

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
TOKEN_LEVEL = [name for name, row in LOSSES.items() if row.level == "token" and name != "vespo"]


def traffic_of(counter, *kernels):
    chosen = [traffic for name, traffic in counter.traffic if name in kernels]
    return sum(t.read for t in chosen), sum(t.written for t in chosen)
