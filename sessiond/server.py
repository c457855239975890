"""The daemon's life: open everything, serve, drain. The one place where errors become gRPC statuses."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import structlog
import torch
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from sessiond import modelidentity, modelstore, wireout
from sessiond.adminservice import AdminService
from sessiond.auth import Principals
from sessiond.care import Care
from sessiond.config import Settings
from sessiond.conversation import Conversations
from sessiond.desk import Desk
from sessiond.engine import Engine
from sessiond.errors import BadMessage, InvalidConfig, SessiondError, UnsafeAddress
from sessiond.foreignsessions import foreign_sessions
from sessiond.keeper import Keeper
from sessiond.metrics import serve_metrics
from sessiond.model import Model, load_tokenizer
from sessiond.service import SessionsService
from sessiond.sessions import Sessions
from sessiond.stepevents import Event
from sessiond.storage.batch import LogBatch
from sessiond.storage.store import Store
from sessiond.template import ChatTemplate
from sessiond.tiers import Tiers
from sessiond.v1 import admin_pb2, sessions_pb2
from sessiond.v1.admin_pb2_grpc import add_AdminServicer_to_server
from sessiond.v1.sessions_pb2_grpc import add_SessionsServicer_to_server

log = structlog.get_logger()

MAX_MESSAGE_BYTES = 64 << 20
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Clients ping every 30 s; gRPC's default lets them ping only every 5 minutes.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps the error tree to statuses. Anything else is a bug: logged whole, told as INTERNAL."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    async def finish(self) -> None:
        """Return once the calls whose clients have gone are over."""
        if self._running:
            await asyncio.wait(self._running)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/sessiond."):
            return handler
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary
        # Decoding happens inside, so that bytes that are no request get a typed error too.
        decode = _decode_each if handler.request_streaming else _decode
        decode = functools.partial(decode, handler.request_deserializer)
        wrapped = _stream(inner, decode) if handler.response_streaming else _unary(inner, decode, self._running)
        return make(wrapped, None, handler.response_serializer)


def _decode(deserializer: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        return deserializer(raw)
    except DecodeError as error:
        raise BadMessage("the request is not valid protobuf; its text must be UTF-8") from error


async def _decode_each(deserializer: Callable[[bytes], Any], raws: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for raw in raws:
        yield _decode(deserializer, raw)


def _unary(
    inner: Callable[..., Any], decode: Callable[[Any], Any], running: set[asyncio.Task[Any]]
) -> Callable[..., Any]:
    async def call(raw: Any, context: Any) -> Any:
        try:
            # A client that goes away must not leave half of what it asked for: the call runs to its end without it.
            task = asyncio.create_task(inner(decode(raw), context))
            running.add(task)
            task.add_done_callback(running.discard)
            return await asyncio.shield(task)
        except Exception as error:  # noqa: BLE001 - the boundary
            await _abort(context, error)

    return call


def _stream(inner: Callable[..., Any], decode: Callable[[Any], Any]) -> Callable[..., Any]:
    async def call(raw: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async with contextlib.aclosing(inner(decode(raw), context)) as replies:
                async for reply in replies:
                    yield reply
        except Exception as error:  # noqa: BLE001 - the boundary
            await _abort(context, error)

    return call


async def _abort(context: Any, error: Exception) -> None:
    if isinstance(error, (grpc.aio.AbortError, grpc.aio.BaseError)):
        raise error
    if not isinstance(error, SessiondError):
        log.exception("internal error")
        error = SessiondError("internal error; the daemon's log has the details")
    await context.abort_with_status(rpc_status.to_status(wireout.rpc_error(error)))


class Daemon:
    """Everything between a data directory and a port. `start` and `stop` once each."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.port = 0
        self.desk: Desk | None = None
        self.sessions: Sessions | None = None
        self._stack = contextlib.AsyncExitStack()
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open store and model, bind, serve. Raises a SessiondError, with nothing left open, if any part refuses."""
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _start(self) -> None:
        settings = self.settings
        credentials = _credentials(settings)
        principals = Principals(settings)
        torch.set_num_threads(settings.threads)
        store = Store.open(
            settings.data_dir,
            cell_tokens=settings.cell_tokens,
            database_url=settings.database_url,
            accept_damage=settings.accept_damage,
        )
        self._stack.callback(store.close)
        for lost in store.lost:
            log.error("session is in the catalog but not in the log", tenant=lost.tenant, session=lost.session_id)
        for damage in store.damaged:
            log.error("session record is damaged", error=damage.message)

        resolved = modelstore.resolve(settings.model)
        dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
        model = Model.load(resolved.path, dtype, settings.weights)
        tokenizer = load_tokenizer(resolved.path)
        identity = modelstore.identity_fields(resolved.path, kv_dtype=model.shape.dtype, weights=settings.weights)
        identity_id = modelstore.identity_id(identity)
        profile = model.numerics_profile(settings.threads)
        profile_id = modelidentity.profile_id(profile)
        batch = LogBatch()
        batch.put_identity(identity_id, identity)
        batch.put_profile(profile_id, profile)
        await asyncio.wrap_future(store.log.write(batch))
        for other, count, fields in await asyncio.to_thread(foreign_sessions, store.log, identity_id):
            log.warning("sessions of another model", sessions=count, differing=fields, identity=other)

        posts: list[Callable[[list[Event]], None]] = []
        engine = Engine(
            model,
            store.cell_tokens,
            settings.threads,
            lambda events: posts[0](events),
            batch_invariant=settings.batch_invariant,
        )
        tiers = Tiers(store, model.shape, model.max_context, identity_id, profile_id)
        self.desk = Desk(settings, store, engine, tiers, tokenizer, ChatTemplate(tokenizer, model.eos_ids), identity_id)
        posts.append(self.desk.post)
        self._stack.callback(self.desk.close)
        tiers.warm_up(spare_bytes=settings.memory_budget_bytes // 16)
        warm = engine.start()
        self._stack.callback(engine.stop)
        await asyncio.wrap_future(warm)  # the first request does not wait for the warm-up
        self.sessions = Sessions(self.desk, resolved.name, frozenset({resolved.name, settings.model}))
        self.conversations = Conversations(self.desk, self.sessions)
        self.keeper = Keeper(self.desk, self.sessions)
        self.care = Care(self.desk, self.sessions)
        self._stack.callback(self.care.close)
        await self._serve(credentials, principals, identity, profile)
        if settings.metrics_listen:
            self._stack.callback(serve_metrics(self.desk, settings.metrics_listen))
        self._background.append(asyncio.create_task(self.keeper.sweep()))
        if settings.scrub_bytes_per_second:
            self._background.append(asyncio.create_task(self.care.scrub()))
        if settings.collect_seconds:
            self._background.append(asyncio.create_task(self.care.collect_now_and_then()))

    async def _serve(
        self,
        credentials: grpc.ServerCredentials | None,
        principals: Principals,
        identity: dict[str, str],
        profile: dict[str, str],
    ) -> None:
        assert self.sessions is not None
        settings = self.settings
        interceptor = ErrorInterceptor()
        server = grpc.aio.server(interceptors=[interceptor], options=OPTIONS)
        add_SessionsServicer_to_server(SessionsService(self.sessions, self.conversations, principals), server)
        add_AdminServicer_to_server(AdminService(self.sessions, self.care, identity, profile, principals), server)
        self.health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        names = [
            sessions_pb2.DESCRIPTOR.services_by_name["Sessions"].full_name,
            admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name,
        ]
        if settings.reflection if settings.reflection is not None else settings.is_loopback:
            reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        try:
            if credentials:
                self.port = server.add_secure_port(settings.listen, credentials)
            else:
                self.port = server.add_insecure_port(settings.listen)
        except RuntimeError as error:
            told = (
                f"cannot bind {settings.listen}: stop what uses it, or choose another address with --listen ({error})"
            )
            raise UnsafeAddress(told, address=settings.listen) from error
        await server.start()
        self._stack.push_async_callback(interceptor.finish)
        self._stack.push_async_callback(server.stop, 1.0)
        for name in ("", *names):
            await self.health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        """NOT_SERVING, refuse new turns, let running ones end, persist, close."""
        if self.sessions is not None:
            await self.health.enter_graceful_shutdown()
            for task in self._background:
                task.cancel()
            await self.keeper.drain(self.settings.drain_seconds)
        await self._stack.aclose()


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """TLS credentials, or None for plain text. Raises UnsafeAddress for plain text beyond loopback."""
    if settings.tls_cert is None or settings.tls_key is None:
        if (settings.tls_cert, settings.tls_key, settings.tls_client_ca) != (None, None, None):
            raise InvalidConfig("TLS needs both tls_cert and tls_key")
        if not settings.is_loopback and not settings.insecure_allow_remote:
            raise UnsafeAddress(
                f"{settings.listen} is not loopback: give a TLS certificate, or --insecure-allow-remote",
                address=settings.listen,
            )
        return None
    roots = _read(settings.tls_client_ca) if settings.tls_client_ca else None
    pair = (_read(settings.tls_key), _read(settings.tls_cert))
    return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=roots is not None)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidConfig(f"{path} cannot be read: {error.strerror}", path=path) from error


async def run(settings: Settings, on_ready: Callable[[Daemon], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain."""
    daemon = Daemon(settings)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await daemon.start()
    log.info("serving", address=f"{settings.host}:{daemon.port}", model=settings.model, data=str(settings.data_dir))
    if on_ready:
        on_ready(daemon)
    await stopping.wait()
    log.info("draining")
    await daemon.stop()


def serve(settings: Settings, on_ready: Callable[[Daemon], None] | None = None) -> None:
    """Blocking form of `run`, for the command line."""
    # Between two steps the engine needs the GIL for some 100 us, and waits for it as long as this: with 500 us a token
    # took half a millisecond more.
    sys.setswitchinterval(0.00005)
    asyncio.run(run(settings, on_ready))
