"""Both clients against a server that breaks: the asynchronous one runs through the same tests."""

from __future__ import annotations

import asyncio
import inspect
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from fake_server import TEXT, FakeServer, Turn, make_status, random_breaks, serve

from sessiond.clients import (
    AbortedError,
    AsyncClient,
    AsyncSession,
    Client,
    FailedPreconditionError,
    NotFoundError,
    ResourceExhaustedError,
    Session,
    UnavailableError,
    retry,
)
from sessiond.v1 import sessions_pb2, types_pb2


class Blocking:
    """Drives an asynchronous object as if it were synchronous."""

    def __init__(self, runner: asyncio.Runner, target: Any) -> None:
        self._runner = runner
        self._target = target

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        return self._wrap_call(value) if callable(value) else value

    def _wrap_call(self, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._resolve(method(*args, **kwargs))

        return call

    def _resolve(self, value: Any) -> Any:
        if inspect.isasyncgen(value):
            return self._iterate(value)
        if inspect.isawaitable(value):
            value = self._runner.run(self._wait(value))
        return Blocking(self._runner, value) if isinstance(value, AsyncSession) else value

    def _iterate(self, generator: Any) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._resolve(self._runner.run(self._wait(anext(generator))))
                except StopAsyncIteration:
                    return
        finally:
            self._runner.run(self._wait(generator.aclose()))

    @staticmethod
    async def _wait(awaitable: Any) -> Any:
        return await awaitable


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Any]:
    """`connect(address, **arguments)` makes a client of either kind."""
    if request.param == "sync":
        clients: list[Any] = []

        def connect_sync(address: str, **arguments: Any) -> Client:
            clients.append(Client(address, **arguments))
            return clients[-1]

        yield connect_sync
        for client in clients:
            client.close()
        return
    with asyncio.Runner() as runner:
        opened: list[Any] = []

        async def make(address: str, arguments: dict[str, Any]) -> AsyncClient:
            return AsyncClient(address, **arguments)

        def connect_async(address: str, **arguments: Any) -> Blocking:
            opened.append(Blocking(runner, runner.run(make(address, arguments))))
            return opened[-1]

        yield connect_async
        for client in opened:
            client.close()


@pytest.fixture
def address(server: FakeServer) -> Iterator[str]:
    with serve(server) as address:
        yield address


@pytest.fixture
def client(connect: Any, address: str) -> Any:
    return connect(address)


def test_a_turn_reads_as_in_the_documentation(client: Any) -> None:
    session = client.create_session(system="You are terse.")
    text = "".join(event.text for event in session.generate("My cat is called Zorblax."))
    assert text == TEXT
    assert session.head == "r1"
    assert session.fork().id == "fork"
    session.rollback(to=session.revisions()[0])
    assert session.head == "r0"


