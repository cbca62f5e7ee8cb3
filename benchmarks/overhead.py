"""Time of the Python around the kernels: forward and backward of the loss without launches.

    python -m benchmarks.overhead

Tensors are tiny and on the CPU, and launches do nothing, so that only the package's own work is
timed. Checking the values of ids, which happens only on a CPU, is timed apart. What a GPU adds,
switching devices and Triton's own launch, is not part of it. Times are the medians of short blocks
of steps, and of those the smallest: other work on the machine slows most blocks.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's launchers then take CPU tensors

import statistics  # noqa: E402
import time  # noqa: E402

import torch  # noqa: E402

import grpo_fused.kernels.launch as launch  # noqa: E402
from grpo_fused import grpo_loss, validation  # noqa: E402

BLOCKS, STEPS = 150, 20  # a block takes less time than the scheduler gives a process
TARGET_US = 100
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


def fastest_us(step):
    """Microseconds of a step: the smallest median of a block of steps."""
    medians = []
    for _ in range(BLOCKS):
        seconds = []
        for _ in range(STEPS):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        medians.append(statistics.median(seconds))
    return 1e6 * min(medians)


def main():
    torch.set_num_threads(1)
    launch.launch = lambda function, *args, **options: None
    check_ids = validation.check_ids
    for name, options in CASES.items():
        step = make_step(options)
        with_ids = fastest_us(step)
        validation.check_ids = lambda *args: None
        without = fastest_us(step)
        validation.check_ids = check_ids
        print(
            f"{name}: {without:.0f} us (target {TARGET_US}), and {with_ids - without:.0f} us for "
            "the values of ids on a CPU",
            flush=True,
        )


if __name__ == "__main__":
    main()
