"""The asynchronous client: the methods of `client` as coroutines; keep the two alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Collection, Iterable
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, Unpack

import grpc

from sessiond.clients import connection, requests
from sessiond.clients.archive import ArchiveWriter
from sessiond.clients.async_session import AsyncSession
from sessiond.clients.connection import Connection
from sessiond.clients.errors import SessiondClientError, from_rpc_error
from sessiond.clients.events import Event
from sessiond.clients.messages import to_duration
from sessiond.clients.reader import TurnReader
from sessiond.clients.requests import CreateOptions, ImportOptions
from sessiond.clients.retry import Attempts, RetryRule
from sessiond.v1 import admin_pb2, admin_pb2_grpc, sessions_pb2, sessions_pb2_grpc

_Request = TypeVar("_Request", contravariant=True)
_Response = TypeVar("_Response", covariant=True)
_T = TypeVar("_T")


class _Unary(Protocol[_Request, _Response]):
    def __call__(
        self, request: _Request, /, *, timeout: float | None, metadata: tuple[tuple[str, str], ...]
    ) -> Awaitable[_Response]: ...


class AsyncClient:
    """Talks to one daemon; belongs to the event loop it is made in.

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
        self._channel = self._connection.open_async()
        self._sessions = sessions_pb2_grpc.SessionsStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; streams that are open end with CANCELLED, and their turns run on."""
        await self._channel.close()

    async def wait_ready(self, timeout: float = 60.0) -> None:  # noqa: ASYNC109 - as the synchronous client has it
        """Return once the server serves.

        Raises UnavailableError or DeadlineExceededError if it does not within about `timeout` seconds.
        """
        check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(connection.HEALTH_CHECK)
        attempts = Attempts(RetryRule(timeout, longest_delay=0.5))

        async def check_once() -> None:
            connection.check_health(await check(connection.HEALTH_REQUEST, timeout=timeout, metadata=self._metadata))

        await self._attempt(attempts, check_once)

    async def create_session(self, **options: Unpack[CreateOptions]) -> AsyncSession:
        """Make a session from `system` and `messages`, or from `token_ids`."""
        return AsyncSession(self, await self._call(self._sessions.CreateSession, requests.create_session(options)))

    async def session(self, session_id: str) -> AsyncSession:
        """The session of that id, as it is now."""
        request = sessions_pb2.GetSessionRequest(session_id=session_id)
        return AsyncSession(self, await self._call(self._sessions.GetSession, request))

    async def sessions(self, filter: str = "", *, show_deleted: bool = False) -> AsyncIterator[AsyncSession]:
        """All sessions that match, newest first; pages are fetched as they are needed."""
        request = sessions_pb2.ListSessionsRequest(filter=filter, show_deleted=show_deleted)
        while True:
            page = await self._call(self._sessions.ListSessions, request)
            for session in page.sessions:
                yield AsyncSession(self, session)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def import_session(
        self, archive: Iterable[bytes] | AsyncIterable[bytes], **options: Unpack[ImportOptions]
    ) -> sessions_pb2.ImportSessionResponse:
        """Make a session from an archive's bytes, in pieces of any size. Not retried: they are read once."""
        writer = ArchiveWriter(requests.import_header(options))

        async def parts() -> AsyncIterator[sessions_pb2.ImportSessionRequest]:
            yield writer.start()
            if isinstance(archive, AsyncIterable):
                async for piece in archive:
                    for part in writer.chunks(piece):
                        yield part
            else:
                for piece in archive:
                    for part in writer.chunks(piece):
                        yield part
            yield writer.finish()

        try:
            return await self._sessions.ImportSession(parts(), metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def server_info(self) -> admin_pb2.GetServerInfoResponse:
        return await self._call(self._admin.GetServerInfo, admin_pb2.GetServerInfoRequest())

    async def stats(self) -> admin_pb2.GetStatsResponse:
        return await self._call(self._admin.GetStats, admin_pb2.GetStatsRequest())

    def watch_stats(self, interval: float = 1.0) -> AsyncIterator[admin_pb2.GetStatsResponse]:
        """Stats every `interval` seconds, until the caller stops."""
        request = admin_pb2.WatchStatsRequest(interval=to_duration(interval))
        return self._stream(self._admin.WatchStats(request, metadata=self._metadata))

    def verify(
        self, session_ids: Iterable[str] = (), *, recompute: float = 0.0, seed: int = 0, repair: bool = False
    ) -> AsyncIterator[admin_pb2.VerifyStoreResponse]:
        """Check the store: findings and progress, the summary last."""
        request = admin_pb2.VerifyStoreRequest(session_ids=session_ids, recompute=recompute, seed=seed, repair=repair)
        return self._stream(self._admin.VerifyStore(request, metadata=self._metadata))

    async def compact(self, *, purge_deleted: bool = False) -> admin_pb2.CompactStoreResponse:
        """Give unused disk space back."""
        return await self._call(self._admin.CompactStore, admin_pb2.CompactStoreRequest(purge_deleted=purge_deleted))

    async def drain(self, grace: float | None = None) -> admin_pb2.DrainServerResponse:
        """Stop the daemon, after up to `grace` seconds for the running turns."""
        return await self._call(self._admin.DrainServer, admin_pb2.DrainServerRequest(grace=to_duration(grace)))

    async def _call(self, method: _Unary[_Request, _T], request: _Request) -> _T:
        """One unary call, retried by the rule."""
        timeout = self._connection.timeout
        attempts = Attempts(self._retry)
        return await self._attempt(attempts, lambda: method(request, timeout=timeout, metadata=self._metadata))

    async def _attempt(self, attempts: Attempts, action: Callable[[], Awaitable[_T]]) -> _T:
        while True:
            try:
                return await action()
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error)
            except SessiondClientError as client_error:
                error = client_error
            delay = attempts.delay_after(error)
            if delay is None:
                raise error
            await asyncio.sleep(delay)

    async def _stream(self, call: grpc.aio.UnaryStreamCall[Any, _T]) -> AsyncIterator[_T]:
        """The messages of a stream that is not retried; leaving it early cancels it."""
        try:
            async for message in call:
                yield message
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    async def _run_turn(self, reader: TurnReader) -> AsyncIterator[Event]:
        """Events of one turn, over as many streams as it takes; leaving early detaches from it."""
        attempts = Attempts(self._retry)
        while True:
            call = self._sessions.Generate(reader.next_request(), metadata=self._metadata)
            try:
                async for message in call:
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
            await asyncio.sleep(delay)
