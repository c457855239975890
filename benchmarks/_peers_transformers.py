"""transformers in a process of its own (transformers_peer.py), asked by lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from _contender import Stream


class TransformersPeer:
    """One prompt is decoded by `generate` on its cache, several by `generate_batch`, which shares what it computed."""

    name = "transformers"

    def __init__(self, path: Path, threads: int) -> None:
        self._command = [sys.executable, str(Path(__file__).with_name("transformers_peer.py")), str(path), str(threads)]
        self._process: subprocess.Popen[str] | None = None
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **offline}
        )
        self.facts = self._answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def pids(self) -> list[int]:
        assert self._process is not None
        return [self._process.pid]

    def prefill(self, ids: list[int]) -> Stream:
        return self._ask(do="prefill", ids=ids)[0]

    def hold(self, prompts: dict[int, list[int]]) -> None:
        self._ask(do="hold", prompts={str(number): ids for number, ids in prompts.items()})

    def decode(self, numbers: Sequence[int], n_tokens: int) -> list[Stream]:
        return self._ask(do="decode", numbers=list(numbers), n_tokens=n_tokens)

    def release(self) -> None:
        self._ask(do="release")

    def _ask(self, **order: Any) -> list[Stream]:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return [
            Stream(found["began"], [(at, n) for at, n in found["arrivals"]], found["token_ids"])
            for found in self._answer()["streams"]
        ]

    def _answer(self) -> dict[str, Any]:
        """Its next line. Raises RuntimeError if the process ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"transformers' process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer
