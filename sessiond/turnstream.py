"""A turn's events on their way to its clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from sessiond.errors import SessiondError
from sessiond.restoring import Restoration
from sessiond.turnevents import Accepted, Finished, Tokens, TurnEvent


class TurnStream:
    """The events of one turn from its beginning, for any number of clients, none of which it needs.

    Who sets a field calls `wake` afterwards. `came` is called when a client begins to listen, `left` when the last one
    has gone.
    """

    def __init__(self, came: Callable[[], None], left: Callable[[], None]) -> None:
        self.accepted: Accepted | None = None
        self.restored: Restoration | None = None
        self.tokens: list[Tokens] = []
        self.finished: Finished | None = None
        self.failure: SessiondError | None = None
        self._came = came
        self._left = left
        self._listeners: set[asyncio.Event] = set()

    @property
    def over(self) -> bool:
        return self.finished is not None or self.failure is not None

    def leave(self) -> None:
        """A client has gone, or never came to listen to the turn it asked for."""
        if not self._listeners:
            self._left()

    def wake(self) -> None:
        for listener in self._listeners:
            listener.set()

    async def events(self, resume_after: int, attachment: str) -> AsyncIterator[TurnEvent]:
        """All events for one client, tokens from index `resume_after` on. Raises what the turn failed with."""
        wake = asyncio.Event()
        self._listeners.add(wake)
        self._came()
        try:
            sent_accepted = sent_restored = False
            position = 0
            while True:
                wake.clear()
                if self.accepted and not sent_accepted:
                    sent_accepted = True
                    yield replace(self.accepted, attachment=attachment)
                if self.restored and sent_accepted and not sent_restored:
                    sent_restored = True
                    yield self.restored
                while position < len(self.tokens):
                    tokens = self.tokens[position]
                    position += 1
                    if tokens.first_index >= resume_after:
                        yield tokens
                if self.failure:
                    raise self.failure
                if self.finished:
                    yield self.finished
                    return
                if position == len(self.tokens):
                    await wake.wait()
        finally:
            self._listeners.discard(wake)
            self.leave()
