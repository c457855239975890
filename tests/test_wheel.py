"""What is built is what is in the tree: every module of the package map, and nothing generic at the top."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from sessiond.kernels.native_library import BUILT

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "tests", "benchmarks", "docs", "*.so"
)


def expected() -> set[str]:
    """Paths in the wheel, by the package map of pyproject.toml."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = {"sessiond/py.typed"}
    for package in setuptools["packages"]:
        folder = ROOT / setuptools["package-dir"].get(package, package.replace(".", "/"))
        patterns = ["*.py", "*.pyi", *setuptools["package-data"].get(package, [])]
        for pattern in patterns:
            files |= {f"{package.replace('.', '/')}/{path.name}" for path in folder.glob(pattern)}
    return files


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and a wheel built from the unpacked sdist."""
    work = tmp_path_factory.mktemp("build")
    tree = work / "tree"
    shutil.copytree(ROOT, tree, ignore=SKIPPED)
    if not (tree / "README.md").exists():
        (tree / "README.md").write_text("# sessiond\n")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist"), str(tree)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return work / "dist"


def wheel_files(built: Path) -> set[str]:
    (wheel,) = built.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    found = {name for name in wheel_files(built) if ".dist-info/" not in name}
    libraries = {name for name in found if name.startswith("sessiond/kernels/") and name.endswith(".so")}
    assert found - libraries == expected()
    assert bool(libraries) == BUILT  # the compiler that built what runs here builds it again


def test_without_a_compiler_the_package_still_installs(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(sdist),
    ]
    environment = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "from sessiond.kernels.native_library import BUILT, ISA; assert not BUILT and ISA < 0"
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_nothing_generic_can_be_imported(built: Path) -> None:
    top = {name.partition("/")[0] for name in wheel_files(built)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"sessiond"}


def test_licence_and_entry_point_are_in_the_wheel(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (licence,) = (name for name in names if name.endswith("/licenses/LICENSE"))
        assert b"Apache License" in archive.read(licence)
        (entry,) = (name for name in names if name.endswith("/entry_points.txt"))
        assert b"sessiond = sessiond.cli:main" in archive.read(entry)
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        base = [
            line for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist") and "extra ==" not in line
        ]  # fmt: skip
        assert {line.split()[1].partition(">")[0] for line in base} == {
            "googleapis-common-protos", "grpcio", "grpcio-status", "protobuf",
        }  # fmt: skip


def test_sdist_can_build_the_wheel(built: Path) -> None:
    # `built` made the wheel from the sdist; this says that the sources are where the map expects them.
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "LICENSE",
        "sessiond/errors.py",
        "storage/__init__.py",
        "kernels/native/native.h",
        "kernels/native/attention.h",
    } <= names


def test_installed_wheel_imports(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sessiond.clients, sessiond.errors, sessiond.storage, sessiond.policies, sessiond.kernels\n"
        "import sys; assert sessiond.clients.__file__.startswith(sys.path[0]), sessiond.clients.__file__\n"
        "assert not {'torch', 'transformers', 'lmdb'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
