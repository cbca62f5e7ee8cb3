"""Registers, spills and instructions of every kernel, compiled for GPUs that need not be there.

    python -m benchmarks.aot [--target sm_90 ...] [--json FILE]

The launchers run as on the device, with small CPU tensors and a driver that only names a target;
each launch is compiled instead of started. So block sizes, specialisation and flags are those of
production. Registers, spills, load widths and instructions per element are read from the machine
code. Needs a process without TRITON_INTERPRET.
"""

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.aot_cases import CASES
from grpo_fused.kernels import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class OfflineDriver:
    """The part of a Triton driver that compiling needs: it names the target."""

    def __init__(self, target):
        self.target, self.utils = target, self

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # the key under which compiled variants are cached

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, device):
        return {"multiprocessor_count": 1}


@dataclass
class Figures:
    """One compiled variant. Instructions are per element of a row, None without such a loop."""

    target: str
    kernel: str
    dtype: str
    case: str
    registers: int
    spills: int
    load_bits: int
    store_bits: int
    statistics: float | None
    gradient: float | None
    exchanges: int  # shuffles and barriers inside the statistics loop


def compile_launches(target, run):
    """Call `run()`, and return [(kernel name, compiled)] of what it would have launched."""
    compiled = []

    def compile_only(function, programs, *args, **options):
        compiled.append((function.__name__, function.warmup(*args, grid=(programs,), **options)))

    start = launch.launch
    launch.launch = compile_only
    launch.device_of.cache_clear()
    triton.runtime.driver.set_active(OfflineDriver(TARGETS[target]))
    try:
        run()
    finally:
        launch.launch = start
        launch.device_of.cache_clear()
    return compiled


def variants(target, run):
    """{kernel name: keys of the variants} that Triton would compile for `run()`; none is compiled.

    For a process that has compiled none of them before.
    """
    found = {}

    def note(function, key, *rest):
        found.setdefault(function.__name__, set()).add(key)

    compile_variant = triton.JITFunction._do_compile
    triton.JITFunction._do_compile = note
    try:
        compile_launches(target, run)
    finally:
        triton.JITFunction._do_compile = compile_variant
    return found


def measure(target, dtype, V=151_936, cases=CASES):
    """Figures of every case for one target and dtype ("bf16", "fp16", "fp32")."""
    figures = []
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    for case, run in cases.items():
        launches = functools.partial(run, DTYPES[dtype], V)
        of_logits = "fp32" if "float32 logits" in case else dtype
        for kernel, compiled in compile_launches(target, launches):
            figures.append(Figures(target, kernel, dtype, case, **read(compiled, of_logits)))
    return figures


def _read_amd(compiled, dtype):
    code = compiled.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code).group(1)),
        "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code).group(1)),
        "load_bits": max(_amd_widths(code, "load")),
        "store_bits": max(_amd_widths(code, "store")),
        "statistics": None,
        "gradient": None,
        "exchanges": 0,
    }


def _amd_widths(code, kind):
    """Bits of every global load or store."""
    pattern = rf"\b(?:global|buffer|flat)_{kind}_(?:[us]?(byte|short)|dword(?:x(\d))?)"
    bits = {"byte": 8, "short": 16}
    found = re.findall(pattern, code)
    return [bits[small] if small else 32 * int(count or 1) for small, count in found]


def _read_nvidia(compiled, dtype):
    instructions, labels = disassemble(compiled)
    itemsize = DTYPES[dtype].itemsize
    statistics, gradient, exchanges = [], [], 0
    for body in inner_loops(instructions, labels):
        elements = sum(op.bits for op in body if op.is_("LDG")) / (8 * itemsize)
        if not any(op.is_("MUFU.EX2") for op in body) or not elements:
            continue
        loop = (elements, len(body) / elements)
        if any(op.is_("STG") for op in body):
            gradient.append(loop)
        else:
            statistics.append(loop)
            exchanges += sum(op.is_("SHFL", "BAR") for op in body)
    return {
        "registers": _registers(compiled.asm["cubin"]),
        "spills": sum(op.is_("LDL", "STL") for op in instructions),
        "load_bits": max(op.bits for op in instructions if op.is_("LDG")),
        "store_bits": max(op.bits for op in instructions if op.is_("STG")),
        "statistics": max(statistics, default=(0, None))[1],  # of the loop that reads most
        "gradient": max(gradient, default=(0, None))[1],
        "exchanges": exchanges,
    }


def _tool(name, cubin, *options):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [NVIDIA_TOOLS / name, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _registers(cubin):
    return int(re.search(r"REG:(\d+)", _tool("cuobjdump", cubin, "-res-usage")).group(1))


class Instruction(NamedTuple):
    """One instruction of the machine code of an NVIDIA GPU, without its predicate."""

    opcode: str
    operands: str

    def is_(self, *names):
        """Whether the opcode starts with one of the names."""
        return self.opcode.startswith(names)

    @property
    def bits(self):
        """Width of a global load or store: LDG.E.EF.128 -> 128."""
        widths = [int(w) for w in re.findall(r"\.U?(8|16|64|128)\b", self.opcode)]
        return widths[-1] if widths else 32


def disassemble(compiled):
    """([Instruction, ...], {label: index}) of a kernel."""
    instructions, labels = [], {}
    for line in _tool("nvdisasm", compiled.asm["cubin"], "-c").splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*(\S+) *(.*?) *;", line):
            instructions.append(Instruction(*found.groups()))
    return instructions, labels


def inner_loops(instructions, labels):
    """Bodies of the loops that contain no other loop."""
    loops = []
    for end, op in enumerate(instructions):
        target = re.search(r"\((\.L_\w+)\)", op.operands) if op.is_("BRA") else None
        if target and labels.get(target.group(1), end + 1) < end:
            loops.append((labels[target.group(1)], end))
    return [
        instructions[start : end + 1]
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]


def render(figures):
    """The figures as a Markdown table."""
    columns = ("target", "dtype", "kernel", "registers", "spills", "load / store bits")
    columns += ("instructions per element: statistics, gradient",)
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for f in figures:
        loops = ", ".join("-" if n is None else f"{n:.2f}" for n in (f.statistics, f.gradient))
        lines.append(
            f"| {f.target} | {f.dtype} | {f.case} | {f.registers} | {f.spills} "
            f"| {f.load_bits} / {f.store_bits} | {loops} |"
        )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(argv)
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set; compiling needs a process without it")
    cases = {name: CASES[name] for name in options.case}
    figures = [
        figure
        for target in options.target
        for dtype in options.dtype
        for figure in measure(target, dtype, options.vocabulary, cases)
    ]
    print(f"Triton {triton.__version__}, V = {options.vocabulary}")
    print(render(figures))
    if options.json:
        rows = {"triton": triton.__version__, "figures": [asdict(f) for f in figures]}
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
