"""What llama-server thinks of every next token of a text: one request a position, each a token longer than the last.

So each position but the first is computed as in decoding: one row, on the KV of those before it.
"""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

import torch
from _llama_process import LlamaProcess
from torch import Tensor


class LlamaServer(LlamaProcess):
    """One slot on the CPU alone; weights, KV (f16) and flash attention as its defaults have them."""

    def __init__(self, program: Path, gguf: Path, log: Path, threads: int, context: int) -> None:
        super().__init__(program, gguf, log, threads, 1, context, {"LD_LIBRARY_PATH": str(program.parent)})

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
