"""Every twin compiles for a GPU, also where there is none; the interpreter, which is laxer, says nothing of that."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'sessiond[gpu]'")

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
SHARED_BYTES = 99 * 1024  # of one program, on the GPUs with the least since Ampere


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the assembler that Triton brings is tried on x86-64 only")
def test_every_kernel_compiles_and_fits(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("triton_compile.py")), "128"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    shared = dict(line.split() for line in done.stdout.splitlines())
    assert max(map(int, shared.values())) <= SHARED_BYTES
    launched = {
        f"{path.stem}.{name}"
        for path in KERNELS.glob("triton_*.py")
        for name in re.findall(r"(_\w+)\[\(", path.read_text("utf-8"))
    }
    assert launched == shared.keys()
