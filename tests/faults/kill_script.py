"""What a client does in the kill runs: one conversation with everything in it, held to its end however often the
daemon dies. Every call is made again until it is answered, as its comment in the contract allows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
from e2e_archive import export, import_
from e2e_daemon import PATIENCE as CALL_PATIENCE
from e2e_daemon import Peer, peer_of
from e2e_model import NO_END
from grpc import StatusCode
from kill_runner import PATIENCE, Mortal

from sessiond.clients.errors import SessiondClientError, from_rpc_error
from sessiond.storage.environment import Environment
from sessiond.storage.log import LogStore
from sessiond.v1 import admin_pb2, sessions_pb2, types_pb2

T = TypeVar("T")
TEXT = "word " * 30
TOKENS = 20
LONG = 1000  # of a turn that must not end before somebody ends it
STILL_SECONDS = 1.5
SEEDED: dict[str, Any] = {"temperature": 3.0, "seed": 7, "logit_bias": NO_END}


class DefectError(AssertionError):
    """The run shows a defect."""


class Client:
    """Holds the conversation; starts the daemon again when it has died."""

    def __init__(self, folder: Path, settings: dict[str, Any], point: str, weakness: str = "") -> None:
        self.folder, self.settings, self.weakness = folder, settings, weakness
        self.daemon = Mortal(folder, settings, point, weakness)
        self.deaths = 0
        self.restart_seconds = 0.0
        self.lost_tokens = self.turns_twice = 0
        self.said: dict[str, list[int]] = {}  # request id -> tokens of its answer
        self.answers: dict[str, str] = {}
        self.texts: dict[str, tuple[str, str, dict[str, Any]]] = {}  # request id -> session, text, options

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        if self.daemon.port is None:
            await self._revive_process()
        await self._connect()
        try:
            yield
        finally:
            await self._channel.__aexit__(None, None, None)

    async def _connect(self) -> None:
        assert self.daemon.port is not None
        self._channel = peer_of(self.daemon.port)
        self.peer: Peer = await self._channel.__aenter__()

    async def _revive(self) -> None:
        await self._channel.__aexit__(None, None, None)
        await self._revive_process()
        await self._connect()

    async def _revive_process(self) -> None:
        """The daemon has died: see that it was killed, and start it again on the same directory."""
        if not await asyncio.to_thread(self.daemon.wait):
            raise DefectError("the daemon is unavailable and does not die")
        if not self.daemon.was_killed:
            raise DefectError(f"the daemon ended by itself: {self.daemon.process.exitcode} {self.daemon.report()}")
        self.deaths += 1
        began = time.monotonic()
        self.daemon = await asyncio.to_thread(Mortal, self.folder, self.settings, "", self.weakness)
        self.restart_seconds = max(self.restart_seconds, time.monotonic() - began)
        if self.daemon.port is None:
            raise DefectError(f"the daemon does not come back: {self.daemon.report()}")

    async def do(self, call: Callable[[Peer], Awaitable[T]], done_if: str = "") -> T | None:
        """The answer to a call; None if one made before its answer got lost has done it (it says `done_if`)."""
        tries = 0
        while True:
            tries += 1
            try:
                return await call(self.peer)
            except SessiondClientError as error:
                if error.reason == done_if and tries > 1:
                    return None
                if error.code is not StatusCode.UNAVAILABLE:
                    raise
                await self._revive()

    async def tell(self, command: str) -> int:
        """Have something done in the daemon that no call asks for; again if it dies of it."""
        while True:
            try:
                return await asyncio.to_thread(self.daemon.tell, command)
            except (EOFError, OSError):
                await self._revive()

    async def turn(self, session: str, request_id: str, text: str, **options: Any) -> list[int]:
        """Run a turn to its end; after a death it goes on behind the tokens that came."""
        seen: list[int] = self.said.get(request_id, [])
        options = {"max_tokens": TOKENS} | options
        while True:
            stream = self.peer.open(session, text, request_id=request_id, resume_after_tokens=len(seen), **options)
            turn = await stream.read()
            if any(part.first_token_index < len(seen) for part in turn.tokens):
                raise DefectError(f"{request_id}: a token came twice")
            seen = seen + turn.ids
            if turn.error is None:
                break
            if turn.error.code is not StatusCode.UNAVAILABLE:
                raise turn.error
            await self._died_in(session, request_id, len(seen))
        self.said[request_id], self.answers[request_id] = seen, turn.answer
        self.texts[request_id] = session, text, {k: v for k, v in options.items() if k != "supersede"}
        await self.settled(session)
        return seen

    async def _died_in(self, session: str, request_id: str, seen: int) -> None:
        await self._channel.__aexit__(None, None, None)
        await asyncio.to_thread(self.daemon.wait)
        self.lost_tokens += max(0, seen - self._logged(session, request_id))
        await self._revive_process()
        await self._connect()

    def _logged(self, session: str, request_id: str) -> int:
        """Generated tokens of a request that the dead daemon's log holds."""
        log = LogStore(Environment(str(self.folder / "data" / "log"), map_bytes=64 << 30))
        try:
            row = log.request("default", session, request_id)
            return len(log.tokens("default", row.revision_id)[0]) - int(row.params["n_prompt"]) if row else 0
        finally:
            log.close()

    async def cut(
        self, session: str, request_id: str, text: str, tokens: int, *, may_end: bool = False, **options: Any
    ) -> None:
        """Go away in the middle of a turn, which then stands suspended; on a busy machine it `may_end` first."""
        while True:
            try:
                stream = self.peer.open(session, text, request_id=request_id, **options)
                turn = await stream.read(lambda turn: len(turn.ids) >= tokens)
                if turn.error:
                    raise turn.error
                self.said[request_id] = turn.ids
                stream.cancel()
                await self.until(session, lambda now: not now.running_request_id)
                if (await self.peer.get(session)).suspended_request_id == request_id:
                    return
                if may_end:
                    return
                raise DefectError(f"{request_id} does not stand suspended")
            except SessiondClientError as error:
                if error.code is not StatusCode.UNAVAILABLE:
                    raise
                await self._died_in(session, request_id, len(stream.turn.ids))
                if (await self.peer.get(session)).suspended_request_id == request_id:
                    self.said[request_id] = stream.turn.ids
                    return

    async def gone(self, session: str) -> None:
        """Purge it."""
        for request_id in [name for name, told in self.texts.items() if told[0] == session]:
            del self.texts[request_id]
        await self.do(lambda peer: peer.delete(session, purge_now=True), "SESSION_NOT_FOUND")

    async def until(self, session: str, holds: Callable[[types_pb2.Session], bool]) -> types_pb2.Session:
        async with asyncio.timeout(PATIENCE):
            while True:
                now = await self.peer.get(session)
                if holds(now):
                    return now
                await asyncio.sleep(0.01)

    async def settled(self, session: str) -> None:
        """Nothing works on the session: all is sealed and on disk, or it is cold, or for a while nothing has changed.

        A turn that had said all its tokens when its daemon died is committed without computing them: its KV stays
        absent until the next turn.
        """
        began, upto = time.monotonic(), (-1, -1)

        def quiet(now: types_pb2.Session) -> bool:
            nonlocal began, upto
            if upto != (now.exact_upto, now.persisted_upto):
                began, upto = time.monotonic(), (now.exact_upto, now.persisted_upto)
            on_disk = now.exact_upto == now.token_count // 128 * 128 and now.persisted_upto >= now.token_count - 1
            return now.tier == types_pb2.TIER_COLD or on_disk or time.monotonic() - began > STILL_SECONDS

        await self.do(lambda _: self.until(session, quiet))

    async def aborted(self, session: str, request_id: str, text: str, tokens: int, **options: Any) -> None:
        """Stop a turn that runs."""
        while True:
            try:
                stream = self.peer.open(session, text, request_id=request_id, **options)
                turn = await stream.read(lambda turn: len(turn.ids) >= tokens or "finished" in turn.kinds)
                if turn.error:
                    raise turn.error
                await self.peer.abort(session, request_id)
                break
            except SessiondClientError as error:
                if error.code is not StatusCode.UNAVAILABLE:
                    raise
                await self._revive()
        await self.until(session, lambda now: not now.running_request_id and not now.suspended_request_id)


