"""System calls that fail: failing_calls.c, built when first needed and loaded before every fault run."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from outcome import Unavailable

SOURCE = Path(__file__).with_name("failing_calls.c")
BUILT = Path(__file__).resolve().parents[2] / ".cache" / "faults"
CALLS = {"write": 1, "sync": 2, "open": 3, "mmap": 4}


def preload() -> dict[str, str]:
    """Environment of a process whose system calls can be made to fail; empty where that cannot be."""
    try:
        return {"LD_PRELOAD": str(library())}
    except Unavailable:
        return {}


def library() -> Path:
    """The compiled library. Raises Unavailable without Linux or a C compiler."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        raise Unavailable("failing system calls need Linux and a C compiler (cc)")
    BUILT.mkdir(parents=True, exist_ok=True)
    path = BUILT / f"failing_calls-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    with (BUILT / "lock").open("w") as lock:  # several chunks may start at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(".partial")
            command = [compiler, "-O1", "-fPIC", "-shared", "-Wall", "-o", str(partial), str(SOURCE), "-ldl"]
            subprocess.run(command, check=True)
            os.replace(partial, path)
    return path


class Faults:
    """Control of the loaded library, in this process."""

    def __init__(self) -> None:
        if "LD_PRELOAD" not in os.environ:
            library()  # says why it is not loaded
            raise Unavailable("failing system calls need LD_PRELOAD")
        self._lib = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._lib.fault_seen.restype = self._lib.fault_hits.restype = ctypes.c_long

    def arm(self, root: Path, call: str, k: int, error: int, *, persist: bool, report: int) -> None:
        """See failing_calls.c. `error` 0 is a short write."""
        self._lib.fault_arm(
            os.fsencode(root), CALLS[call], ctypes.c_long(k), error, int(persist), report
        )  # fmt: skip

    def disarm(self) -> None:
        self._lib.fault_arm(b"", 0, ctypes.c_long(0), 0, 0, -1)

    @property
    def seen(self) -> int:
        return int(self._lib.fault_seen())

    @property
    def hits(self) -> int:
        return int(self._lib.fault_hits())
