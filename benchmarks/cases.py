"""The cases over logits: a table for each kind of machine.

Sequences have `lengths` active tokens and are padded to the longest. From cases of several sizes on
an `axis` `benchmarks.report` fits slopes.
"""

from typing import NamedTuple

VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 262_144)
LOSSES = ("fused", "fused_torch", "eager", "float32", "compiled")
LOSSES += ("trl", "liger", "liger_inplace", "quack", "fla")
LOGPS = ("fused", "fused_torch", "eager", "float32", "compiled", "trl", "quack")


class Case(NamedTuple):
    """A loss with its gradient, or with `loss` False log-probabilities alone.

    Attributes:
        name: its difference from a plain case; empty for those.
        entropy: an entropy bonus in the loss, entropies next to log-probabilities.
        inplace: whether our loss writes the gradient over the logits.
        only: providers to measure, ours first; empty: all.
    """

    name: str
    lengths: tuple
    V: int
    dtype: str = "bfloat16"
    loss: bool = True
    level: str = "token"
    entropy: bool = False
    inplace: bool = False
    on_policy: bool = False
    axis: str | None = None
    only: tuple[str, ...] = ()

    @property
    def title(self):
        kind = "loss and gradient" if self.loss else "log-probabilities"
        parts = [kind + (" in place" if self.inplace else ""), self.name, self.dtype]
        return ", ".join(part for part in parts if part)

    @property
    def id(self):
        kind = ("inplace" if self.inplace else "loss") if self.loss else "logps"
        parts = [kind, self.name.replace(" ", "-"), str(self.V), str(sum(self.lengths)), self.dtype]
        return "-".join(part for part in parts if part).replace("-%-", "-percent-")

    @property
    def size(self):
        """Its place on the axis."""
        return self.V if self.axis == "V" else sum(self.lengths)

    @property
    def providers(self):
        """Names of `providers` and `peers`, ours first."""
        if self.only:
            return self.only
        names = LOSSES if self.loss else LOGPS
        return ("fused_inplace", *names) if self.inplace else names


def special_cases(lengths, V, few, half, dtype):
    """Losses and log-probabilities, each with one difference from the plain ones."""
    plain = {"lengths": lengths, "V": V, "dtype": dtype}
    return [
        Case("entropy bonus", **plain, entropy=True),
        Case("entropies", **plain, loss=False, entropy=True),
        Case("ratio of sequences", **plain, level="sequence"),
        Case("on policy", **plain, on_policy=True),
        Case("few rows", few, V, dtype),
        Case("few rows", few, V, dtype, loss=False),
        Case("45 % active", half, V, dtype),
        Case("45 % active", half, V, dtype, loss=False),
    ]


def plain_cases(lengths, vocabularies, dtypes, inplace):
    return [
        Case("", lengths, V, dtype, loss, inplace=loss and inplace)
        for dtype in dtypes
        for V in vocabularies
        for loss in (True, False)
    ]


def growing_cases(rows, V, lengths, vocabularies, dtype):
    """Losses of more and more rows, and over larger and larger vocabularies."""
    by_rows = [Case("rows", (n // 8,) * 8, V, dtype, axis="rows") for n in rows]
    by_V = [Case("vocabulary", lengths, size, dtype, axis="V") for size in vocabularies]
    return by_rows + by_V


FULL, HALF = (1024,) * 8, (1024, 819, 614, 410, 307, 205, 205, 102)  # 3,686 of 8,192 rows
CUDA_FEW = (32,) * 8
CUDA = [
    *plain_cases(FULL, VOCABULARIES, ("bfloat16",), inplace=True),
    *plain_cases(FULL, (128_256,), ("float32",), inplace=False),
    *special_cases(FULL, 151_936, CUDA_FEW, HALF, "bfloat16"),
    *growing_cases((256, 1024, 4096, 16_384, 65_536), 128_256, FULL, VOCABULARIES, "bfloat16"),
]

CPU_FULL, CPU_HALF, CPU_FEW = (64,) * 8, (256, 128, 64, 16), (8,)
CPU_ROWS, CPU_VOCABULARIES = (64, 128, 256, 512), (8_000, 16_001, 32_000, 64_000)
CPU = [
    *plain_cases(CPU_HALF, (32_000,), ("float32", "bfloat16"), inplace=False),
    *plain_cases(CPU_HALF, (50_257,), ("bfloat16",), inplace=False),
    *special_cases(CPU_FULL, 32_000, CPU_FEW, CPU_HALF, "bfloat16"),
    *growing_cases(
        (64, 128, 256, 512), 32_000, (16,) * 8, (8_000, 16_001, 32_000, 64_000), "float32"
    ),
]