async def hold(client: Client) -> None:
    """The conversation."""
    do, turn = client.do, client.turn
    created = await do(lambda peer: peer.create(system="Be brief.", request_id="create-a"))
    assert created is not None
    a = created.session_id
    await turn(a, "a1", TEXT)
    first = await do(lambda peer: peer.get(a))
    assert first is not None
    await client.cut(a, "a2", TEXT, 5, may_end=True, max_tokens=4 * TOKENS, **SEEDED)
    await turn(a, "a2", TEXT, max_tokens=4 * TOKENS, **SEEDED)
    await client.cut(a, "a3", "Never mind", 3, max_tokens=LONG, **SEEDED)
    await turn(a, "a4", TEXT, supersede=True)
    await client.aborted(a, "a5", "Stop", 3, max_tokens=LONG, **SEEDED)
    labelled = types_pb2.Session(session_id=a, labels={"colour": "blue"})
    await do(lambda peer: peer.update(labelled, "labels"))
    await do(lambda peer: peer.suspend(a))
    await turn(a, "a6", "Again")
    await branches(client, a, first.head_revision_id)
    await travels(client, a)
    await do(lambda peer: peer.delete(a))
    await do(lambda peer: peer.undelete(a), "NOT_DELETED")
    brief = await do(lambda peer: peer.create(system="Soon gone.", ttl=0.3, request_id="create-c"))
    assert brief is not None
    await do(lambda _: client.until(brief.session_id, lambda now: now.state == types_pb2.SESSION_STATE_DELETED))
    await cared_for(client, a)
    await turn(a, "a8", "The last one")
    await same_again(client, a)


