"""A daemon in this process or in one of its own, and a peer that speaks to it in protobuf."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from e2e_runner import run
from google.protobuf.message import Message as Proto
from step_hooks import StepHook

from sessiond.clients import requests
from sessiond.clients.errors import SessiondClientError, from_rpc_error
from sessiond.config import Settings
from sessiond.server import Daemon
from sessiond.v1 import admin_pb2_grpc, sessions_pb2, sessions_pb2_grpc, types_pb2

T = TypeVar("T")
GATES: list[Gate] = []  # those of the running test
PATIENCE = 40.0  # seconds after which a thing that should happen counts as not happening


@contextlib.asynccontextmanager
async def patience(state: Callable[[], str]) -> AsyncIterator[None]:
    """Fails, and says how things stand, when the block takes too long."""
    try:
        async with asyncio.timeout(PATIENCE):
            yield
    except TimeoutError:
        pytest.fail(f"nothing happens any more: {state()}")


@dataclass
class Turn:
    """What came through one Generate stream."""

    events: list[sessions_pb2.TurnEvent] = field(default_factory=list)
    error: SessiondClientError | None = None

    @property
    def kinds(self) -> list[str]:
        return [str(event.WhichOneof("event")) for event in self.events]

    def only(self, kind: str) -> Any:
        found = [getattr(event, kind) for event in self.events if event.WhichOneof("event") == kind]
        assert len(found) == 1, (kind, self.kinds)
        return found[0]

    @property
    def accepted(self) -> sessions_pb2.Accepted:
        return self.only("accepted")

    @property
    def finished(self) -> sessions_pb2.Finished:
        return self.only("finished")

    @property
    def restored(self) -> sessions_pb2.Restored:
        return self.only("restored")

    @property
    def tokens(self) -> list[sessions_pb2.Tokens]:
        return [event.token for event in self.events if event.WhichOneof("event") == "token"]

    @property
    def ids(self) -> list[int]:
        return [token for part in self.tokens for token in part.token_ids]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.tokens)

    @property
    def answer(self) -> str:
        return "".join(part.text for part in self.finished.answer.content)


class Stream:
    """One open Generate call."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.turn = Turn()

    async def read(self, until: Callable[[Turn], bool] = lambda turn: False) -> Turn:
        """Take events until `until` holds or the stream ends; an error of the RPC is kept in `turn.error`."""
        async with patience(lambda: f"the stream has {self.turn.kinds}"):
            try:
                while not until(self.turn):
                    event = await self.call.read()
                    if event is grpc.aio.EOF:
                        status = await self.call.code()
                        assert status is grpc.StatusCode.OK, status
                        return self.turn
                    self.turn.events.append(event)
            except grpc.aio.AioRpcError as error:
                self.turn.error = from_rpc_error(error)
        return self.turn

    async def read_tokens(self, count: int) -> Turn:
        turn = await self.read(lambda turn: len(turn.ids) >= count)
        assert turn.error is None, turn.error
        return turn

    def cancel(self) -> None:
        self.call.cancel()


