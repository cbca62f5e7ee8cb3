"""What Python costs around the kernels: forward and backward of the loss with launches left out.

    python -m benchmarks.overhead

Tensors are tiny and on the CPU, so that nothing but the package's own work is timed. The look at
the values of ids, which only a CPU gets, is timed apart; what a GPU adds, switching devices and
Triton's own launch, is not seen here. Where other work shares the machine, believe the number of
calls.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's launchers then take CPU tensors

import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

import grpo_fused.kernels.launch as launch  # noqa: E402
from grpo_fused import grpo_loss, validation  # noqa: E402

FOLDERS = tuple(str(Path(module.__file__).parent) for module in (validation, launch))
ROUNDS, WARMUP = 3000, 300
B, T, V = 4, 6, 96
CASES = {
    "plain": (),
    "KL and entropy": ("ref_logps", "beta", "compute_entropy", "temperature"),
    "grpo": ("loss_type",),
}


def make_step(names):
    """A step without arguments: forward and backward with the options of these names."""
    torch.manual_seed(0)
    logits = torch.randn(B, T + 1, V, requires_grad=True)
    ids, mask = torch.randint(V, (B, T)), torch.ones(B, T, dtype=torch.bool)
    advantages, old_logps = torch.randn(B), torch.randn(B, T)
    every = {"ref_logps": torch.randn(B, T), "beta": 0.1, "compute_entropy": True}
    every |= {"temperature": 0.9, "loss_type": "grpo"}
    options = {name: every[name] for name in names}

    def step():
        logits.grad = None
        grpo_loss(
            *(logits, ids, mask, advantages),
            old_logps=old_logps,
            num_items_in_batch=T * B,
            implementation="triton",
            **options,
        ).loss.backward()

    return step


def count_calls(step):
    """Calls that the package makes in a step, of its own and of others' functions.

    The same on any machine; what torch does inside of one is not counted.
    """
    calls = []

    def note(frame, event, argument):
        caller = frame.f_back if event == "call" else frame
        if event in ("call", "c_call") and caller.f_code.co_filename.startswith(FOLDERS):
            calls.append(event)

    step()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return len(calls)


def median_us(step):
    """Microseconds of a step."""
    seconds = []
    for _ in range(WARMUP + ROUNDS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds[WARMUP:])


def main():
    torch.set_num_threads(1)
    launches = []
    launch.launch = lambda function, *args, **options: launches.append(function)
    check_ids = validation.check_ids
    for name, options in CASES.items():
        step = make_step(options)
        with_ids = median_us(step)
        validation.check_ids = lambda *args: None
        without = median_us(step)
        validation.check_ids = check_ids
        del launches[:]
        calls = count_calls(step)
        print(
            f"{name}: {with_ids:.0f} us, {with_ids - without:.0f} of them for ids on a CPU; "
            f"{calls} calls around {len(launches) // 2} launches"
        )


if __name__ == "__main__":
    main()
