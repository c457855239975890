"""A daemon as users run it: `sessiond serve` in a process of its own, to be stopped or killed at will."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from sessiond.clients import Client

START_LIMIT_S = 120.0
STOP_LIMIT_S = 60.0
_SERVING = re.compile(r"serving\b.*?\baddress\W+127\.0\.0\.1:(\d+)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class DaemonProcess:
    """Starts on entry, on a free port; dies on exit however it comes about.

    `start_seconds`: from starting the process to the first RPC that succeeded, the health check.
    The address is read from the daemon's log, which lies beside `data_dir`.
    """

    def __init__(self, data_dir: Path, *flags: str, model: str = "smollm2") -> None:
        self.data_dir = data_dir
        self.start_seconds = 0.0
        self.port = 0
        self._log = data_dir.with_name(f"{data_dir.name}.log")
        options = ["--model", model, "--data-dir", str(data_dir), "--listen", "127.0.0.1:0"]
        self._command = [*_program(), "serve", *options, *flags]
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: list[Client] = []

    def __enter__(self) -> Self:
        began = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=_environment()
            )
        try:
            self.port = self._wait_for_port(began + START_LIMIT_S)
            self.client().wait_ready()
        except BaseException:
            self.kill()
            raise
        self.start_seconds = time.perf_counter() - began
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def client(self, tenant: str | None = None) -> Client:
        """A client with a channel of its own; closed with the daemon. Tenants need --trust-tenant-metadata."""
        # A call that was lost is not tried again: a measurement must fail rather than hide a retry.
        client = Client(f"127.0.0.1:{self.port}", tenant=tenant, retry_seconds=0.0)
        self._clients.append(client)
        return client

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL: it can write nothing more. No-op if it has ended."""
        self._close_clients()
        if self._process and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def terminate(self) -> None:
        """SIGTERM, and wait for it to drain. Raises RuntimeError if it does not end well."""
        self._close_clients()
        assert self._process is not None
        self._process.terminate()
        status = self._process.wait(STOP_LIMIT_S)
        if status != 0:
            raise RuntimeError(f"the daemon ended with status {status}:\n{self._tail()}")

    def _close_clients(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()

    def _wait_for_port(self, deadline: float) -> int:
        assert self._process is not None
        while time.perf_counter() < deadline:
            port = port_in_log(self._log.read_text(errors="replace"))
            if port:
                return port
            if self._process.poll() is not None:
                raise RuntimeError(f"the daemon ended with status {self._process.returncode}:\n{self._tail()}")
            time.sleep(0.01)
        raise RuntimeError(f"the daemon did not start within {START_LIMIT_S:.0f} s:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])


def port_in_log(text: str) -> int:
    """The port that a daemon says it serves on; 0 if it does not say so yet."""
    found = _SERVING.search(_COLOUR.sub("", text))
    return int(found.group(1)) if found else 0


def copy_data(source: Path, target: Path) -> Path:
    """Copy the data directory of a stopped daemon and wait until the copy is on disk. Lock files stay behind."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("lock", "lock.mdb"))
    for file in target.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    return target


def drop_page_cache(folder: Path) -> None:
    """Ask the system to forget the pages of a stopped daemon's files, so that they are read from disk again."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _program() -> list[str]:
    """The installed command of this very environment."""
    script = Path(sysconfig.get_path("scripts")) / "sessiond"
    return [str(script)] if script.is_file() else [sys.executable, "-c", "from sessiond.cli import main; main()"]


def _environment() -> dict[str, str]:
    """This process's environment without settings of a daemon; the model cache stays where it is."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SESSIOND_") or k == "SESSIOND_CACHE"}
    return {**kept, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
