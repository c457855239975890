"""TurnReader alone, on scripted messages."""

import grpc
import pytest
from fake_server import TEXT, Turn, make_status
from hypothesis import given, settings
from hypothesis import strategies as st

from sessiond.clients import AbortedError, ProtocolError, UnavailableError
from sessiond.clients.events import Event
from sessiond.clients.reader import TurnReader
from sessiond.v1 import sessions_pb2


def token(index: int, offset: int, ids: list[int], text: str) -> sessions_pb2.TurnEvent:
    part = sessions_pb2.Tokens(first_token_index=index, text_offset=offset, token_ids=ids, text=text)
    return sessions_pb2.TurnEvent(token=part)


def make_reader(resume_after_tokens: int = 0) -> TurnReader:
    return TurnReader(sessions_pb2.GenerateRequest(request_id="q", resume_after_tokens=resume_after_tokens))


def new_text(reader: TurnReader, message: sessions_pb2.TurnEvent) -> str:
    event = reader.receive(message)
    return "" if event is None else event.text


@settings(max_examples=200, deadline=None)
@given(
    breaks=st.lists(st.integers(0, 20), max_size=8),
    batches=st.lists(st.integers(1, 7), min_size=9, max_size=9),
    rewinds=st.lists(st.integers(0, 9), min_size=9, max_size=9),
)
def test_broken_streams_join_to_the_whole_turn(breaks: list[int], batches: list[int], rewinds: list[int]) -> None:
    reader = make_reader()
    events: list[Event] = []
    for limit, batch, rewind in zip([*breaks, None], batches, rewinds, strict=False):
        start = max(0, reader.next_request().resume_after_tokens - rewind)
        for message in list(Turn(batch=batch).events(start))[:limit]:
            event = reader.receive(message)
            if event is not None:
                events.append(event)
        if reader.done:
            break
    assert "".join(event.text for event in events) == TEXT
    ids = [token_id for event in events for token_id in event.token_ids]
    assert ids == list(range(len(Turn().tokens)))
    assert [p.token_id for event in events for p in event.proto.token.logprobs] == ids
    kinds = [event.kind for event in events]
    assert kinds.count("accepted") == kinds.count("finished") == 1
    assert kinds[-1] == "finished"


def test_tokens_whose_text_is_held_back_are_asked_for_again() -> None:
    reader = make_reader()
    reader.receive(token(0, 0, [1, 2], "ab"))
    reader.receive(token(2, 2, [3], ""))
    assert reader.next_request().resume_after_tokens == 2
    event = reader.receive(token(2, 2, [3, 4], "cd"))
    assert event is not None
    assert (event.text, event.token_ids, event.proto.token.first_token_index) == ("cd", [4], 3)


def test_known_text_is_cut_at_its_byte_not_its_character() -> None:
    reader = make_reader()
    assert new_text(reader, token(0, 0, [1], "é")) == "é"
    assert new_text(reader, token(0, 0, [1, 2], "é🦊")) == "🦊"


def test_text_without_tokens_is_new() -> None:
    reader = make_reader()
    reader.receive(token(0, 0, [1], ""))
    assert new_text(reader, token(1, 0, [], "late")) == "late"


def test_a_gap_starts_over_once_then_is_an_error() -> None:
    reader = make_reader()
    reader.receive(token(0, 0, [1], "a"))
    with pytest.raises(UnavailableError, match="STREAM_GAP"):
        reader.receive(token(1, 5, [2], "z"))
    assert reader.next_request().resume_after_tokens == 0
    assert new_text(reader, token(0, 0, [1, 2], "ab")) == "b"
    with pytest.raises(ProtocolError):
        reader.receive(token(7, 2, [8], "z"))


def test_a_turn_begun_elsewhere_starts_where_the_server_says() -> None:
    reader = make_reader(resume_after_tokens=5)
    assert new_text(reader, token(5, 40, [6], "on")) == "on"
    assert reader.next_request().resume_after_tokens == 6
    assert new_text(reader, token(5, 40, [6, 7], "on we")) == " we"


def test_a_split_character_is_an_error() -> None:
    reader = make_reader()
    reader.receive(token(0, 0, [1], "a"))
    with pytest.raises(ProtocolError):
        reader.receive(token(0, 0, [1], "🦊"))


def test_failed_raises_its_status() -> None:
    status = make_status(grpc.StatusCode.ABORTED, "TURN_SUSPENDED", request_id="q9")
    with pytest.raises(AbortedError) as caught:
        make_reader().receive(sessions_pb2.TurnEvent(failed=sessions_pb2.Failed(status=status)))
    assert (caught.value.reason, caught.value.metadata) == ("TURN_SUSPENDED", {"request_id": "q9"})


def test_an_unknown_event_is_skipped() -> None:
    assert make_reader().receive(sessions_pb2.TurnEvent(sequence=3)) is None


def test_a_stream_needs_a_terminal_event_and_nothing_after_it() -> None:
    reader = make_reader()
    with pytest.raises(ProtocolError):
        reader.end_of_stream()
    reader.receive(sessions_pb2.TurnEvent(finished=sessions_pb2.Finished()))
    reader.end_of_stream()
    with pytest.raises(ProtocolError):
        reader.receive(token(0, 0, [1], "a"))