@pytest.mark.parametrize("by_event", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_a_broken_turn_is_reassembled_exactly_once(server: FakeServer, client: Any, seed: int, by_event: bool) -> None:
    server.breaks = random_breaks(seed, 8)
    server.rewind = seed
    server.by_event = by_event
    events = list(client.session("s1").generate("hi", temperature=0.5))
    assert "".join(event.text for event in events) == TEXT
    assert [i for event in events for i in event.token_ids] == list(range(len(Turn().tokens)))
    assert [event.kind for event in events].count("accepted") == 1
    assert events[-1].kind == "finished"
    assert len(server.generate_requests) > 1
    assert len({request.request_id for request in server.generate_requests}) == 1


def test_a_turn_outlives_its_server(connect: Any) -> None:
    dying = FakeServer()
    cut = threading.Event()

    def hang(request: sessions_pb2.GenerateRequest) -> Iterator[sessions_pb2.TurnEvent]:
        yield from list(Turn().events(0))[:9]
        cut.wait(10)

    dying.replay = hang
    with ExitStack() as first:
        address = first.enter_context(serve(dying))
        stream = connect(address).session("s1").generate("hi")
        texts = [next(stream).text for _ in range(9)]
        first.close()
    cut.set()
    with serve(FakeServer(), port=int(address.rpartition(":")[2])):
        texts += [event.text for event in stream]
    assert "".join(texts) == TEXT


def test_text_left_out_by_the_server_is_fetched_again(server: FakeServer, client: Any) -> None:
    def skip_once(request: sessions_pb2.GenerateRequest) -> Iterator[sessions_pb2.TurnEvent]:
        events = list(Turn().events(request.resume_after_tokens))
        return iter(events if len(server.generate_requests) > 1 else events[:3] + events[4:])

    server.replay = skip_once
    assert "".join(event.text for event in client.session("s1").generate("hi")) == TEXT
    assert [request.resume_after_tokens for request in server.generate_requests] == [0, 0]


def test_a_finished_turn_stays_finished_when_its_stream_breaks(server: FakeServer, client: Any) -> None:
    def break_late(request: sessions_pb2.GenerateRequest) -> Iterator[sessions_pb2.TurnEvent]:
        yield from Turn("done").events(0)
        raise RuntimeError("after the end")

    server.replay = break_late
    assert "".join(event.text for event in client.session("s1").generate("hi")) == "done"


def test_retrying_ends_after_the_limit(server: FakeServer, connect: Any, address: str) -> None:
    server.breaks = [3] * 1000
    server.replay = lambda request: Turn().events(0)
    client = connect(address, retry_seconds=0.05)
    seen = []
    with pytest.raises(UnavailableError) as caught:
        seen.extend(event.text for event in client.session("s1").generate("hi"))
    assert caught.value.reason == "DRAINING"


def test_the_limit_counts_from_the_last_progress(
    server: FakeServer, connect: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One outage fits the limit; two that counted as one would not.
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.015)
    server.breaks = [4] * 5
    session = connect(address, retry_seconds=0.02).session("s1")
    assert "".join(event.text for event in session.generate("hi")) == TEXT


def test_other_errors_are_typed_and_not_retried(server: FakeServer, client: Any) -> None:
    session = client.session("s1")
    server.refusals = [make_status(grpc.StatusCode.ABORTED, "SESSION_BUSY", retry_after=0.25, session="s1")]
    with pytest.raises(AbortedError) as caught:
        list(session.generate("hi"))
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "SESSION_BUSY")
    assert (error.metadata, error.retry_after) == ({"session": "s1"}, 0.25)
    assert error.message == "because SESSION_BUSY"
    assert len(server.generate_requests) == 1


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND", NotFoundError),
        (grpc.StatusCode.FAILED_PRECONDITION, "IDENTITY_MISMATCH", FailedPreconditionError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA", ResourceExhaustedError),
    ],
)
def test_unary_errors_are_typed(
    server: FakeServer, client: Any, code: grpc.StatusCode, reason: str, expected: type[Exception]
) -> None:
    server.refusals = [make_status(code, reason)]
    with pytest.raises(expected, match=reason):
        client.session("s1")


def test_unary_calls_come_back_after_unavailable_with_the_same_id(server: FakeServer, client: Any) -> None:
    server.refusals = [make_status(grpc.StatusCode.UNAVAILABLE, "STARTING")] * 2
    client.create_session(system="a")
    assert len(server.requests) == 3
    assert len({request.request_id for request in server.requests}) == 1  # type: ignore[attr-defined]


def test_other_codes_are_retried_if_configured(server: FakeServer, connect: Any, address: str) -> None:
    client = connect(address, retry_codes=[grpc.StatusCode.RESOURCE_EXHAUSTED])
    server.refusals = [make_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "MEMORY_BUDGET", retry_after=0.01)]
    assert client.session("s1").id == "s1"


def test_leaving_a_turn_early_detaches_from_it(server: FakeServer, client: Any) -> None:
    stream = client.session("s1").generate("hi")
    assert next(stream).kind == "accepted"
    stream.close()
    assert server.detached.wait(5)


