"""A llama-server that runs while a `with` block lasts: started, waited for until it answers, and killed."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

START_LIMIT_S = 60.0
_PORT = re.compile(r"listening on \S*?:(\d+)")


def environment() -> dict[str, str]:
    """Ours without what points python at our code, and without our threads' spin count: its defaults are its own."""
    foreign = ("PYTHONPATH", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    return {name: value for name, value in os.environ.items() if name not in foreign}


class LlamaProcess:
    """On the CPU alone, at a free port, with `n_slots` of `slot_tokens` in all; else with its defaults."""

    def __init__(
        self, program: Path, gguf: Path, log: Path, threads: int, n_slots: int, slot_tokens: int, more: dict[str, str]
    ) -> None:
        """`more`: of its environment."""
        size = ["-t", str(threads), "-np", str(n_slots), "-c", str(n_slots * slot_tokens)]
        alone = ["--device", "none", "-ngl", "0", "--offline", "--no-webui", "--cache-ram", "0"]
        where = ["--host", "127.0.0.1", "--port", "0"]
        self._command: Sequence[str] = [str(program), "-m", str(gguf), *size, *alone, *where]
        self._environment = environment() | more
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self._environment
            )
        try:
            self._wait_ready(time.perf_counter() + START_LIMIT_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _wait_ready(self, deadline: float) -> None:
        assert self._process is not None
        while time.perf_counter() < deadline:
            found = _PORT.search(self._log.read_text(errors="replace"))
            if found:
                self._port = int(found.group(1))
                if self._is_healthy():
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
        raise RuntimeError(f"llama-server did not start:\n{tail}")

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except ConnectionError:
            return False
        finally:
            connection.close()
