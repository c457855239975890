"""How the compiled kernels are built: cffi reads what the headers export and writes the extension module around it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import cffi

FOLDER = Path(__file__).parent
SOURCES = sorted(path.name for path in FOLDER.glob("*.c"))
# Without contraction plain C gives the same bits on every level of instructions.
FLAGS = ["-O3", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wno-parentheses"]


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


def sources_digest() -> str:
    """32 hex digits of what the kernels are compiled from: sources and headers, by name and bytes, and flags."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted((*FOLDER.glob("*.c"), *FOLDER.glob("*.h"))):
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:32]


ffibuilder = cffi.FFI()
ffibuilder.cdef(exported())
ffibuilder.set_source(
    "sessiond.kernels._native",
    # Told here and not by a macro: other sources then make another file, which setuptools compiles again.
    "".join(f'#include "{name}"\n' for name in HEADERS)
    + f'const char *sources_digest(void) {{ return "{sources_digest()}"; }}\n',
    sources=[str(Path("kernels/native") / name) for name in SOURCES],
    include_dirs=["kernels/native"],
    depends=[str(Path("kernels/native") / path.name) for path in sorted(FOLDER.glob("*.h"))],
    libraries=["m", "pthread"],
    extra_compile_args=FLAGS,
    # Without a compiler the package still installs, and computes with torch.
    optional=True,
)
