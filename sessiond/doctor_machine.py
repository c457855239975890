"""What the machine and its Python installation offer."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from sessiond.doctor_check import Check, Verdict, show_bytes
from sessiond.kernels.native_library import BUILT, ISA, LEVELS

MIN_PYTHON = (3, 11)
#: Earlier builds can corrupt a WAL when two connections write or checkpoint at once.
MIN_SQLITE = (3, 51, 3)
_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def check_python() -> Iterator[Check]:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < MIN_PYTHON:
        yield Check("python", Verdict.FAIL, version, "use Python 3.11 or later")
    elif sys.platform == "win32":
        yield Check("python", Verdict.FAIL, f"{version} on Windows", "run the daemon on Linux or macOS (or in WSL)")
    else:
        yield Check("python", Verdict.OK, f"{version}, {sys.executable}")


def check_libraries() -> Iterator[Check]:
    """Installed versions against the lower bounds in the package's own metadata."""
    wrong = []
    bounds = lower_bounds(importlib.metadata.requires("sessiond") or [], "server")
    for name, bound in bounds.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if _numbers(version) < _numbers(bound):
            wrong.append(f"{name} {version} is older than {bound}")
    if wrong:
        yield Check("libraries", Verdict.FAIL, "; ".join(wrong), "pip install --upgrade 'sessiond[server]'")
        return
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "grpcio"))
    yield Check("libraries", Verdict.OK, f"{len(bounds)} in order ({shown})")


def lower_bounds(requirements: list[str], extra: str) -> dict[str, str]:
    """Name -> lowest version, of the base requirements and those of `extra` that apply to this platform."""
    bounds = {}
    for requirement in requirements:
        specification, _, marker = requirement.partition(";")
        wanted = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        platform = re.search(r"sys_platform\s*==\s*['\"]([^'\"]+)", marker)
        if (wanted and wanted[1] != extra) or (platform and platform[1] != sys.platform):
            continue
        parsed = re.match(r"\s*([\w.-]+)(?:\[[^]]*\])?\s*\(?>=\s*([\w.]+)", specification)
        if parsed:
            bounds[parsed[1]] = parsed[2]
    return bounds


def check_sqlite() -> Iterator[Check]:
    """The SQLite build that the catalog will use."""
    try:
        if sys.platform == "linux":
            from pysqlite3 import dbapi2
        else:
            from sqlite3 import dbapi2
    except ImportError as error:
        yield Check("sqlite", Verdict.FAIL, f"{error.name} is missing", "pip install 'sessiond[server]'")
        return
    version = str(dbapi2.sqlite_version)
    if _numbers(version) < MIN_SQLITE:
        wanted = ".".join(map(str, MIN_SQLITE))
        mend = f"use a build of {wanted} or later (older ones can corrupt the database), or PostgreSQL"
        yield Check("sqlite", Verdict.FAIL, version, mend)
    else:
        yield Check("sqlite", Verdict.OK, version)


def check_cpu(threads: int, cpuinfo: Path = Path("/proc/cpuinfo")) -> Iterator[Check]:
    """Instruction sets that the kernels can use, and cores for the threads asked for."""
    text = ""
    with contextlib.suppress(OSError):
        text = cpuinfo.read_text()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    has = [feature for feature in _CPU_FEATURES if flags and feature in flags[1].split()]
    if flags and not has:
        mend = "it works, slowly: a CPU with AVX2 or better is many times faster"
        yield Check("cpu", Verdict.WARN, "no vector instructions that the kernels use", mend)
    else:
        yield Check("cpu", Verdict.OK, " ".join(has) or "instruction sets not known on this system")
    cores = usable_cores()
    if threads > cores:
        mend = f"set --threads {cores}: more threads than cores slow every step down"
        yield Check("threads", Verdict.WARN, f"{threads} threads on {cores} usable cores", mend)
    else:
        yield Check("threads", Verdict.OK, f"{threads} on {cores} usable cores")


def check_kernels() -> Iterator[Check]:
    """Whether the compiled kernels are there and this processor runs them."""
    if not BUILT:
        mend = "install a C compiler, then sessiond again: without its kernels it computes with torch, slower"
        yield Check("kernels", Verdict.WARN, "not compiled", mend)
    else:
        yield Check("kernels", Verdict.OK, f"compiled; this processor runs them at level {LEVELS[ISA]}")


def usable_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores this process may run on: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = cpu_max.read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))  # "max" is no number: no quota
    return cores


def check_memory(budget_bytes: int) -> Iterator[Check]:
    """Physical memory against the budget for state."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{show_bytes(total)}, of which {show_bytes(budget_bytes)} for state"
    if budget_bytes > total * 0.8:
        yield Check("memory", Verdict.WARN, found, f"set --memory-budget-bytes below {int(total * 0.8)}")
    else:
        yield Check("memory", Verdict.OK, found)


def _numbers(version: str) -> tuple[int, ...]:
    """The release part of a version."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:  # 3.0 is 3
        numbers.pop()
    return tuple(numbers)
