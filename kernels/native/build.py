"""How the compiled kernels are built: cffi reads what the headers export and writes the extension module around it."""

from __future__ import annotations

import re
from pathlib import Path

import cffi

FOLDER = Path(__file__).parent
SOURCES = sorted(path.name for path in FOLDER.glob("*.c"))


def _headers() -> list[str]:
    """Headers named like a source, each behind those that it includes."""
    ordered: list[str] = []

    def add(name: str) -> None:
        for included in re.findall(r'^#include "(.*)"', (FOLDER / name).read_text(), flags=re.MULTILINE):
            add(included)
        if name not in ordered:
            ordered.append(name)

    for source in SOURCES:
        if (FOLDER / source).with_suffix(".h").exists():
            add(source.replace(".c", ".h"))
    return ordered


HEADERS = _headers()


def exported() -> str:
    """The declarations of the headers named like a source: plain C."""
    text = "".join((FOLDER / name).read_text() for name in HEADERS)
    return re.sub(r"^#.*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL), flags=re.MULTILINE)


ffibuilder = cffi.FFI()
ffibuilder.cdef(exported())
ffibuilder.set_source(
    "sessiond.kernels._native",
    "".join(f'#include "{name}"\n' for name in HEADERS),
    sources=[str(Path("kernels/native") / name) for name in SOURCES],
    include_dirs=["kernels/native"],
    depends=[str(Path("kernels/native") / path.name) for path in sorted(FOLDER.glob("*.h"))],
    libraries=["m", "pthread"],
    # Without contraction plain C gives the same bits on every level of instructions.
    extra_compile_args=["-O3", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wno-parentheses"],
    # Without a compiler the package still installs, and computes with torch.
    optional=True,
)