class Peer:
    """Calls a daemon. Unary methods raise the client's typed errors; nothing is retried."""

    def __init__(self, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self.channel = channel
        self.metadata = metadata
        self.sessions = sessions_pb2_grpc.SessionsStub(channel)
        self.admin = admin_pb2_grpc.AdminStub(channel)

    async def call(self, method: Callable[..., Awaitable[T]], request: Proto) -> T:
        async with asyncio.timeout(PATIENCE):
            try:
                return await method(request, metadata=self.metadata)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error

    async def create(self, **options: Any) -> types_pb2.Session:
        request = requests.create_session(options)  # type: ignore[arg-type]
        return await self.call(self.sessions.CreateSession, request)

    async def get(self, session_id: str) -> types_pb2.Session:
        return await self.call(self.sessions.GetSession, sessions_pb2.GetSessionRequest(session_id=session_id))

    async def list(self, **fields: Any) -> sessions_pb2.ListSessionsResponse:
        return await self.call(self.sessions.ListSessions, sessions_pb2.ListSessionsRequest(**fields))

    async def update(self, session: types_pb2.Session, *paths: str) -> types_pb2.Session:
        request = sessions_pb2.UpdateSessionRequest(session=session)
        request.update_mask.paths.extend(paths)
        return await self.call(self.sessions.UpdateSession, request)

    async def delete(self, session_id: str, **fields: Any) -> sessions_pb2.DeleteSessionResponse:
        request = sessions_pb2.DeleteSessionRequest(session_id=session_id, **fields)
        return await self.call(self.sessions.DeleteSession, request)

    async def undelete(self, session_id: str, **fields: Any) -> types_pb2.Session:
        request = sessions_pb2.UndeleteSessionRequest(session_id=session_id, **fields)
        return await self.call(self.sessions.UndeleteSession, request)

    async def revisions(self, session_id: str, **fields: Any) -> list[types_pb2.Revision]:
        request = sessions_pb2.ListRevisionsRequest(session_id=session_id, **fields)
        return list((await self.call(self.sessions.ListRevisions, request)).revisions)

    async def abort(self, session_id: str, request_id: str, **fields: Any) -> sessions_pb2.AbortTurnResponse:
        request = sessions_pb2.AbortTurnRequest(session_id=session_id, request_id=request_id, **fields)
        return await self.call(self.sessions.AbortTurn, request)

    async def warm(self, session_id: str) -> sessions_pb2.WarmSessionResponse:
        return await self.call(self.sessions.WarmSession, sessions_pb2.WarmSessionRequest(session_id=session_id))

    async def suspend(self, session_id: str) -> sessions_pb2.SuspendSessionResponse:
        request = sessions_pb2.SuspendSessionRequest(session_id=session_id)
        return await self.call(self.sessions.SuspendSession, request)

    async def count(self, session_id: str, text: str, **fields: Any) -> sessions_pb2.CountTokensResponse:
        message = types_pb2.Message(role="user", content=[types_pb2.ContentPart(text=text)])
        request = sessions_pb2.CountTokensRequest(session_id=session_id, messages=[message], **fields)
        return await self.call(self.sessions.CountTokens, request)

    def open(self, session_id: str, text: Any = None, **options: Any) -> Stream:
        """Start a turn without reading it."""
        return self.send(requests.generate(session_id, text, options))  # type: ignore[arg-type]

    def send(self, request: sessions_pb2.GenerateRequest) -> Stream:
        return Stream(self.sessions.Generate(request, metadata=self.metadata))

    async def turn(self, session_id: str, text: Any = None, **options: Any) -> Turn:
        """Run a turn to its end; raises what it failed with."""
        turn = await self.open(session_id, text, **options).read()
        if turn.error:
            raise turn.error
        return turn

    async def settled(self, session_id: str) -> types_pb2.Session:
        """Wait until all whole cells are sealed and all computed KV is on disk."""
        async with asyncio.timeout(PATIENCE):
            while True:
                session = await self.get(session_id)
                # The last token of an answer is in the log but was not fed to the model.
                whole_cells = session.token_count // 128 * 128
                if session.exact_upto == whole_cells and session.persisted_upto >= session.token_count - 1:
                    return session
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def peer_of(
    port: int,
    *,
    token: str | None = None,
    tenant: str | None = None,
    credentials: grpc.ChannelCredentials | None = None,
) -> AsyncIterator[Peer]:
    metadata = []
    if token is not None:
        metadata.append(("authorization", f"Bearer {token}"))
    if tenant is not None:
        metadata.append(("sessiond-tenant", tenant))
    target = f"localhost:{port}"
    options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
    if credentials:
        channel = grpc.aio.secure_channel(target, credentials, options=options)
    else:
        channel = grpc.aio.insecure_channel(target, options=options)
    try:
        yield Peer(channel, tuple(metadata))
    finally:
        await channel.close()


def recorded(session: types_pb2.Session) -> types_pb2.Session:
    """What the log holds of a session, without where its KV is just now: that changes behind the turns."""
    copy = types_pb2.Session()
    copy.CopyFrom(session)
    for name in ("tier", "exact_upto", "persisted_upto", "bytes_hot"):
        copy.ClearField(name)
    return copy


async def everything(peer: Peer, session_id: str) -> tuple[types_pb2.Session, list[types_pb2.Revision]]:
    """All that a refused request must leave as it was."""
    revisions = await peer.revisions(session_id)
    for revision in revisions:
        revision.ClearField("exact_upto")
    return recorded(await peer.get(session_id)), revisions


@contextlib.contextmanager
def refused(reason: str, code: grpc.StatusCode) -> Iterator[pytest.ExceptionInfo[SessiondClientError]]:
    """The block raises one typed error of that reason and code."""
    with pytest.raises(SessiondClientError) as caught:
        yield caught
    assert (caught.value.reason, caught.value.code) == (reason, code), caught.value


class Daemons:
    """Daemons in this process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.running: list[Daemon] = []

    async def start(self, **changes: Any) -> Daemon:
        daemon = Daemon(Settings(**{**self.settings, **changes}))
        await daemon.start()
        self.running.append(daemon)
        return daemon

    async def stop(self, daemon: Daemon) -> None:
        self.running.remove(daemon)
        await daemon.stop()

    async def restart(self, daemon: Daemon, **changes: Any) -> Daemon:
        await self.stop(daemon)
        return await self.start(**changes)

    async def stop_all(self) -> None:
        while GATES:  # a test that failed may have left turns waiting
            GATES.pop().open()
        for daemon in list(self.running):
            await self.stop(daemon)


async def happened(event: threading.Event) -> None:
    """Wait for another thread."""
    async with asyncio.timeout(PATIENCE):
        while not event.is_set():  # noqa: ASYNC110 - the other thread knows no loop
            await asyncio.sleep(0.005)


class Gate:
    """Holds the engine between two steps, so that a test decides how far a turn gets.

    gate.let(3)     three more steps may run
    gate.open()     all may
    """

    def __init__(self, daemon: Daemon) -> None:
        assert daemon.desk is not None
        model = daemon.desk.engine.model
        self._steps = threading.Semaphore(0)
        self._open = threading.Event()
        self.waiting = threading.Event()
        self._cancel = daemon.desk.engine.cancel
        self._cancelled = threading.Event()
        daemon.desk.engine.cancel = self._note_cancel  # type: ignore[method-assign]
        GATES.append(self)
        StepHook(model, self._wait)

    def _wait(self, feeds: Any) -> None:
        while not self._open.is_set() and not self._steps.acquire(timeout=0.01):
            self.waiting.set()

    def _note_cancel(self, turn_id: str) -> None:
        self._cancel(turn_id)
        self._cancelled.set()

    async def cancelled(self) -> None:
        """Return once the engine has been told to end a turn, which it will when a step may run."""
        await happened(self._cancelled)
        self._cancelled.clear()

    def let(self, steps: int) -> None:
        for _ in range(steps):
            self._steps.release()

    def open(self) -> None:
        self._open.set()

    async def reached(self) -> None:
        """Return once a step waits at the gate."""
        self.waiting.clear()
        await happened(self.waiting)


class Process:
    """A daemon in a process of its own, to be killed.

    Forked from a server that has imported everything, which takes most of a start's seconds.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.hold_file = folder / "hold"
        log = folder / "daemon.log"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sessiond.server"])
        here, there = context.Pipe(duplex=False)
        self.process = context.Process(target=run, args=(settings, there, str(log), str(self.hold_file)), daemon=True)
        self.process.start()
        there.close()
        with here:
            told = here.recv() if here.poll(PATIENCE) else None
        if not isinstance(told, int):
            self.kill()
            raise AssertionError(f"the daemon did not start: {told}\n{log.read_text() if log.exists() else ''}")
        self.port = told

    def hold(self, steps: int) -> None:
        """Let the engine run so many steps and then no more."""
        partial = self.hold_file.with_suffix(".partial")
        partial.write_text(str(steps))
        partial.replace(self.hold_file)

    def release(self) -> None:
        self.hold_file.unlink()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.terminate()

    async def exit_code(self) -> int | None:
        async with asyncio.timeout(PATIENCE):
            while self.process.is_alive():  # noqa: ASYNC110 - processes have no events
                await asyncio.sleep(0.02)
        return self.process.exitcode
