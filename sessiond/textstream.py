"""Generated tokens to text as they come: whole characters only, and nothing that may still become a stop string.

Text is decoded in a short window behind the newest token, so a token costs O(window), and tokenizers that look at a
token's left neighbour (SentencePiece's leading space) see one. This is the "prefix offset, read offset" scheme of
text-generation-inference and vLLM, with byte runs and stop strings made exact:

    window   [ prefix: shown already, context only | read: not yet a whole character or a settled byte run ]
    text     [ given out | held: may become a stop string | unsettled ]
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

REPLACEMENT = "\ufffd"
# An unfinished UTF-8 character is at most 3 bytes, hence at most 3 tokens; what lies 4 tokens back is settled.
_SETTLED_TOKENS = 4
_MAX_WINDOW_TOKENS = 32


class AddedToken(Protocol):
    @property
    def special(self) -> bool: ...


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]: ...
    def get_vocab(self) -> dict[str, int]: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


class Detokenizer:
    """A tokenizer's decoding side, made once a model: which ids are never shown and which are single bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.special = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        # SentencePiece's byte fallback spells one byte a token. Its decoder reads a run of them together and
        # turns all of it into replacement characters if any of it is malformed, so a run counts only at its end.
        byte = re.compile(r"<0x[0-9A-Fa-f]{2}>")
        self.bytes = frozenset(
            i for piece, i in tokenizer.get_vocab().items() if byte.fullmatch(piece) and self.decode([i]) != piece
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out, spaces untouched."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


@dataclass(frozen=True, slots=True)
class Delta:
    """Text to give out now (often empty); `byte_offset`: UTF-8 bytes of the turn's text given out before it."""

    text: str
    byte_offset: int


@dataclass(frozen=True, slots=True)
class StopHit:
    """Where a stop string fell.

    Of the turn's pushed tokens, the first `n_whole_tokens` lie wholly before it. `visible_rest` is the text after
    those and before the stop string: given out, hence to be re-encoded and remembered. Decoding the whole tokens
    and appending `visible_rest` is exactly what the user saw.
    """

    stop: str
    n_whole_tokens: int
    visible_rest: str


class _Matcher:
    """One stop string over a stream of characters: Knuth, Morris and Pratt's automaton, O(1) a character."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0  # length of the longest prefix of `stop` that ends the text so far
        self._fallback = [0] * len(stop)
        for i in range(1, len(stop)):
            j = self._fallback[i - 1]
            while j and stop[i] != stop[j]:
                j = self._fallback[j - 1]
            self._fallback[i] = j + (stop[i] == stop[j])

    def push(self, char: str) -> bool:
        """Whether the text now ends with the stop string. Not to be called again after True."""
        j = self.matched
        while j and self.stop[j] != char:
            j = self._fallback[j - 1]
        self.matched = j + (self.stop[j] == char)
        return self.matched == len(self.stop)


class TextStream:
    """The text of one turn's generated tokens.

    Without a stop, all deltas and `flush` together are exactly `decode` of all pushed ids. With one, they are the
    text before the stop string that is completed first (of those completed by the same character, the longest),
    whatever the tokens' borders. `context`: ids right before the first pushed one when the turn goes on with an
    earlier answer; the text is then what they add to it. Pushing the same ids again gives the same deltas.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        assert all(stop), "an empty stop string"
        self._detokenizer = detokenizer
        self._matchers = [_Matcher(text) for text in dict.fromkeys(stop)]
        self.stopped: StopHit | None = None
        self.n_tokens = 0
        self._n_bytes = 0
        self._in_bytes = False
        # window = prefix + read; `_n_seen` characters of its decoding have been passed to `_accept`.
        self._window = [i for i in context if i not in detokenizer.special][-_MAX_WINDOW_TOKENS:]
        self._n_prefix = len(self._window)
        self._n_seen = len(self._settled(detokenizer.decode(self._window))) if self._window else 0
        # Characters [base, base + len(text)) of the turn's text: from the last whole token given out onwards.
        # `_borders`: (n_tokens, character) where text and tokens end together; the first stands at `base`.
        self._base = 0
        self._text = ""
        self._n_given = 0
        self._borders: deque[tuple[int, int]] = deque([(0, 0)])

    def push(self, token_id: int) -> Delta:
        """Take the next generated token; afterwards look at `stopped`. With byte-fallback tokenizers a stop
        string that ends in byte tokens is seen with the first other token, or by `flush`."""
        assert self.stopped is None, "the turn has ended"
        if token_id in self._detokenizer.special:
            # Neither shown nor part of the decoder's input, so it does not end a byte run either.
            at_border = not self._in_bytes and self._borders[-1][0] == self.n_tokens
            self.n_tokens += 1
            if at_border:
                self._mark_border(self.n_tokens)
            return self._give(self._releasable())
        if token_id in self._detokenizer.bytes:
            self._in_bytes = True
            self._window.append(token_id)
            self.n_tokens += 1
            return self._give(self._releasable())
        if self._in_bytes:
            self._in_bytes = False
            self._read()
        if self.stopped is None:
            self._window.append(token_id)
            self.n_tokens += 1
            self._read()
        return self._give(self._releasable())

    def flush(self) -> Delta:
        """The turn has ended: give out what was held, an unfinished character as U+FFFD. May find a stop."""
        if self.stopped is None:
            self._accept(self._detokenizer.decode(self._window)[self._n_seen :] if self._window else "")
            self._window.clear()
            self._n_seen = 0
        return self._give(self._end() if self.stopped is None else self._releasable())

    @staticmethod
    def _settled(text: str) -> str:
        # Decoders write an unfinished character at the end as one U+FFFD.
        return text[:-1] if text.endswith(REPLACEMENT) else text

    def _read(self) -> None:
        """Decode the window, accept what is new and settled in it, and move the window if it ends cleanly."""
        text = self._detokenizer.decode(self._window)
        settled = self._settled(text)
        is_new = len(settled) > self._n_seen
        self._accept(settled[self._n_seen :])
        self._n_seen = max(self._n_seen, len(settled))
        if len(settled) == len(text):
            self._mark_border(self.n_tokens)
            # The next prefix must have text of its own, else a decoder strips the space of the token after it.
            if is_new:
                del self._window[: self._n_prefix]
                self._n_prefix = len(self._window)
                self._n_seen = len(self._detokenizer.decode(self._window))
        elif len(self._window) > _MAX_WINDOW_TOKENS:
            self._cut(text)

    def _cut(self, text: str) -> None:
        """Shorten a window of malformed bytes: its last tokens decode to the same end of the text."""
        last = self._window[-2 * _SETTLED_TOKENS :]
        tail = self._detokenizer.decode(last)
        if text.endswith(tail):
            self._window = last
            self._n_prefix = 0
            self._n_seen = len(self._settled(tail))

    def _mark_border(self, n_tokens: int) -> None:
        if self.stopped is None:
            self._borders.append((n_tokens, self._end()))

    def _end(self) -> int:
        return self._base + len(self._text)

    def _accept(self, text: str) -> None:
        """Settled text enters; sets `stopped` at the first character that completes a stop string."""
        if self.stopped is not None:
            return
        start = self._end()
        self._text += text
        if not self._matchers:
            return
        for place, char in enumerate(text, start + 1):
            hits = [matcher.stop for matcher in self._matchers if matcher.push(char)]
            if hits:
                self._stop(max(hits, key=len), place)
                return

    def _stop(self, stop: str, end: int) -> None:
        begin = end - len(stop)
        n_tokens, border = [entry for entry in self._borders if entry[1] <= begin][-1]
        rest = self._text[border - self._base : begin - self._base]
        self._text = self._text[: begin - self._base]
        self.stopped = StopHit(stop, n_tokens, rest)

    def _releasable(self) -> int:
        """Character up to which text may be given out."""
        if self.stopped is not None:
            return self._end()
        return self._end() - max((matcher.matched for matcher in self._matchers), default=0)

    def _give(self, end: int) -> Delta:
        text = self._text[self._n_given - self._base : end - self._base]
        delta = Delta(text, self._n_bytes)
        self._n_bytes += len(text.encode())
        self._n_given = end
        # No later stop string begins before `end`: keep one border at or before it, and the text from there.
        while len(self._borders) > 1 and self._borders[1][1] <= end:
            self._borders.popleft()
        self._text = self._text[self._borders[0][1] - self._base :]
        self._base = self._borders[0][1]
        return delta
