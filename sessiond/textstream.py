"""Text of a growing answer, in deltas that are never wrong later: no half characters, nothing that may become a stop string.

Each token is decoded together with the few before it, because a token's text depends on its left neighbour in most
tokenizers (the prefix-offset method of Hugging Face's text-generation-inference).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

CONTEXT_TOKENS = 6


@dataclass(frozen=True, slots=True)
class Delta:
    """Text to show, and where it starts in the answer, in UTF-8 bytes."""

    text: str
    byte_offset: int


@dataclass(frozen=True, slots=True)
class StopHit:
    """A stop string was completed: `n_whole_tokens` tokens lie wholly before it; `visible_rest` is the text between."""

    stop: str
    n_whole_tokens: int
    visible_rest: str


class TextStream:
    """Incremental `decode(ids)`; the deltas joined are the text of all tokens (up to the stop string, if one is hit)."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._read = 0  # tokens whose text is in _text
        self._text = ""  # all complete text so far
        self._starts: list[int] = []  # characters of _text before each token
        self._shown = 0  # characters given out
        self._shown_bytes = 0
        self.stopped: StopHit | None = None

    def push(self, token: int) -> Delta:
        """Take the next token; returns what may be shown now."""
        assert self.stopped is None, "nothing follows a stop string"
        self._ids.append(token)
        self._starts.append(len(self._text))
        fresh = self._pending()
        if not fresh or fresh.endswith("\ufffd"):
            return self._show(len(self._text) - self._held())
        return self._take(fresh)

    def flush(self) -> Delta:
        """Everything held back: no more tokens follow."""
        fresh = self._pending() if self.stopped is None else ""
        if fresh:
            self._read = len(self._ids)
            self._text += fresh
        return self._show(len(self._text))

    def _pending(self) -> str:
        """Text of the tokens not yet read, decoded after their left neighbours."""
        first = max(0, self._read - CONTEXT_TOKENS)
        before = self._decode(self._ids[first : self._read])
        after = self._decode(self._ids[first:])
        return after[len(before) :]

    def _take(self, fresh: str) -> Delta:
        searched = max(0, len(self._text) - max(map(len, self._stop), default=1) + 1)
        self._text += fresh
        self._read = len(self._ids)
        hits = [(self._text.find(stop, searched), stop) for stop in self._stop]
        found = min(((at, stop) for at, stop in hits if at >= 0), default=None)
        if found is None:
            return self._show(len(self._text) - self._held())
        at, stop = found
        ends = [*self._starts[1:], len(self._text)]
        whole = next((i for i, end in enumerate(ends) if end > at), len(ends))
        begin = self._starts[whole] if whole < len(self._starts) else at
        self.stopped = StopHit(stop, whole, self._text[begin:at])
        self._text = self._text[:at]
        return self._show(at)

    def _held(self) -> int:
        """Characters at the end that may still become a stop string."""
        longest = 0
        for stop in self._stop:
            for n in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:n]):
                    longest = n
                    break
        return longest

    def _show(self, upto: int) -> Delta:
        text = self._text[self._shown : upto] if upto > self._shown else ""
        delta = Delta(text, self._shown_bytes)
        self._shown += len(text)
        self._shown_bytes += len(text.encode("utf-8"))
        return delta