async def branches(client: Client, a: str, first: str) -> None:
    """A fork that is spoken in and purged, and a rollback that is spoken in."""
    forking = sessions_pb2.ForkSessionRequest(session_id=a, request_id="fork-b")
    forked = await client.do(lambda peer: peer.call(peer.sessions.ForkSession, forking))
    assert forked is not None
    b = forked.session_id
    await client.turn(b, "b1", TEXT)
    back = sessions_pb2.RollbackSessionRequest(session_id=a, revision_id=first, request_id="back")
    await client.do(lambda peer: peer.call(peer.sessions.RollbackSession, back))
    await client.turn(a, "a7", TEXT)
    await same_again(client, b)
    await client.gone(b)


async def travels(client: Client, a: str) -> None:
    """The session is exported; what it is imported as goes on as it would have, and is purged."""
    exported = await client.do(lambda peer: export(peer, a))
    assert exported is not None
    archive, _ = exported
    imported = await client.do(lambda peer: import_(peer, archive, request_id="import-d"))
    again = await client.do(lambda peer: import_(peer, archive, request_id="import-d"))
    assert imported is not None
    assert again is not None
    d = imported.session.session_id
    if imported.verdict != sessions_pb2.IMPORT_VERDICT_EXACT or again.session.session_id != d:
        raise DefectError(f"imported as {imported} and {again}")
    brought = await client.do(lambda peer: peer.revisions(d)) or []
    await client.turn(d, "d1", TEXT)
    await same_again(client, d, frozenset(revision.request_id for revision in brought))
    await client.gone(d)


async def cared_for(client: Client, a: str) -> None:
    """Purge, collect what was stranded, compact; damage that VerifyStore mends; damage that the scrub mends."""
    await client.do(lambda peer: peer.suspend(a))
    await client.tell("strand")
    compacting = admin_pb2.CompactStoreRequest(purge_deleted=True)
    done = await client.do(lambda peer: peer.call(peer.admin.CompactStore, compacting))
    if client.deaths == 0 and (done is None or (done.sessions_purged, done.records_erased < 2) != (1, False)):
        raise DefectError(f"compacting came to {done}")
    await client.tell("damage")
    await client.do(lambda peer: verified(peer, repair=True))
    if findings := await client.do(lambda peer: verified(peer, repair=False)):
        raise DefectError(f"a store that was just repaired has {findings}")
    await client.tell("damage")
    mended = await client.tell("scrub")
    if mended != 1 and client.deaths == 0:
        raise DefectError(f"the scrub mended {mended} damaged records")


async def verified(peer: Peer, *, repair: bool) -> list[admin_pb2.Finding]:
    """What VerifyStore finds; nothing of it may be a loss, and `repair` leaves nothing."""
    request = admin_pb2.VerifyStoreRequest(repair=repair)
    findings: list[admin_pb2.Finding] = []
    async with asyncio.timeout(CALL_PATIENCE):
        try:
            async for reply in peer.admin.VerifyStore(request, metadata=peer.metadata):
                if reply.HasField("finding"):
                    findings.append(reply.finding)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
    if any(one.severity == admin_pb2.SEVERITY_LOSS or one.repaired != repair for one in findings):
        raise DefectError(f"with repair={repair} the store has {findings}")
    return findings


async def same_again(client: Client, session: str, brought: frozenset[str] = frozenset()) -> None:
    """Every turn that was acknowledged is there, once, and reads as it did. `brought`: requests of imported turns."""
    asked = {name: told for name, told in client.texts.items() if told[0] == session}
    for request_id, (_, text, options) in asked.items():
        again = await client.do(lambda peer, t=text, o=options, r=request_id: peer.turn(session, t, request_id=r, **o))
        assert again is not None
        if again.accepted.attachment != sessions_pb2.ATTACHMENT_REPLAYED or again.ids != client.said[request_id]:
            raise DefectError(f"{request_id} reads otherwise when asked for again")
    revisions = await client.do(lambda peer: peer.revisions(session)) or []
    own = [r for r in revisions if r.session_id == session and r.request_id not in brought]
    made = [r.request_id for r in own if r.kind == types_pb2.REVISION_KIND_TURN]
    client.turns_twice += len(made) - len(set(made))
    if sorted(made) != sorted(asked):
        raise DefectError(f"the revisions are {made}, the turns {sorted(asked)}")
