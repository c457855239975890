"""What `generate` yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from sessiond.v1 import sessions_pb2

Kind = Literal["accepted", "restored", "token", "finished", "failed"]


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a turn; `proto` is the whole of it, without what an earlier event already gave."""

    proto: sessions_pb2.TurnEvent

    @property
    def kind(self) -> Kind:
        return cast(Kind, self.proto.WhichOneof("event"))

    @property
    def text(self) -> str:
        """The text this event adds to the answer; "" for all but token events, and for some of those."""
        return self.proto.token.text

    @property
    def token_ids(self) -> list[int]:
        """The generated tokens this event adds; [] for all but token events."""
        return list(self.proto.token.token_ids)

    def __str__(self) -> str:
        return self.text
