"""The synchronous client. `async_client` has the same methods as coroutines; keep the two alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

import grpc

from sessiond.clients import connection, requests
from sessiond.clients.archive import ArchiveWriter
from sessiond.clients.connection import Connection
from sessiond.clients.errors import SessiondClientError, from_rpc_error
from sessiond.clients.events import Event
from sessiond.clients.messages import to_duration
from sessiond.clients.reader import TurnReader
from sessiond.clients.requests import CreateOptions, ImportOptions
from sessiond.clients.retry import Attempts, RetryRule
from sessiond.clients.session import Session
from sessiond.v1 import admin_pb2, admin_pb2_grpc, sessions_pb2, sessions_pb2_grpc

_Request = TypeVar("_Request", contravariant=True)
_Response = TypeVar("_Response", covariant=True)
_T = TypeVar("_T")


class _Unary(Protocol[_Request, _Response]):
    def __call__(
        self, request: _Request, /, *, timeout: float | None, metadata: tuple[tuple[str, str], ...]
    ) -> _Response: ...


class _Stream(Protocol[_Response]):
    def __iter__(self) -> Iterator[_Response]: ...

    def cancel(self) -> object: ...


class Client:
    """Talks to one daemon; safe to share between threads.

    Calls raise a SessiondClientError. UNAVAILABLE is retried for `retry_seconds` after the last progress;
    the codes in `retry_codes` too, where the server says after what time. See Connection for the rest.
    """

    def __init__(
        self,
        target: str = "localhost:7431",
        *,
        token: str | None = None,
        tenant: str | None = None,
        tls: bool = False,
        root_certificates: bytes | None = None,
        certificate: bytes | None = None,
        private_key: bytes | None = None,
        timeout: float | None = None,
        retry_seconds: float = 60.0,
        retry_codes: Collection[grpc.StatusCode] = (),
    ) -> None:
        self._connection = Connection(target, token, tenant, tls, root_certificates, certificate, private_key, timeout)
        self._metadata = self._connection.metadata()
        self._retry = RetryRule(retry_seconds, retry_codes)
        self._channel = self._connection.open()
        self._sessions = sessions_pb2_grpc.SessionsStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; streams that are open end with CANCELLED, and their turns run on."""
        self._channel.close()

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Return once the server serves.

        Raises UnavailableError or DeadlineExceededError if it does not within about `timeout` seconds.
        """
        check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(connection.HEALTH_CHECK)
        attempts = Attempts(RetryRule(timeout, longest_delay=0.5))
        self._attempt(
            attempts,
            lambda: connection.check_health(check(connection.HEALTH_REQUEST, timeout=timeout, metadata=self._metadata)),
        )

    def create_session(self, **options: Unpack[CreateOptions]) -> Session:
        """Make a session from `system` and `messages`, or from `token_ids`."""
        return Session(self, self._call(self._sessions.CreateSession, requests.create_session(options)))

    def session(self, session_id: str) -> Session:
        """The session of that id, as it is now."""
        request = sessions_pb2.GetSessionRequest(session_id=session_id)
        return Session(self, self._call(self._sessions.GetSession, request))

    def sessions(self, filter: str = "", *, show_deleted: bool = False) -> Iterator[Session]:
        """All sessions that match, newest first; pages are fetched as they are needed."""
        request = sessions_pb2.ListSessionsRequest(filter=filter, show_deleted=show_deleted)
        while True:
            page = self._call(self._sessions.ListSessions, request)
            for session in page.sessions:
                yield Session(self, session)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def import_session(
        self, archive: Iterable[bytes], **options: Unpack[ImportOptions]
    ) -> sessions_pb2.ImportSessionResponse:
        """Make a session from an archive's bytes, in pieces of any size. Not retried: they are read once."""
        writer = ArchiveWriter(requests.import_header(options))

        def parts() -> Iterator[sessions_pb2.ImportSessionRequest]:
            yield writer.start()
            for piece in archive:
                yield from writer.chunks(piece)
            yield writer.finish()

        try:
            return self._sessions.ImportSession(parts(), metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def server_info(self) -> admin_pb2.GetServerInfoResponse:
        return self._call(self._admin.GetServerInfo, admin_pb2.GetServerInfoRequest())

    def stats(self) -> admin_pb2.GetStatsResponse:
        return self._call(self._admin.GetStats, admin_pb2.GetStatsRequest())

    def watch_stats(self, interval: float = 1.0) -> Iterator[admin_pb2.GetStatsResponse]:
        """Stats every `interval` seconds, until the caller stops."""
        request = admin_pb2.WatchStatsRequest(interval=to_duration(interval))
        return self._stream(self._admin.WatchStats(request, metadata=self._metadata))

    def verify(
        self, session_ids: Iterable[str] = (), *, recompute: float = 0.0, seed: int = 0, repair: bool = False
    ) -> Iterator[admin_pb2.VerifyStoreResponse]:
        """Check the store: findings and progress, the summary last."""
        request = admin_pb2.VerifyStoreRequest(session_ids=session_ids, recompute=recompute, seed=seed, repair=repair)
        return self._stream(self._admin.VerifyStore(request, metadata=self._metadata))

    def compact(self, *, purge_deleted: bool = False) -> admin_pb2.CompactStoreResponse:
        """Give unused disk space back."""
        return self._call(self._admin.CompactStore, admin_pb2.CompactStoreRequest(purge_deleted=purge_deleted))

    def drain(self, grace: float | None = None) -> admin_pb2.DrainServerResponse:
        """Stop the daemon, after up to `grace` seconds for the running turns."""
        return self._call(self._admin.DrainServer, admin_pb2.DrainServerRequest(grace=to_duration(grace)))

    def _call(self, method: _Unary[_Request, _T], request: _Request) -> _T:
        """One unary call, retried by the rule."""
        timeout = self._connection.timeout
        attempts = Attempts(self._retry)
        return self._attempt(attempts, lambda: method(request, timeout=timeout, metadata=self._metadata))

    def _attempt(self, attempts: Attempts, action: Callable[[], _T]) -> _T:
        while True:
            try:
                return action()
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error)
            except SessiondClientError as client_error:
                error = client_error
            delay = attempts.delay_after(error)
            if delay is None:
                raise error
            time.sleep(delay)

    def _stream(self, call: _Stream[_T]) -> Iterator[_T]:
        """The messages of a stream that is not retried; leaving it early cancels it."""
        try:
            yield from call
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    def _run_turn(self, reader: TurnReader) -> Iterator[Event]:
        """Events of one turn, over as many streams as it takes; leaving early detaches from it."""
        attempts = Attempts(self._retry)
        while True:
            call = self._sessions.Generate(reader.next_request(), metadata=self._metadata)
            try:
                for message in call:
                    event = reader.receive(message)
                    if event is not None:
                        yield event
                reader.end_of_stream()
                return
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error)
            except SessiondClientError as client_error:
                error = client_error
            finally:
                call.cancel()
            if reader.done:
                return  # committed: how the stream ended no longer matters
            if reader.progressed:
                attempts.progress()
            delay = attempts.delay_after(error)
            if delay is None:
                raise error
            time.sleep(delay)
