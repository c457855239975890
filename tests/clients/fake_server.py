"""A server that keeps the contract's promises about resuming, and breaks every stream it is told to."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from sessiond.v1 import admin_pb2, admin_pb2_grpc, sessions_pb2, sessions_pb2_grpc, types_pb2

# Tokens are three bytes each, so that characters are split between them.
TEXT = "naïve 🦊 café — 狐は速い. " * 6


def make_status(
    code: grpc.StatusCode, reason: str, *, retry_after: float | None = None, **metadata: str
) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message=f"because {reason}")
    info = error_details_pb2.ErrorInfo(reason=reason, domain="sessiond", metadata=metadata)
    status.details.add().Pack(info)
    if retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


@dataclass
class Turn:
    """A finished answer of known tokens, streamed `batch` tokens an event."""

    text: str = TEXT
    batch: int = 2

    @property
    def tokens(self) -> list[bytes]:
        data = self.text.encode()
        return [data[i : i + 3] for i in range(0, len(data), 3)]

    def released(self, n_tokens: int) -> int:
        """Bytes certain after `n_tokens`: whole characters, and no full stop, which may yet stop it."""
        data = b"".join(self.tokens[:n_tokens])
        if n_tokens >= len(self.tokens):
            return len(data)
        return len(data.decode(errors="ignore").removesuffix(".").encode())

    def events(self, resume: int) -> Iterator[sessions_pb2.TurnEvent]:
        data = self.text.encode()
        total = len(self.tokens)
        yield sessions_pb2.TurnEvent(accepted=sessions_pb2.Accepted(revision_id="r0", turn_revision_id="r1"))
        start = resume
        while start < total:
            end = min(start + self.batch, total)
            low, high = self.released(start), self.released(end)
            yield sessions_pb2.TurnEvent(
                token=sessions_pb2.Tokens(
                    first_token_index=start,
                    text_offset=low,
                    token_ids=range(start, end),
                    text=data[low:high].decode(),
                    logprobs=[make_logprob(i) for i in range(start, end)],
                )
            )
            start = end
        yield sessions_pb2.TurnEvent(
            finished=sessions_pb2.Finished(revision_id="r1", finish_reason=types_pb2.FINISH_REASON_STOP)
        )


def make_logprob(token_id: int) -> sessions_pb2.TokenLogprobs:
    return sessions_pb2.TokenLogprobs(token_id=token_id, logprob=-0.5)


@dataclass
class FakeServer(sessions_pb2_grpc.SessionsServicer, admin_pb2_grpc.AdminServicer):
    """`breaks`: after how many messages each stream in turn ends with UNAVAILABLE; then all go through.

    `by_event`: say so with a `failed` event first. `refusals`: statuses with which the next calls of any kind
    fail. `rewind`: how many tokens too early a resumed stream starts. `replay` gives other events altogether.
    """

    turn: Turn = field(default_factory=Turn)
    breaks: list[int] = field(default_factory=list)
    refusals: list[status_pb2.Status] = field(default_factory=list)
    rewind: int = 0
    by_event: bool = False
    generate_requests: list[sessions_pb2.GenerateRequest] = field(default_factory=list)
    requests: list[object] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    archive: bytes = b""
    detached: threading.Event = field(default_factory=threading.Event)
    replay: Callable[[sessions_pb2.GenerateRequest], Iterator[sessions_pb2.TurnEvent]] | None = None

    def _admit(self, request: object, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata = {key: str(value) for key, value in context.invocation_metadata()}
        if self.refusals:
            context.abort_with_status(rpc_status.to_status(self.refusals.pop(0)))

    def Generate(self, request, context):
        context.add_callback(self.detached.set)
        self.generate_requests.append(request)
        self._admit(request, context)
        limit = self.breaks.pop(0) if self.breaks else None
        source = self.replay or (lambda r: self.turn.events(max(0, r.resume_after_tokens - self.rewind)))
        for sent, event in enumerate(source(request)):
            if sent == limit:
                status = make_status(grpc.StatusCode.UNAVAILABLE, "DRAINING")
                if self.by_event:
                    yield sessions_pb2.TurnEvent(failed=sessions_pb2.Failed(status=status))
                context.abort_with_status(rpc_status.to_status(status))
            yield event

    def CreateSession(self, request, context):
        self._admit(request, context)
        return types_pb2.Session(session_id="s1", head_revision_id="r0", labels=request.labels)

    def GetSession(self, request, context):
        self._admit(request, context)
        return types_pb2.Session(session_id=request.session_id, head_revision_id="r0")

    def ListSessions(self, request, context):
        self._admit(request, context)
        first = int(request.page_token or 0)
        page = [types_pb2.Session(session_id=f"s{i}") for i in range(first, min(first + 2, 5))]
        return sessions_pb2.ListSessionsResponse(sessions=page, next_page_token=str(first + 2) if first + 2 < 5 else "")

    def UpdateSession(self, request, context):
        self._admit(request, context)
        return request.session

    def DeleteSession(self, request, context):
        self._admit(request, context)
        if request.purge_now:
            return sessions_pb2.DeleteSessionResponse(freed_bytes=7)
        session = types_pb2.Session(session_id=request.session_id, state=types_pb2.SESSION_STATE_DELETED)
        return sessions_pb2.DeleteSessionResponse(session=session)

    def UndeleteSession(self, request, context):
        self._admit(request, context)
        return types_pb2.Session(session_id=request.session_id, state=types_pb2.SESSION_STATE_ACTIVE)

    def ForkSession(self, request, context):
        self._admit(request, context)
        return types_pb2.Session(session_id="fork", head_revision_id=request.revision_id or "r0")

    def RollbackSession(self, request, context):
        self._admit(request, context)
        return types_pb2.Session(session_id=request.session_id, head_revision_id=request.revision_id)

    def ListRevisions(self, request, context):
        self._admit(request, context)
        first = int(request.page_token or 0)
        return sessions_pb2.ListRevisionsResponse(
            revisions=[types_pb2.Revision(revision_id=f"r{first}")],
            next_page_token=str(first + 1) if first < 2 else "",
        )

    def GetRevision(self, request, context):
        self._admit(request, context)
        return types_pb2.Revision(revision_id=request.revision_id)

    def AbortTurn(self, request, context):
        self._admit(request, context)
        return sessions_pb2.AbortTurnResponse(stopped=True)

    def WarmSession(self, request, context):
        self._admit(request, context)
        session = types_pb2.Session(session_id=request.session_id, tier=types_pb2.TIER_HOT)
        return sessions_pb2.WarmSessionResponse(session=session)

    def SuspendSession(self, request, context):
        self._admit(request, context)
        session = types_pb2.Session(session_id=request.session_id, tier=types_pb2.TIER_COLD)
        return sessions_pb2.SuspendSessionResponse(session=session)

    def CountTokens(self, request, context):
        self._admit(request, context)
        return sessions_pb2.CountTokensResponse(tokens=len(request.messages))

    def ExplainTurn(self, request, context):
        self._admit(request, context)
        return sessions_pb2.ExplainTurnResponse(turns=[sessions_pb2.TurnExplanation(revision_id="r1")])

    def ExportSession(self, request, context):
        self._admit(request, context)
        yield sessions_pb2.ExportSessionResponse(header=sessions_pb2.ArchiveHeader(session_id="s1"))
        for i in range(0, len(self.archive), 300_000):
            yield sessions_pb2.ExportSessionResponse(chunk=self.archive[i : i + 300_000])
        trailer = sessions_pb2.ArchiveTrailer(
            sha256=hashlib.sha256(self.archive).digest(), total_bytes=len(self.archive)
        )
        yield sessions_pb2.ExportSessionResponse(trailer=trailer)

    def ImportSession(self, request_iterator, context):
        parts = list(request_iterator)
        self._admit(parts[0], context)
        self.archive = b"".join(part.chunk for part in parts)
        assert parts[-1].trailer.total_bytes == len(self.archive)
        return sessions_pb2.ImportSessionResponse(
            session=types_pb2.Session(session_id="s2"), verdict=sessions_pb2.IMPORT_VERDICT_EXACT
        )

    def GetServerInfo(self, request, context):
        self._admit(request, context)
        return admin_pb2.GetServerInfoResponse(version="test")

    def GetStats(self, request, context):
        self._admit(request, context)
        return admin_pb2.GetStatsResponse(turns_running=1)

    def WatchStats(self, request, context):
        self._admit(request, context)
        for i in range(3):
            yield admin_pb2.GetStatsResponse(turns_running=i)

    def VerifyStore(self, request, context):
        self._admit(request, context)
        yield admin_pb2.VerifyStoreResponse(summary=admin_pb2.VerifySummary(records=1))

    def CompactStore(self, request, context):
        self._admit(request, context)
        return admin_pb2.CompactStoreResponse(records_erased=1)

    def DrainServer(self, request, context):
        self._admit(request, context)
        return admin_pb2.DrainServerResponse(turns_finished=1)


class Health(grpc.GenericRpcHandler):
    """Answers the health check with NOT_SERVING so many times, then with SERVING."""

    def __init__(self, not_yet: int) -> None:
        self.not_yet = not_yet

    def service(self, handler_call_details):
        if handler_call_details.method != "/grpc.health.v1.Health/Check":
            return None

        def check(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.not_yet -= 1
            return b"\x08\x02" if self.not_yet >= 0 else b"\x08\x01"

        return grpc.unary_unary_rpc_method_handler(check)


@contextmanager
def serve(servicer: FakeServer, not_yet: int = 0, port: int = 0) -> Iterator[str]:
    """The address of a running server; `port` 0: any."""
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[Health(not_yet)])
    sessions_pb2_grpc.add_SessionsServicer_to_server(servicer, server)
    admin_pb2_grpc.add_AdminServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"localhost:{port}")
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(None).wait()


def random_breaks(seed: int, n_streams: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(0, 12) for _ in range(n_streams)]
