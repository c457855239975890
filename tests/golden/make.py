"""Write a golden data directory of this version: `python -P tests/golden/make.py`, once a release, and commit it.

A later version must open it, read from it what the JSON beside it says, and go on with its turns (test_golden.py).
The tokens are the fake model's (tests/faults/fake_model.py), so what a turn says next is known for ever.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "e2e"), str(HERE.parent / "faults")]

import lmdb  # noqa: E402
from fake_daemon import FakeDaemon  # noqa: E402
from golden_content import deleted, described, forked, held, labelled, suspended  # noqa: E402

from sessiond import tiers  # noqa: E402
from sessiond.storage.codec import Raw  # noqa: E402


async def write(root: Path) -> dict[str, Any]:
    """The directory; what it holds."""
    daemon = await FakeDaemon(root, detached_turn_seconds=0.0).start()
    first = await held(daemon, "talk", (40, 41, 42))
    await labelled(daemon, first)
    await forked(daemon, first)
    await deleted(daemon, await held(daemon, "deleted", (50,)))
    await suspended(daemon, await held(daemon, "suspended", (60, 61)))
    await daemon.stop()
    # The other codec: what the same KV is written with where elements are not worth coding.
    with mock.patch.object(tiers, "codec_for", return_value=Raw()):
        daemon = await FakeDaemon(root, detached_turn_seconds=0.0).start()
        await held(daemon, "raw", (70, 71))
        await daemon.stop()
    daemon = await FakeDaemon(root).start()
    content = described(daemon)
    await daemon.stop()
    return content


def packed(root: Path) -> bytes:
    """The directory as tar.xz: LMDB's files copied without their free pages, nothing that names this machine."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name in ("FORMAT", "catalog.sqlite3"):
            archive.add(root / name, name)
        for name in ("log", "blocks"):
            copy = root / f"{name}.copy"
            copy.mkdir()
            with lmdb.open(str(root / name), readonly=True, lib_version=0) as environment:
                environment.copy(str(copy), compact=True)
            archive.add(copy / "data.mdb", f"{name}/data.mdb")
    return buffer.getvalue()


def main() -> None:
    folder = HERE / version("sessiond")
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "data"
        content = asyncio.run(write(root))
        (folder / "data.tar.xz").write_bytes(packed(root))
    (folder / "content.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
