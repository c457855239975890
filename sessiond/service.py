"""The gRPC service Sessions: decode a request, call the domain, encode the reply. Errors are mapped in server.py."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar, cast

import grpc

from sessiond import branching, portable, wireexplain, wirein, wireout
from sessiond.auth import Principals
from sessiond.conversation import Conversations
from sessiond.damage import described
from sessiond.errors import BadRequest, RecordCorrupt, SessiondError
from sessiond.explaining import explain
from sessiond.exporting import Exports
from sessiond.importing import Imports
from sessiond.places import ArchivePlaces
from sessiond.sessions import Sessions
from sessiond.v1 import sessions_pb2 as pb
from sessiond.v1 import types_pb2 as types
from sessiond.v1.sessions_pb2_grpc import SessionsServicer

Context = grpc.aio.ServicerContext[Any, Any]

_UPDATABLE = ("labels", "policy", "ttl", "expire_time")


Method = TypeVar("Method", bound=Callable[..., Any])


def names_damage(method: Method) -> Method:
    """RECORD_CORRUPT says of which session it is, and what of it can still be read."""

    async def stream(self: SessionsService, request: Any, context: Context) -> AsyncIterator[Any]:
        with self.naming_damage(request, context):
            async with contextlib.aclosing(method(self, request, context)) as replies:
                async for reply in replies:
                    yield reply

    async def unary(self: SessionsService, request: Any, context: Context) -> Any:
        with self.naming_damage(request, context):
            return await method(self, request, context)

    wrapped: Any = stream if inspect.isasyncgenfunction(method) else unary
    return cast(Method, functools.wraps(method)(wrapped))


class SessionsService(SessionsServicer):
    """sessiond.v1.Sessions."""

    def __init__(self, sessions: Sessions, conversations: Conversations, principals: Principals) -> None:
        self.sessions = sessions
        self.archives = ArchivePlaces(sessions.desk.settings.archive_idle_seconds)
        self.exports = Exports(sessions, self.archives)
        self.imports = Imports(sessions, self.archives)
        self.conversations = conversations
        self.tenant = principals.tenant

    @contextlib.contextmanager
    def naming_damage(self, request: Any, context: Context) -> Iterator[None]:
        try:
            yield
        except RecordCorrupt as error:
            session_id = request.session.session_id if hasattr(request, "session") else request.session_id
            raise described(self.sessions.desk.store.log, self.tenant(context), session_id, error) from error

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Context) -> types.Session:
        return wireout.session(await self.sessions.create(self.tenant(context), wirein.new_session(request)))

    @names_damage
    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> types.Session:
        return wireout.session(await self.sessions.get(self.tenant(context), request.session_id))

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Context) -> pb.ListSessionsResponse:
        labels, state, tier = wirein.parse_filter(request.filter)
        if state is None and not request.show_deleted:
            state = "active"
        views, token = await self.sessions.page(
            self.tenant(context),
            labels=labels,
            state=state,
            tier=tier,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListSessionsResponse(sessions=[wireout.session(view) for view in views], next_page_token=token)

    @names_damage
    async def UpdateSession(self, request: pb.UpdateSessionRequest, context: Context) -> types.Session:
        changes: dict[str, Any] = {}
        for path in request.update_mask.paths or _present(request.session):
            if path == "labels":
                changes["labels"] = wirein.labels(request.session.labels)
            elif path == "policy":
                name, knobs = wirein.policy(request.session.policy)
                changes["policy"] = {"name": name, "knobs": knobs}
            elif path == "ttl":
                given = request.session.HasField("ttl")
                changes["ttl_us"] = wirein.ttl_us(request.session.ttl) if given else None
                if not given:
                    changes["expire_us"] = None
            elif path == "expire_time":
                given = request.session.HasField("expire_time")
                changes["expire_us"] = wirein.expire_us(request.session.expire_time) if given else None
                changes["ttl_us"] = None
            else:
                raise BadRequest(f"{path!r} cannot be updated; {', '.join(_UPDATABLE)} can", field="update_mask")
        session = request.session
        view = await self.sessions.update(self.tenant(context), session.session_id, session.etag, changes)
        return wireout.session(view)

    @names_damage
    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: Context) -> pb.DeleteSessionResponse:
        view, freed = await self.sessions.delete(
            self.tenant(context), request.session_id, request.etag, purge_now=request.purge_now
        )
        return pb.DeleteSessionResponse(session=wireout.session(view) if view else None, freed_bytes=freed)

    @names_damage
    async def UndeleteSession(self, request: pb.UndeleteSessionRequest, context: Context) -> types.Session:
        view = await self.sessions.undelete(self.tenant(context), request.session_id, request.etag)
        return wireout.session(view)

    @names_damage
    async def ListRevisions(self, request: pb.ListRevisionsRequest, context: Context) -> pb.ListRevisionsResponse:
        views, token = await self.sessions.revisions(
            self.tenant(context), request.session_id, request.page_size, request.page_token
        )
        return pb.ListRevisionsResponse(revisions=[wireout.revision(view) for view in views], next_page_token=token)

    @names_damage
    async def GetRevision(self, request: pb.GetRevisionRequest, context: Context) -> types.Revision:
        view = await self.sessions.revision(self.tenant(context), request.session_id, request.revision_id)
        return wireout.revision(view)

    @names_damage
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.TurnEvent]:
        events = self.conversations.generate(self.tenant(context), wirein.turn_request(request))
        sequence = 0
        try:
            async for event in events:
                yield wireout.turn_event(sequence, event)
                sequence += 1
        except SessiondError as error:
            if sequence:  # a turn that was accepted ends with a `failed` event, then with the status
                yield pb.TurnEvent(sequence=sequence, failed=pb.Failed(status=wireout.rpc_error(error)))
            raise
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    @names_damage
    async def AbortTurn(self, request: pb.AbortTurnRequest, context: Context) -> pb.AbortTurnResponse:
        stopped, revision, count = await self.conversations.abort(
            self.tenant(context), request.session_id, request.request_id, commit=request.commit
        )
        return pb.AbortTurnResponse(stopped=stopped, revision_id=revision, generated_tokens=count)

    @names_damage
    async def WarmSession(self, request: pb.WarmSessionRequest, context: Context) -> pb.WarmSessionResponse:
        view, report = await self.sessions.warm(self.tenant(context), request.session_id)
        return pb.WarmSessionResponse(
            session=wireout.session(view), restored=wireout.restored(report) if report else None
        )

    @names_damage
    async def SuspendSession(self, request: pb.SuspendSessionRequest, context: Context) -> pb.SuspendSessionResponse:
        view, written, freed = await self.sessions.suspend(self.tenant(context), request.session_id)
        return pb.SuspendSessionResponse(session=wireout.session(view), bytes_written=written, bytes_freed=freed)

    @names_damage
    async def CountTokens(self, request: pb.CountTokensRequest, context: Context) -> pb.CountTokensResponse:
        tokens, held = await self.sessions.count_tokens(
            self.tenant(context),
            request.session_id,
            wirein.messages(request.messages),
            generation_prompt=request.add_generation_prompt,
        )
        limit = self.sessions.desk.max_context
        return pb.CountTokensResponse(tokens=tokens, session_tokens=held, max_context_tokens=limit)

    @names_damage
    async def ForkSession(self, request: pb.ForkSessionRequest, context: Context) -> types.Session:
        return wireout.session(await branching.fork(self.sessions, self.tenant(context), wirein.fork(request)))

    @names_damage
    async def RollbackSession(self, request: pb.RollbackSessionRequest, context: Context) -> types.Session:
        view = await branching.rollback(self.sessions, self.tenant(context), wirein.rollback(request))
        return wireout.session(view)

    @names_damage
    async def ExplainTurn(self, request: pb.ExplainTurnRequest, context: Context) -> pb.ExplainTurnResponse:
        record = self.sessions.record(self.tenant(context), request.session_id, deleted_too=True)
        turns = explain(self.sessions.desk, record, request.revision_id, request.last_turns)
        return wireexplain.response(turns)

    @names_damage
    async def ExportSession(
        self, request: pb.ExportSessionRequest, context: Context
    ) -> AsyncIterator[pb.ExportSessionResponse]:
        async with self.exports.open(
            self.tenant(context),
            request.session_id,
            request.revision_id,
            all_revisions=request.all_revisions,
            tokens_only=request.tokens_only,
        ) as export:
            await self._written(context, pb.ExportSessionResponse(header=portable.archive_header(export)))
            async with contextlib.aclosing(export.chunks()) as chunks:
                async for chunk in chunks:
                    await self._written(context, pb.ExportSessionResponse(chunk=chunk))
            trailer = pb.ArchiveTrailer(sha256=export.sha256, total_bytes=export.total_bytes)
        yield pb.ExportSessionResponse(trailer=trailer)  # behind the place: that is free again

    async def _written(self, context: Context, reply: pb.ExportSessionResponse) -> None:
        """Not yielded, as others are: a generator cannot tell that nobody reads. Raises StreamStalled."""
        async with self.archives.moving():
            await context.write(reply)

    async def ImportSession(
        self, request_iterator: AsyncIterator[pb.ImportSessionRequest], context: Context
    ) -> pb.ImportSessionResponse:
        tenant = self.tenant(context)
        parts = aiter(request_iterator)
        first = await anext(parts, None)
        if first is None or first.WhichOneof("part") != "header":
            raise BadRequest("an import begins with its header", field="header")
        done = await self.imports.receive(tenant, wirein.import_request(first.header), portable.import_parts(parts))
        return portable.import_response(done)


def _present(session: types.Session) -> list[str]:
    """Without a mask, the updatable fields that are set (AIP-134)."""
    return [name for name, _ in ((d.name, v) for d, v in session.ListFields()) if name in _UPDATABLE]
