"""torch.compile without graph breaks."""

import functools
import shutil

import torch

# Inductor needs a C++ compiler for the CPU; without one the graphs are traced and run as they are.
HAS_COMPILER = torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++")
compile_whole = functools.partial(
    torch.compile, fullgraph=True, backend="inductor" if HAS_COMPILER else "aot_eager"
)
