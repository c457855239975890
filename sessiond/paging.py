"""Sizes and tokens of the pages of ListSessions."""

from __future__ import annotations

from blake3 import blake3

from sessiond.errors import BadRequest, InvalidPageToken
from sessiond.storage.catalog import Listed


def page_length(asked: int) -> int:
    """How many entries a page has: 100 unless told, at most 1000. Raises BadRequest."""
    if asked < 0:
        raise BadRequest("page_size must not be negative", field="page_size")
    return min(asked or 100, 1000)


def format_page_token(last: Listed, query: str) -> str:
    """Where a page ended, with a digest that ties it to its query."""
    place = f"{last.created_us}:{last.session_id}"
    return f"{place}:{blake3(f'{query}:{place}'.encode()).hexdigest(8)}"


def parse_page_token(token: str, query: str) -> Listed:
    """The inverse of `format_page_token`. Raises InvalidPageToken."""
    created, _, rest = token.partition(":")
    session_id = rest.partition(":")[0]
    place = Listed(int(created) if created.isascii() and created.isdigit() else 0, session_id)
    if format_page_token(place, query) != token:
        raise InvalidPageToken("page_token was not issued by ListSessions for this query")
    return place
