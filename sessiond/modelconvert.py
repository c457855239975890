"""Turn a GGUF file into a transformers directory, once.

transformers takes many seconds to read a GGUF file; the converted directory is read in well under one.
A child process does it: the float32 copies it needs go back to the system, and its notes stay out of ours.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sessiond.errors import DependencyMissing, ModelCorrupt, SessiondError
from sessiond.modelcheck import BLOCKS, check_directory, check_gguf, read_safetensors_header

#: Written last into a converted directory; one without it is unfinished.
MARKER = "sessiond.json"
#: Raise it when converting changes.
FORMAT = 2


def is_converted(directory: Path, sha256: str) -> bool:
    """Whether `directory` is a finished, undamaged conversion of the GGUF file with this digest. Fast."""
    try:
        marker = json.loads((directory / MARKER).read_bytes())
        check_directory(directory)
        if (directory / BLOCKS).is_file():
            read_safetensors_header(directory / BLOCKS)
    except (OSError, ValueError, SessiondError):
        return False
    expected = {"source_sha256": sha256, "format": FORMAT, "blocks": (directory / BLOCKS).is_file()}
    return isinstance(marker, dict) and expected.items() <= marker.items()


def convert_gguf(source: Path, directory: Path, sha256: str) -> None:
    """Write bf16 safetensors, tokenizer, chat template, generation settings and own codes of `source` to `directory`.

    The directory appears whole or not at all (written beside its place, synced, renamed). The caller holds
    the lock on the model cache. Raises ModelCorrupt, ModelUnsupported, DependencyMissing.
    """
    check_gguf(source)
    for library in ("torch", "transformers"):
        if importlib.util.find_spec(library) is None:
            raise DependencyMissing(f"converting GGUF files needs {library}: pip install 'sessiond[server]'")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory.parent))
    try:
        _run_child(source, partial)
        marker = {
            "format": FORMAT,
            "source_sha256": sha256,
            "source_name": source.name,
            "blocks": (partial / BLOCKS).is_file(),
        }
        (partial / MARKER).write_text(json.dumps(marker), "utf-8")
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        shutil.rmtree(directory, ignore_errors=True)  # an unfinished or damaged predecessor
        partial.rename(directory)
        sync(directory.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _run_child(source: Path, directory: Path) -> None:
    command = [sys.executable, "-P", "-m", "sessiond.ggufconvert", str(source), str(directory)]
    child = subprocess.run(  # noqa: S603 - our own module, no shell
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if child.returncode == 0:
        return
    # The file passed check_gguf: what is left is metadata that makes no model, or a machine too small.
    lines = child.stderr.strip().splitlines() or ["no message"]
    reason = f"signal {-child.returncode}, out of memory?" if child.returncode < 0 else lines[-1]
    raise ModelCorrupt(f"{source} cannot be converted: {reason}", path=source)
