"""A handle on one session: the methods of `session` as coroutines; keep the two alike."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Unpack

from sessiond.clients import requests
from sessiond.clients.archive import ArchiveReader
from sessiond.clients.events import Event
from sessiond.clients.messages import Input, to_messages
from sessiond.clients.reader import TurnReader
from sessiond.clients.requests import ForkOptions, GenerateOptions, UpdateOptions
from sessiond.v1 import sessions_pb2, types_pb2

if TYPE_CHECKING:
    from sessiond.clients.async_client import AsyncClient


class AsyncSession:
    """A conversation on the server; `proto` is its state as this handle last saw it."""

    def __init__(self, client: AsyncClient, proto: types_pb2.Session) -> None:
        self._client = client
        self.proto = proto

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    @property
    def id(self) -> str:
        return self.proto.session_id

    @property
    def head(self) -> str:
        """Id of the head revision, as last seen."""
        return self.proto.head_revision_id

    def generate(self, messages: Input | None = None, **options: Unpack[GenerateOptions]) -> AsyncIterator[Event]:
        """Run a turn on a text (of the user), messages, or the option `token_ids`.

        The turn starts with the first event asked for. After UNAVAILABLE the client comes back with the same
        `request_id` and goes on where it was. Leaving early detaches from the turn; `abort` stops it.
        """
        reader = TurnReader(requests.generate(self.id, messages, options))
        return self._follow(reader)

    async def abort(self, request_id: str, *, commit: bool = False) -> sessions_pb2.AbortTurnResponse:
        """Stop a turn; with `commit`, what was generated becomes a revision marked aborted."""
        request = sessions_pb2.AbortTurnRequest(session_id=self.id, request_id=request_id, commit=commit)
        return await self._client._call(self._client._sessions.AbortTurn, request)

    async def refresh(self) -> AsyncSession:
        """Read `proto` again."""
        request = sessions_pb2.GetSessionRequest(session_id=self.id)
        return self._keep(await self._client._call(self._client._sessions.GetSession, request))

    async def update(self, *, etag: str = "", **options: Unpack[UpdateOptions]) -> AsyncSession:
        """Set labels (as a whole), policy, ttl or expire_time; None clears. `etag`: only if unchanged."""
        request = requests.update_session(self.id, etag, options)
        return self._keep(await self._client._call(self._client._sessions.UpdateSession, request))

    async def fork(self, **options: Unpack[ForkOptions]) -> AsyncSession:
        """A new session whose head is `revision`, or this one's head; it shares the KV."""
        request = requests.fork_session(self.id, options)
        return AsyncSession(self._client, await self._client._call(self._client._sessions.ForkSession, request))

    async def rollback(self, to: str | types_pb2.Revision, *, etag: str = "") -> AsyncSession:
        """Move the head to an earlier revision; later ones stay reachable."""
        request = requests.rollback_session(self.id, to, etag)
        return self._keep(await self._client._call(self._client._sessions.RollbackSession, request))

    async def revisions(self) -> list[types_pb2.Revision]:
        """The whole tree, oldest first."""
        request = sessions_pb2.ListRevisionsRequest(session_id=self.id)
        revisions: list[types_pb2.Revision] = []
        while True:
            page = await self._client._call(self._client._sessions.ListRevisions, request)
            revisions.extend(page.revisions)
            if not page.next_page_token:
                return revisions
            request.page_token = page.next_page_token

    async def revision(self, revision_id: str = "") -> types_pb2.Revision:
        """One revision, by default the head as last seen."""
        request = sessions_pb2.GetRevisionRequest(session_id=self.id, revision_id=revision_id or self.head)
        return await self._client._call(self._client._sessions.GetRevision, request)

    async def delete(self, *, purge_now: bool = False, etag: str = "") -> sessions_pb2.DeleteSessionResponse:
        """Soft-delete it; with `purge_now` erase it, which cannot be undone."""
        request = sessions_pb2.DeleteSessionRequest(session_id=self.id, etag=etag, purge_now=purge_now)
        response = await self._client._call(self._client._sessions.DeleteSession, request)
        if response.HasField("session"):
            self._keep(response.session)
        return response

    async def undelete(self, *, etag: str = "") -> AsyncSession:
        """Bring it back after a soft delete."""
        request = sessions_pb2.UndeleteSessionRequest(session_id=self.id, etag=etag)
        return self._keep(await self._client._call(self._client._sessions.UndeleteSession, request))

    async def warm(self) -> sessions_pb2.WarmSessionResponse:
        """Bring its state to fast memory, ahead of a turn."""
        request = sessions_pb2.WarmSessionRequest(session_id=self.id)
        response = await self._client._call(self._client._sessions.WarmSession, request)
        self._keep(response.session)
        return response

    async def suspend(self) -> sessions_pb2.SuspendSessionResponse:
        """Push its state to disk now."""
        request = sessions_pb2.SuspendSessionRequest(session_id=self.id)
        response = await self._client._call(self._client._sessions.SuspendSession, request)
        self._keep(response.session)
        return response

    async def count_tokens(
        self, messages: Input, *, add_generation_prompt: bool = False
    ) -> sessions_pb2.CountTokensResponse:
        """Tokens that messages would add to the session."""
        request = sessions_pb2.CountTokensRequest(
            session_id=self.id,
            messages=to_messages(messages),
            add_generation_prompt=add_generation_prompt,
        )
        return await self._client._call(self._client._sessions.CountTokens, request)

    async def explain(
        self, revision: str | types_pb2.Revision = "", *, last_turns: int = 1
    ) -> list[sessions_pb2.TurnExplanation]:
        """What the turn of a revision, or the last turns, read; newest first."""
        request = sessions_pb2.ExplainTurnRequest(
            session_id=self.id, revision_id=requests.revision_id(revision), last_turns=last_turns
        )
        return list((await self._client._call(self._client._sessions.ExplainTurn, request)).turns)

    async def export(
        self,
        revision: str | types_pb2.Revision = "",
        *,
        all_revisions: bool = False,
        tokens_only: bool = False,
        on_header: Callable[[sessions_pb2.ArchiveHeader], None] | None = None,
    ) -> AsyncIterator[bytes]:
        """An archive's bytes, in pieces. Raises DataLossError at the end if any are damaged or missing.

        `on_header` is told first what comes: how many tokens, how many of them with state, about how many bytes.
        """
        request = sessions_pb2.ExportSessionRequest(
            session_id=self.id,
            revision_id=requests.revision_id(revision),
            all_revisions=all_revisions,
            tokens_only=tokens_only,
        )
        call = self._client._sessions.ExportSession(request, metadata=self._client._metadata)
        reader = ArchiveReader()
        async for message in self._client._stream(call):
            chunk = reader.receive(message)
            if on_header and message.HasField("header"):
                on_header(message.header)
            if chunk:
                yield chunk
        reader.end_of_stream()

    async def _follow(self, reader: TurnReader) -> AsyncIterator[Event]:
        async for event in self._client._run_turn(reader):
            if event.kind == "finished":
                self.proto.head_revision_id = event.proto.finished.revision_id
            yield event

    def _keep(self, proto: types_pb2.Session) -> AsyncSession:
        self.proto = proto
        return self
