"""What every measurement needs: medians and spreads, the machine described, a folder on a disk, the last line."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from sessiond.cli_serve import SPIN_COUNT

MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})


def median(values: Sequence[float]) -> float:
    """Raises ValueError if there are none: a figure that was not measured is not printed."""
    if not values:
        raise ValueError("nothing was measured")
    return statistics.median(values)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles (inclusive), extremes and number of `values`, rounded for printing."""
    low, high = (values[0], values[0]) if len(values) == 1 else _quartiles(values)
    return {
        "median": rounded(median(values)),
        "q1": rounded(low),
        "q3": rounded(high),
        "min": rounded(min(values)),
        "max": rounded(max(values)),
        "n": len(values),
    }


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Ratios of pairs that were measured next to each other. Raises ValueError if the two do not pair up."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def alternating(repeat: int) -> bool:
    """Whether the first of a pair runs first in this repeat: ABBA, so that a drift of the machine cancels."""
    return repeat % 2 == 0


def agreeing_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens agree before the first that differs."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


class Neighbours:
    """How much of the machine others used since it was made. Children count as ours once they have been waited for."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._busy, self._own = busy_seconds(), _own_seconds()

    def share(self) -> float | None:
        """Share of all cores' time, in [0, 1]; None where /proc/stat is not."""
        busy = busy_seconds()
        if busy is None or self._busy is None:
            return None
        others = (busy - self._busy) - (_own_seconds() - self._own)
        return round(max(0.0, others) / (time.perf_counter() - self._began) / (os.cpu_count() or 1), 3)


def busy_seconds(stat: str | None = None) -> float | None:
    """Seconds that all cores together spent on anything since boot, also on other guests (steal)."""
    if stat is None:
        table = Path("/proc/stat")
        if not table.is_file():
            return None
        stat = table.read_text()
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    """Processor, cores, load and versions: a speed without these says nothing."""
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "grpcio", "lmdb", "blosc2", "sessiond")},
    }


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


class Conditions:
    """Under what a measurement ran: made right before it, told right after it."""

    def __init__(self, folder: Path) -> None:
        self._file_system = file_system(folder)
        self._machine = machine()
        self._neighbours = Neighbours()

    def told(self) -> dict[str, Any]:
        """The part of the JSON object that holds them."""
        return {
            "others_cpu_share": self._neighbours.share(),
            "file_system": self._file_system,
            "date": today(),
            "machine": self._machine,
        }


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser that describes itself by the first line of a script's `__doc__` and knows --model."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    return parser


@contextlib.contextmanager
def data_folder(purpose: str, out: Console, remark: str = "") -> Iterator[Path]:
    """A `disk_folder` for data directories. Says where it is and on what, and `remark`; SIGTERM removes it too."""
    exit_on_sigterm()
    with disk_folder(f"sessiond-{purpose}-") as name:
        out.print(f"data in {name}, on {file_system(Path(name))}{remark}")
        yield Path(name)


def disk_folder(prefix: str) -> tempfile.TemporaryDirectory[str]:
    """A temporary directory on a disk file system: in the system's place for these, else in ~/.cache.

    Raises RuntimeError if both are in memory: what is read back from there was never on a disk.
    """
    for parent in (Path(tempfile.gettempdir()), Path.home() / ".cache", Path.cwd()):
        if file_system(parent) not in MEMORY_FILE_SYSTEMS:
            parent.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
    raise RuntimeError("no disk file system for temporary files: set TMPDIR to a folder on one")


def file_system(path: Path, mounts: str | None = None) -> str:
    """Type of the file system that holds `path`, which need not exist yet; "unknown" where /proc/mounts is not."""
    if mounts is None:
        table = Path("/proc/mounts")
        if not table.is_file():
            return "unknown"
        mounts = table.read_text(errors="replace")
    path = path.resolve()
    best, kind = -1, "unknown"
    for line in mounts.splitlines():
        where, what = line.split()[1:3]
        point = Path(where.replace("\\040", " "))
        # Of two mounts on one point the later one is seen.
        if (path == point or point in path.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), what
    return kind


def run_script(name: str, *arguments: str) -> dict[str, Any]:
    """Run a script beside this one and return the JSON object of its last line. Raises RuntimeError if it fails."""
    command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            process.terminate()  # unlike a kill, lets it clean up
            process.wait()
            raise
    if process.returncode != 0:
        raise RuntimeError(f"{name} failed with status {process.returncode}")
    found: dict[str, Any] = json.loads(output.strip().rpartition("\n")[2])
    return found


def spin_as_the_daemon() -> None:
    """Have torch's threads in this process wait for each other as those of `sessiond serve` do, by its SPIN_COUNT.

    libgomp reads it when torch is loaded, so unless it is set the script is run again from the start: call this first.
    As with the daemon, GOMP_SPINCOUNT and OMP_WAIT_POLICY of the user win.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "GOMP_SPINCOUNT": SPIN_COUNT})


def print_json(result: dict[str, Any]) -> None:
    """The last line. Nothing is printed after it."""
    sys.stdout.flush()
    print(json.dumps(result, separators=(",", ":")), flush=True)


def console() -> Console:
    """Where tables and progress go: as wide as the terminal, and wide enough for any table in a file."""
    plain = Console(highlight=False, soft_wrap=True)
    return plain if plain.is_terminal else Console(highlight=False, soft_wrap=True, width=140)


def exit_on_sigterm() -> None:
    """Let SIGTERM unwind the stack, as Ctrl-C does, so that daemons and folders are cleaned up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