def test_token_and_tenant_travel_as_metadata(server: FakeServer, connect: Any, address: str) -> None:
    client = connect(address, token="secret", tenant="acme")
    client.server_info()
    assert server.metadata["authorization"] == "Bearer secret"
    assert server.metadata["sessiond-tenant"] == "acme"


def test_listing_fetches_every_page(server: FakeServer, client: Any) -> None:
    assert [session.id for session in client.sessions("state = ACTIVE")] == ["s0", "s1", "s2", "s3", "s4"]
    assert [request.filter for request in server.requests] == ["state = ACTIVE"] * 3  # type: ignore[attr-defined]


def test_every_other_call_reaches_its_rpc(server: FakeServer, client: Any) -> None:
    session = client.session("s1")
    assert session.refresh().id == "s1"
    session.update(labels={"a": "b"})
    assert dict(session.proto.labels) == {"a": "b"}
    assert session.abort("q", commit=True).stopped
    assert session.revision("r7").revision_id == "r7"
    assert session.count_tokens("hi").tokens == 1
    assert [turn.revision_id for turn in session.explain()] == ["r1"]
    session.warm()
    assert session.proto.tier == types_pb2.TIER_HOT
    session.suspend()
    assert session.proto.tier == types_pb2.TIER_COLD
    session.delete()
    assert session.proto.state == types_pb2.SESSION_STATE_DELETED
    session.undelete()
    assert session.proto.state == types_pb2.SESSION_STATE_ACTIVE
    assert session.delete(purge_now=True).freed_bytes == 7
    assert client.server_info().version == "test"
    assert client.stats().turns_running == 1
    assert [stats.turns_running for stats in client.watch_stats()] == [0, 1, 2]
    assert [answer.summary.records for answer in client.verify()] == [1]
    assert client.compact().records_erased == 1
    assert client.drain(grace=5).turns_finished == 1


def test_an_archive_goes_out_and_in(server: FakeServer, client: Any) -> None:
    server.archive = bytes(range(256)) * 10_000
    pieces = list(client.session("s1").export())
    whole = server.archive
    assert b"".join(pieces) == whole
    server.archive = b""
    assert client.import_session(pieces, labels={"a": "b"}).session.session_id == "s2"
    assert server.archive == whole


def test_wait_ready_waits_for_serving(connect: Any) -> None:
    with serve(FakeServer(), not_yet=3) as address:
        connect(address).wait_ready(10)


def test_wait_ready_gives_up(connect: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        client = connect(f"localhost:{unused.getsockname()[1]}")
        with pytest.raises(UnavailableError):
            client.wait_ready(0.2)


def test_a_context_manager_closes_the_client(address: str) -> None:
    with Client(address) as client:
        client.stats()
    with pytest.raises(ValueError, match="closed"):
        client.stats()


async def test_an_async_context_manager_closes_the_client(address: str) -> None:
    async with AsyncClient(address) as client:
        await client.stats()


@pytest.mark.parametrize(("one", "other"), [(Client, AsyncClient), (Session, AsyncSession)])
def test_both_clients_have_the_same_surface(one: type, other: type) -> None:
    def surface(cls: type) -> dict[str, list[str]]:
        members = inspect.getmembers(cls, lambda member: callable(member) or isinstance(member, property))
        return {
            name: list(inspect.signature(member).parameters) if callable(member) else []
            for name, member in members
            if not name.startswith("_")
        }

    assert surface(one) == surface(other)
    assert len(surface(one)) >= 10


def test_importing_the_client_loads_nothing_of_the_daemon() -> None:
    heavy = ["torch", "transformers", "numpy", "lmdb", "sqlalchemy", "pydantic", "typer", "structlog"]
    program = (
        "import sys, sessiond.clients\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
        "print([n for n in sys.modules if n.startswith('sessiond.')"
        " and not n.startswith(('sessiond.clients', 'sessiond.v1'))])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "[]"]
