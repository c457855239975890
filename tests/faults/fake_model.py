"""A model without arithmetic: the next token is a pure hash of all tokens before it, read out of the KV it wrote.

So what any run must say is known without a second run (`Pure`), and one wrong bit of KV, wherever it lies, changes it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from e2e_model import CONTEXT, LETTERS, STOP
from torch import Tensor

from sessiond.cache import SessionCache
from sessiond.model import Feed
from sessiond.policies.base import ModelFacts
from sessiond.types import KVShape, Span

SHAPE = KVShape(n_layers=2, n_kv_heads=1, head_dim=4, dtype="float32")
VOCAB = 261  # as the tiny chat model's tokenizer has
_FIRST_BYTE = 3  # its ids stand for bytes, from this one on
SPOKEN = [ord(letter) + _FIRST_BYTE for letter in LETTERS]
_MASK = (1 << 64) - 1


def _mixed(value: int) -> int:
    """splitmix64 (Steele, Lea and Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _row(state: int) -> list[int]:
    """The KV of a position: two layers of K and V, four 32-bit words each. The first two words are the state."""
    words, more = [state & 0xFFFFFFFF, state >> 32], state
    while len(words) < 16:
        more = _mixed(more)
        words += [more & 0xFFFFFFFF, more >> 32]
    return words


def _token(total: int) -> int:
    """Mostly a letter, now and then the end of the answer."""
    drawn = _mixed(total)
    return STOP if drawn % 48 == 0 else SPOKEN[(drawn >> 8) % len(SPOKEN)]


class Pure:
    """What the model says, from tokens alone."""

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self._state = 0
        self.total = 0
        for token in ids:
            self.feed(token)

    def feed(self, token: int) -> None:
        self._state = _mixed(self._state ^ (token + 1))
        self.total = (self.total + sum(_row(self._state))) & _MASK

    def answer(self, max_tokens: int) -> list[int]:
        """The tokens of an answer, its end token included."""
        out: list[int] = []
        while len(out) < max_tokens and STOP not in out:
            out.append(_token(self.total))
            self.feed(out[-1])
        return out


def text_of(ids: Sequence[int]) -> str:
    """What an answer reads as; its end token shows nothing."""
    return "".join(chr(token - _FIRST_BYTE) for token in ids if token != STOP)


def answer_to(ids: Sequence[int], max_tokens: int) -> list[int]:
    return Pure(ids).answer(max_tokens)


class FakeModel:
    """In the place of sessiond.model.Model."""

    def __init__(self, step_seconds: float = 0.0) -> None:
        self.step_seconds = step_seconds
        self.vocab_size = VOCAB
        self.max_context = CONTEXT
        self.shape = SHAPE
        self.facts = ModelFacts(SHAPE.n_layers, SHAPE.n_kv_heads, SHAPE.head_dim, tuple(range(SHAPE.n_layers)), CONTEXT)
        self.rope = self.sliding_window = None
        self.eos_ids = (STOP,)
        self.invariant_rows = 1
        self._left: int | None = None  # tokens that may still be sampled; None: any number
        self._let = threading.Condition()

    def hold(self, n_tokens: int) -> None:
        """Let the model say so many tokens; its next step that says one then waits for `release`. Sealing goes on."""
        self._left = n_tokens

    def release(self) -> None:
        with self._let:
            self._left = None
            self._let.notify_all()

    def new_cache(self) -> SessionCache:
        return SessionCache(self.shape, self.max_context)

    def numerics_profile(self, threads: int) -> dict[str, str]:
        return {"layers": "fake", "attention": "fake", "threads": str(threads)}

    def warm_up(self, cell_tokens: int) -> None:
        """Nothing is cold."""

    def step(self, feeds: Sequence[Feed], logit_rows: Sequence[int]) -> Tensor:
        """As Model.step: KV of all feeds into their caches, logits [len(logit_rows), V]."""
        logits = self.begin(feeds, logit_rows).advance()
        assert logits is not None
        return logits

    def begin(self, feeds: Sequence[Feed], logit_rows: Sequence[int]) -> FakeStep:
        """As Model.begin."""
        return FakeStep(self, feeds, logit_rows)

    def wait_for(self, n_tokens: int) -> None:
        """Until so many tokens may be said, and for as long as a step takes."""
        with self._let:
            self._let.wait_for(lambda: not n_tokens or self._left is None or self._left > 0)
            if self._left is not None:
                self._left -= n_tokens
        time.sleep(self.step_seconds)


class FakeStep:
    """As ForwardStep: rests between its two layers."""

    def __init__(self, model: FakeModel, feeds: Sequence[Feed], logit_rows: Sequence[int]) -> None:
        self._model, self._feeds, self._logit_rows = model, feeds, logit_rows
        self._rested = False
        self._kv: list[Tensor] = []  # of each feed: [2, 2, 1, n, 4]

    def advance(self, enough: Callable[[], bool] | None = None) -> Tensor | None:
        if not self._rested:
            self._kv = [_kv_of(feed) for feed in self._feeds]
            self._write(0)
            self._rested = True
            if enough is not None and enough():
                return None
        self._model.wait_for(len(self._logit_rows))
        self._write(1)
        ends = [(feed.cache, feed.position + at + 1) for feed in self._feeds for at in range(len(feed.ids))]
        logits = torch.zeros(len(self._logit_rows), VOCAB)
        for at, row in enumerate(self._logit_rows):
            logits[at, _token(total_of(*ends[row]))] = 1.0
        return logits

    def _write(self, layer: int) -> None:
        for feed, kv in zip(self._feeds, self._kv, strict=True):
            feed.cache.write(layer, feed.position, kv[layer, 0], kv[layer, 1])


def _kv_of(feed: Feed) -> Tensor:
    state, rows = _state_before(feed.cache, feed.position), []
    for token in feed.ids:
        state = _mixed(state ^ (token + 1))
        rows.append(np.array(_row(state), np.uint32).view(np.float32).reshape(2, 2, 1, 1, 4))
    return torch.from_numpy(np.concatenate(rows, 3))


def _state_before(cache: SessionCache, position: int) -> int:
    if position == 0:
        return 0
    low, high = _words(cache, 0, 0, position - 1, position)[:2].tolist()
    return int(low | high << 32)


def total_of(cache: SessionCache, length: int) -> int:
    """Sum of every word of KV below `length`: what the next token is a hash of."""
    parts = [_words(cache, layer, part, 0, length).sum(dtype=np.uint64) for layer in range(2) for part in range(2)]
    return int(sum(int(part) for part in parts)) & _MASK


def _words(cache: SessionCache, layer: int, part: int, start: int, end: int) -> Any:
    return cache.array(layer, part, Span(start, end)).reshape(-1)
