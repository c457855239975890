"""What llama-server thinks of every next token of a text: one request a position, each a token longer than the last.

So each position but the first is computed as in decoding: one row, on the KV of those before it.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

START_LIMIT_S = 60.0
_PORT = re.compile(r"listening on \S*?:(\d+)")


class LlamaServer:
    """One slot on the CPU alone; weights, KV (f16) and flash attention as its defaults have them."""

    def __init__(self, program: Path, gguf: Path, log: Path, threads: int, context: int) -> None:
        alone = ["--device", "none", "-ngl", "0", "--offline", "--no-webui", "--cache-ram", "0"]
        size = ["-t", str(threads), "-np", "1", "-c", str(context)]
        where = ["--host", "127.0.0.1", "--port", "0"]
        self._command = [str(program), "-m", str(gguf), *size, *alone, *where]
        self._log = log
        foreign = ("PYTHONPATH", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        self._environment = {name: value for name, value in os.environ.items() if name not in foreign}
        self._environment["LD_LIBRARY_PATH"] = str(program.parent)

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
        self._process.kill()
        self._process.wait()

    def probabilities(self, ids: list[int], first: int, n_probs: int) -> tuple[Tensor, Tensor]:
        """Of what follows ids[: first + 1], ids[: first + 2] and so on: the `n_probs` likeliest tokens, and the
        logarithms of their probabilities among all tokens, both [len(ids) - first, n_probs]."""
        rows = []
        for end in range(first + 1, len(ids) + 1):
            found = self._next(ids[:end], n_probs)
            if rows and found["timings"]["prompt_n"] != 1:
                raise RuntimeError(f"llama-server computed {found['timings']['prompt_n']} tokens of a prompt it held")
            rows.append([(one["id"], one["logprob"]) for one in found["completion_probabilities"][0]["top_logprobs"]])
            if len(rows[-1]) != n_probs:
                raise RuntimeError(f"llama-server told {len(rows[-1])} probabilities of {n_probs}")
        tokens, logarithms = torch.tensor(rows, dtype=torch.float64).unbind(-1)
        return tokens.long(), logarithms

    def _next(self, ids: list[int], n_probs: int) -> dict[str, Any]:
        asked = {"prompt": ids, "n_predict": 1, "n_probs": n_probs, "cache_prompt": True}
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request("POST", "/completion", json.dumps(asked), {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"llama-server: {response.status} {data[:500]!r}")
        found: dict[str, Any] = json.loads(data)
        return found

    def _wait_ready(self, deadline: float) -> None:
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
