"""The compiled kernels say which sources they are of: bits are promised within those alone."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from kernel_marks import needs_build

from sessiond.kernels import native_library

NATIVE = Path(__file__).parents[2] / "kernels" / "native"


def loaded(path: Path) -> ModuleType:
    """The module of a file, beside the one that is imported already."""
    spec = importlib.util.spec_from_file_location(f"another_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_build
def test_the_kernels_name_the_sources_that_lie_here():
    """If not, they were compiled before the last change."""
    assert loaded(NATIVE / "build.py").sources_digest() == native_library.SOURCES


@pytest.mark.parametrize("name", ["matrix.c", "lanes_inline.h", "native.h", "runtime.h"])
def test_every_source_and_header_counts(tmp_path: Path, name: str):
    folder = tmp_path / "native"
    shutil.copytree(NATIVE, folder)
    before = loaded(folder / "build.py").sources_digest()
    assert before == loaded(NATIVE / "build.py").sources_digest()
    with (folder / name).open("a") as file:
        file.write("\n")
    assert loaded(folder / "build.py").sources_digest() != before


def test_how_they_are_compiled_counts(monkeypatch: pytest.MonkeyPatch):
    build = loaded(NATIVE / "build.py")
    before = build.sources_digest()
    monkeypatch.setattr(build, "FLAGS", [flag for flag in build.FLAGS if flag != "-ffp-contract=off"])
    assert build.sources_digest() != before


def test_without_compiled_kernels_a_word_stands_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sessiond.kernels._native", None)
    plain = loaded(Path(native_library.__file__))
    assert (plain.BUILT, plain.SOURCES) == (False, "none")
