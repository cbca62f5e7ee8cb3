"""What Python costs around the kernels: forward and backward of the loss with launches left out.

    python -m benchmarks.overhead

Tensors are tiny and on the CPU, so that nothing but the package's own work is timed; the id check
that only a CPU gets is part of it.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # Triton's launchers then take CPU tensors

import statistics  # noqa: E402
import time  # noqa: E402

import torch  # noqa: E402

import grpo_fused.kernels.launch as launch  # noqa: E402
from grpo_fused import grpo_loss  # noqa: E402

ROUNDS, WARMUP = 3000, 300
B, T, V = 4, 6, 96


def main():
    torch.set_num_threads(1)
    launches = []
    launch.launch = lambda function, *args, **options: launches.append(function)
    logits = torch.randn(B, T + 1, V, requires_grad=True)
    ids, mask = torch.randint(V, (B, T)), torch.ones(B, T, dtype=torch.bool)
    advantages, old, ref = torch.randn(B), torch.randn(B, T), torch.randn(B, T)
    every = {"ref_logps": ref, "beta": 0.1, "compute_entropy": True, "temperature": 0.9}
    for name, options in {"plain": {}, "KL and entropy": every}.items():
        seconds = []
        for _ in range(WARMUP + ROUNDS):
            logits.grad = None
            del launches[:]
            start = time.perf_counter()
            loss = grpo_loss(
                *(logits, ids, mask, advantages),
                old_logps=old,
                num_items_in_batch=T * B,
                implementation="triton",
                **options,
            ).loss
            loss.backward()
            seconds.append(time.perf_counter() - start)
        median = 1e6 * statistics.median(seconds[WARMUP:])
        print(f"{name}: {median:.0f} us around {len(launches)} launches")


if __name__ == "__main__":
    main()
