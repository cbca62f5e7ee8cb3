"""Triton's own launch path without a GPU: its JIT binds, specialises, compiles and "launches".

A stand-in for libcuda, `standin_cuda.c`, takes the launches of an H100. Needs a C compiler, the
headers of Python, and a process without TRITON_INTERPRET.
"""

import ctypes
import re
import shutil
import struct
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from grpo_fused import validation
from grpo_fused.kernels import launch

SOURCE = Path(__file__).with_name("standin_cuda.c")
INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
MOST = 128  # parameters of a kernel


class Record(ctypes.Structure):
    """`struct launch` of the stand-in."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("grid", ctypes.c_uint),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("parameters", ctypes.c_uint),
        ("values", (ctypes.c_uint8 * 8) * MOST),
    )


class Launch(NamedTuple):
    """A launch as the driver would get it, and the parameters that it should get."""

    name: str
    grid: int
    threads: int
    shared: int
    parameters: list[bytes]
    wanted: list[bytes]


def missing():
    """Why this cannot run here, or None."""
    if not shutil.which("cc"):
        return "needs a C compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "needs the headers of Python"
    if torch.cuda.is_available():
        return "a real driver is loaded; tests/gpu launches on it"
    return None


def install(directory):
    """Build the stand-in in a directory, and make Triton and grpo_fused launch through it.

    Returns:
        list of `Launch`, to which every launch is appended.
    """
    library = Path(directory) / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", f"-I{INCLUDE}", f"-Wl,-soname,{library.name}"]
    subprocess.run([*command, "-o", library, SOURCE], check=True)
    standin = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # found by its soname from now on
    standin.noted.restype = ctypes.POINTER(Record)
    triton.knobs.nvidia.libcuda_path = str(directory)
    triton.knobs.cache.dir = str(directory)  # nothing made here may serve a real driver

    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_device_capability = lambda device: (9, 0)
    driver.get_current_stream = lambda device: 0
    driver.get_active_torch_device = lambda: torch.device("cpu")
    triton.runtime.driver.set_active(driver)
    validation.triton_serves = lambda device_type: True
    launches = []

    def noted(function, programs, *args, **options):
        compiled = function.warmup(*args, grid=(programs,), **options)
        sizes = parameter_sizes(compiled.asm["ptx"])
        standin.expect(len(sizes), (ctypes.c_uint * len(sizes))(*sizes))
        function[(programs,)](*args, **options)
        record = standin.noted().contents
        parameters = [bytes(record.values[i])[:size] for i, size in enumerate(sizes)]
        found = (record.name.decode(), record.grid, record.threads, record.shared)
        scratch = [bytes(8), bytes(8)]  # Triton's own two pointers, unused
        launches.append(Launch(*found, parameters, expected(function, args) + scratch))
        assert record.grid == programs and record.threads == 32 * compiled.metadata.num_warps
        assert record.shared == compiled.metadata.shared

    launch.launch = noted
    return launches


def parameter_sizes(ptx):
    """Bytes of every parameter of the kernel."""
    head = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))]
    return [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", head)]


def expected(function, args):
    """The parameters that the arguments of a kernel should become."""
    packed = []
    for parameter, value in zip(function.params, args, strict=False):
        if not parameter.is_constexpr:
            wide = parameter.annotation_type == "i64"
            packed += _pack(value, "q" if wide else "i")
    return packed


def _pack(value, integer):
    if isinstance(value, torch.Tensor):
        return [struct.pack("Q", value.data_ptr())]
    if isinstance(value, tuple):
        return [part for field in value for part in _pack(field, integer)]
    if isinstance(value, float):
        return [struct.pack("f", value)]
    if isinstance(value, int) and not isinstance(value, bool):
        return [struct.pack(integer, value)]
    assert value is None or isinstance(value, tl.constexpr | triton.JITFunction), value
    return []  # nothing of these is passed
