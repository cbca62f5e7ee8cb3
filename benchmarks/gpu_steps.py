"""The steps of `benchmarks.on_gpu`, each in a process.

    python -m benchmarks.gpu_steps times 32000 --out runs/gpu

With --dry they run tiny shapes on a CPU, in Triton's interpreter. Results are appended to
results.jsonl in the folder --out.
"""

import argparse
import os
import platform
import sys
from pathlib import Path

if "--dry" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402

from benchmarks import bench_linear, bench_logits, lines, measure, tune  # noqa: E402
from benchmarks.cases import FULL, Case  # noqa: E402
from grpo_fused import grpo_loss, selective_log_softmax  # noqa: E402
from grpo_fused.kernels import launch  # noqa: E402

HEAD = (8192, 4096, 151_936)  # rows, H, V
DRY_V, DRY_LENGTHS = 97, (3, 2)


class Rounds:
    """Stands in for the fixture of pytest-benchmark: `measure.interleave` times by itself."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, setup=lambda: None, rounds=1, warmup_rounds=0):
        for _ in range(warmup_rounds + rounds):
            setup()
            target()


class Machine:
    """Where the steps run, and where their results go."""

    def __init__(self, out, dry):
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        self.file, self.out = out / "results.jsonl", out

    def write(self, name, info):
        if not self.file.exists():
            cpu = {"brand_raw": platform.processor() or platform.machine(), "count": os.cpu_count()}
            lines.append(self.file, {"machine_info": {"cpu": cpu}})
        lines.append(self.file, {"fullname": name, "extra_info": info})


def check(machine):
    """A matmul and one loss against float64: whether anything else is worth its time."""
    device, size = machine.device, 64 if machine.dry else 4096
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    matmul = measure.relative_error([a @ b], [a.double() @ b.double()])
    case = Case("", (16,) * 4, 1009, "float32", only=("fused", "fused_inplace"))
    batch = bench_logits.make_batch(case.lengths, case.V, case.dtype, device, seed=0)
    errors = bench_logits.gradient_errors(case, batch)
    info = measure.environment(device) | {"matmul_error": matmul, "gradient_errors": errors}
    machine.write("check", info)
    assert max(errors.values()) < 1e-5, info


def times(machine, V):
    """Ours against the floors: whole steps and, of the loss, the kernel alone."""
    V, lengths = (DRY_V, DRY_LENGTHS) if machine.dry else (int(V), FULL)
    dtype = "float32" if machine.dry else "bfloat16"
    for loss in (True, False):
        ours = ("fused_inplace",) if loss else ("fused",)
        case = Case("", lengths, V, dtype, loss, inplace=loss, only=ours)
        timer = Rounds()
        bench_logits.bench(timer, case, machine.device)
        if loss and not machine.dry:
            choice = launch.choose(V, 2, launch.device_of(torch.cuda.current_device()))
            sizes = (V, torch.bfloat16, sum(lengths), machine.device, tune.device_timer)
            timer.extra_info["kernel_ms"] = 1e3 * tune.time_choice(choice, *sizes)
        machine.write(case.id, timer.extra_info)
        torch.cuda.empty_cache()


def once(machine):
    """One loss in place and one pass of log-probabilities, for ncu to count their bytes."""
    V, rows = (DRY_V, 4) if machine.dry else (151_936, 2048)
    dtype = torch.float32 if machine.dry else torch.bfloat16
    logits, ids, *_ = batch = tune.make_batch(rows, V, dtype, machine.device)
    selective_log_softmax(logits, ids)
    tune.step_of(*batch)()
    machine.write("bytes", {"rows": rows, "V": V, "expected_bytes_read": logits.nbytes})


def tune_blocks(machine, V):
    """Time every candidate for block sizes."""
    if machine.dry:
        choices = [launch.Choice("", 1e9, threads, 4, 1, "") for threads in (32, 64)]
        sizes, timer = (DRY_V, torch.float32, 4, "cpu"), lambda step, prepare: step() or 1.0
    else:
        choices = list(tune.candidates())
        sizes, timer = (int(V), torch.bfloat16, 4096, "cuda"), tune.device_timer
    where = "{device}, torch {torch}, Triton {triton}".format(**measure.environment(machine.device))
    tune.sweep(*sizes, timer, choices, where, machine.out / "tune.jsonl")


def head(machine, peer=None):
    """The loss with the LM head inside against its bare matmuls, and against a peer."""
    rows, H, V = (8, 8, DRY_V) if machine.dry else HEAD
    lengths = (4, 4) if machine.dry else (1024,) * (rows // 1024)
    timer, names = Rounds(), ("fused", *([peer] if peer else []))
    dtype = "float32" if machine.dry else "bfloat16"
    case = f"head, loss and gradients, {dtype}"
    bench_linear.time_losses(timer, case, (lengths, H, V), dtype, machine.device, names)
    machine.write(case + (f", {peer}" if peer else ""), timer.extra_info)


def small(machine):
    """Small rows of every kind, for compute-sanitizer: it slows kernels a hundredfold."""
    for V in (1, 7, 257, 1001, 4104):
        for dtype in (torch.float32, torch.bfloat16):
            for softcap in (None, 30.0):
                for inplace in (False, True):
                    _small_losses(machine.device, V, dtype, softcap, inplace)
    if machine.device == "cuda":
        torch.cuda.synchronize()


def _small_losses(device, V, dtype, softcap, inplace):
    leaf = torch.randn(2, 4, V, device=device, dtype=dtype, requires_grad=True)  # T + 1 positions
    ids = torch.randint(V, (2, 3), device=device)
    options = {"logit_softcap": softcap, "inplace": inplace, "implementation": "triton"}
    mask, advantages = torch.tensor([[1, 1, 1], [1, 0, 0]], device=device), torch.ones(2).to(device)
    old_logps, weights = torch.full((2, 3), -1.0, device=device), {"entropy_coef": 0.1}
    out = grpo_loss(leaf * 1, ids, mask, advantages, old_logps=old_logps, **weights, **options)
    out.loss.backward()
    logps, entropies = selective_log_softmax(leaf * 1, ids, mask, compute_entropy=True, **options)
    (logps.sum() + entropies.sum()).backward()


STEPS = {"check": check, "times": times, "once": once}
STEPS |= {"tune": tune_blocks, "head": head, "small": small}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_steps", description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(argv)
    STEPS[options.step](Machine(options.out, options.dry), *options.arguments)


if __name__ == "__main__":
    main()
