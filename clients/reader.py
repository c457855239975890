"""Follows one turn across as many streams as it takes. No input or output of its own: both clients drive it.

    reader = TurnReader(request)
    while not reader.done:
        for message in <open a stream with reader.next_request()>:
            event = reader.receive(message)      # None: nothing new in it
        reader.end_of_stream()

Text lags behind tokens, because half a character or a possible stop string is held back. So both are counted:

    tokens  0 ........ resume .... tokens        received; after `resume` none brought text
    bytes   0 ................ text_end          of text given to the caller

After an outage the next stream starts at token `resume`; what it repeats below `tokens` and `text_end` is
cut off.
"""

from __future__ import annotations

from sessiond.clients.errors import ProtocolError, UnavailableError, from_status
from sessiond.clients.events import Event
from sessiond.v1 import sessions_pb2


class TurnReader:
    """Turns the streams of one request into each event once."""

    def __init__(self, request: sessions_pb2.GenerateRequest) -> None:
        self._request = sessions_pb2.GenerateRequest()
        self._request.CopyFrom(request)
        self._first = request.resume_after_tokens
        self._resume = self._first
        self._tokens = self._first
        # Where a turn resumed by another process stands in the text, only the server can say.
        self._text_end: int | None = None if self._first else 0
        self._accepted = False
        self._gaps = 0
        self.done = False
        self.progressed = False

    def next_request(self) -> sessions_pb2.GenerateRequest:
        """The request that opens the next stream; `progressed` counts from here."""
        request = sessions_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        request.resume_after_tokens = self._resume
        self.progressed = False
        return request

    def receive(self, message: sessions_pb2.TurnEvent) -> Event | None:
        """What is new in `message`, or None.

        Raises the typed error of `failed`; UnavailableError (STREAM_GAP) once if the server left something
        out, and ProtocolError if it does so again or breaks the contract otherwise.
        """
        if self.done:
            raise ProtocolError("an event came after the terminal one")
        kind = message.WhichOneof("event")
        if kind is None:
            return None  # from a newer server
        if kind == "failed":
            raise from_status(message.failed.status)
        if kind == "token":
            return self._receive_tokens(message)
        if kind == "accepted":
            first, self._accepted = not self._accepted, True
            self.progressed |= first
            return Event(message) if first else None
        if kind == "finished":
            self.done = True
        return Event(message)

    def end_of_stream(self) -> None:
        """The stream ended with OK. Raises ProtocolError if it had no terminal event."""
        if not self.done:
            raise ProtocolError("the stream ended without a terminal event")

    def _receive_tokens(self, message: sessions_pb2.TurnEvent) -> Event | None:
        part = message.token
        text = part.text.encode()
        if self._text_end is None:
            self._text_end = part.text_offset
        if part.first_token_index > self._tokens or part.text_offset > self._text_end:
            self._report_gap(part)
        known_tokens = self._tokens - part.first_token_index
        known_bytes = self._text_end - part.text_offset
        self._tokens = max(self._tokens, part.first_token_index + len(part.token_ids))
        self._text_end = max(self._text_end, part.text_offset + len(text))
        if text:
            self._resume = self._tokens
        if known_tokens >= len(part.token_ids) and known_bytes >= len(text):
            return None
        self.progressed = True
        if known_tokens == 0 and known_bytes == 0:
            return Event(message)
        return Event(_without_known(message, known_tokens, known_bytes))

    def _report_gap(self, part: sessions_pb2.Tokens) -> None:
        self._gaps += 1
        self._resume = self._first
        where = (
            f"event at token {part.first_token_index}, byte {part.text_offset}; "
            f"received {self._tokens} tokens, {self._text_end} bytes"
        )
        if self._gaps > 1:
            raise ProtocolError(f"the server left out part of the turn: {where}")
        raise UnavailableError(f"part of the turn is missing: {where}", reason="STREAM_GAP")


def _without_known(message: sessions_pb2.TurnEvent, known_tokens: int, known_bytes: int) -> sessions_pb2.TurnEvent:
    """A copy without its first tokens and bytes of text."""
    copy = sessions_pb2.TurnEvent()
    copy.CopyFrom(message)
    part = copy.token
    skip_tokens = min(known_tokens, len(part.token_ids))
    text = part.text.encode()
    skip_bytes = min(known_bytes, len(text))
    try:
        part.text = text[skip_bytes:].decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("the server split a character") from error
    part.text_offset += skip_bytes
    part.first_token_index += skip_tokens
    del part.token_ids[:skip_tokens]
    del part.logprobs[:skip_tokens]
    return copy
