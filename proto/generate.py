"""Generate sessiond/v1 from the protos: messages, gRPC stubs and their types.

    python proto/generate.py              rewrite sessiond/v1
    python proto/generate.py --check      exit with status 1 if that would change anything
    python proto/generate.py --out DIR    write DIR/sessiond/v1 instead

The same sources and tools give the same bytes; other releases of the tools may give others.
"""

from __future__ import annotations

import argparse
import importlib.resources
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

PROTO = Path(__file__).resolve().parent
PACKAGE = Path("sessiond/v1")
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


class GenerateError(Exception):
    """A tool is missing, or protoc refused the sources."""


def find_plugin(name: str) -> str:
    """Path of a protoc plugin: beside this interpreter, or on PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise GenerateError(f"{name} is missing: pip install -e '.[dev]'")
    return path


def generate(out: Path) -> None:
    """Write `out`/sessiond/v1/*_pb2*; `out` must exist."""
    try:
        from grpc_tools import protoc  # type: ignore[import-untyped]
    except ImportError as error:
        raise GenerateError("grpcio-tools is missing: pip install -e '.[dev]'") from error

    paths = sorted((PROTO / PACKAGE).glob("*.proto"))
    sources = [str(path.relative_to(PROTO)) for path in paths]
    services = [str(path.relative_to(PROTO)) for path in paths if "\nservice " in path.read_text()]
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    common = [
        "protoc",
        f"--proto_path={PROTO}",
        f"--proto_path={well_known}",
        f"--plugin=protoc-gen-mypy={find_plugin('protoc-gen-mypy')}",
        f"--plugin=protoc-gen-mypy_grpc={find_plugin('protoc-gen-mypy_grpc')}",
    ]
    messages = [f"--python_out={out}", f"--mypy_out=quiet:{out}", *sources]
    stubs = [f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}", *services]
    for arguments in (messages, stubs):
        if protoc.main([*common, *arguments]) != 0:
            raise GenerateError("protoc failed; its messages stand above")


def read_generated(root: Path) -> dict[str, bytes]:
    """The generated files under `root`/sessiond/v1, by name."""
    folder = root / PACKAGE
    return {path.name: path.read_bytes() for pattern in GENERATED for path in sorted(folder.glob(pattern))}


def differences(root: Path) -> list[str]:
    """Names of the files under `root` that generating again would add, change or remove."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = read_generated(Path(folder))
    committed = read_generated(root)
    return sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))


def replace(root: Path) -> None:
    """Make the generated files under `root` what the sources say, leaving unchanged ones untouched."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = read_generated(Path(folder))
    target = root / PACKAGE
    target.mkdir(parents=True, exist_ok=True)
    committed = read_generated(root)
    for name in committed.keys() - fresh.keys():
        (target / name).unlink()
    for name, content in fresh.items():
        if committed.get(name) != content:
            (target / name).write_bytes(content)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Generate sessiond/v1 from the protos.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="change nothing; fail if anything would change")
    action.add_argument("--out", type=Path, metavar="DIR", help="write DIR/sessiond/v1 instead")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            changed = differences(PROTO.parent)
            if changed:
                names = ", ".join(changed)
                sys.stderr.write(f"not what proto/ says: {names}; run python proto/generate.py\n")
            return 1 if changed else 0
        replace(options.out or PROTO.parent)
    except GenerateError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
