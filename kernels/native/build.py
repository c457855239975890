"""How the compiled kernels are built: cffi reads what native.h exports and writes the extension module around it."""

from __future__ import annotations

import re
from pathlib import Path

import cffi

FOLDER = Path(__file__).parent
SOURCES = ("runtime.c", "linear.c", "attention.c", "pack.c")


def exported() -> str:
    """The declarations of native.h below its last comment."""
    text = (FOLDER / "native.h").read_text()
    declarations = text.partition("/* The exported functions")[2].partition("*/")[2].partition("#endif")[0]
    return re.sub(r"\s+", " ", declarations)


ffibuilder = cffi.FFI()
ffibuilder.cdef(exported())
ffibuilder.set_source(
    "sessiond.kernels._native",
    '#include "native.h"',
    sources=[str(Path("kernels/native") / name) for name in SOURCES],
    include_dirs=["kernels/native"],
    depends=["kernels/native/native.h", "kernels/native/build.py"],
    libraries=["m", "dl"],
    extra_compile_args=["-O3", "-fno-math-errno", "-Wall", "-Wno-parentheses"],
    # Without a compiler the package still installs, and computes with torch.
    optional=True,
)
