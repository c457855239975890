"""A server with canned answers for tests of the command line; what it does not define is UNIMPLEMENTED."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from sessiond.v1 import admin_pb2, admin_pb2_grpc, sessions_pb2, sessions_pb2_grpc, types_pb2


def abort(context: grpc.ServicerContext, code: grpc.StatusCode, reason: str, message: str, **metadata: str) -> None:
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="sessiond", metadata=metadata))
    context.abort_with_status(rpc_status.to_status(status))


class CannedServer(sessions_pb2_grpc.SessionsServicer, admin_pb2_grpc.AdminServicer):
    """`words` are streamed with `pause` seconds between them; `requests` keeps what came in."""

    def __init__(self) -> None:
        self.words = ["Hello", ", ", "wörld", "!"]
        self.pause = 0.0
        self.suspended = ""  # the request that stands suspended
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.sessions: dict[str, types_pb2.Session] = {}
        self.archive = bytes(range(256)) * 4000
        self.cuts_archive = False
        self.findings: list[admin_pb2.Finding] = []
        self.aborted = threading.Event()
        self.streaming = threading.Event()

    def _session(self, session_id: str, context: grpc.ServicerContext) -> types_pb2.Session:
        self.metadata = {key: str(value) for key, value in context.invocation_metadata()}
        if session_id not in self.sessions:
            abort(context, grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND", f"no session {session_id}")
        return self.sessions[session_id]

    def CreateSession(self, request, context):
        self.requests.append(request)
        name = f"s{len(self.sessions) + 1}"
        self.sessions[name] = types_pb2.Session(
            session_id=name,
            head_revision_id="r0",
            state=types_pb2.SESSION_STATE_ACTIVE,
            tier=types_pb2.TIER_HOT,
            token_count=2**60,
            labels=request.labels,
        )
        return self.sessions[name]

    def GetSession(self, request, context):
        return self._session(request.session_id, context)

    def ListSessions(self, request, context):
        self.requests.append(request)
        return sessions_pb2.ListSessionsResponse(sessions=list(reversed(self.sessions.values())))

    def ListRevisions(self, request, context):
        text = types_pb2.ContentPart(text="first \x1b[31mwords")
        message = types_pb2.Message(role="user", content=[text])
        revision = types_pb2.Revision(revision_id="r0", kind=types_pb2.REVISION_KIND_ROOT, messages=[message])
        return sessions_pb2.ListRevisionsResponse(revisions=[revision])

    def DeleteSession(self, request, context):
        self.requests.append(request)
        session = self._session(request.session_id, context)
        return sessions_pb2.DeleteSessionResponse(session=None if request.purge_now else session)

    def UndeleteSession(self, request, context):
        return self._session(request.session_id, context)

    def Generate(self, request, context):
        self.requests.append(request)
        self._session(request.session_id, context)
        if self.suspended:
            told = f"turn {self.suspended} is suspended"
            abort(context, grpc.StatusCode.ABORTED, "TURN_SUSPENDED", told, request_id=self.suspended)
        yield sessions_pb2.TurnEvent(accepted=sessions_pb2.Accepted(revision_id="r0"))
        restored = sessions_pb2.Restored(tier=types_pb2.TIER_COLD, tokens_restored=6000, milliseconds=23)
        yield sessions_pb2.TurnEvent(restored=restored)
        offset = 0
        for number, word in enumerate(self.words):
            token = sessions_pb2.Tokens(first_token_index=number, text_offset=offset, token_ids=[number], text=word)
            yield sessions_pb2.TurnEvent(token=token)
            self.streaming.set()
            offset += len(word.encode())
            time.sleep(self.pause)
            if self.aborted.is_set():
                return
        usage = types_pb2.Usage(prompt_tokens_new=12, prompt_tokens_reused=6000, generated_tokens=4)
        finished = sessions_pb2.Finished(
            revision_id="r1",
            finish_reason=types_pb2.FINISH_REASON_STOP,
            usage=usage,
            time_to_first_token_ms=31.4,
            tokens_per_second=88.88,
        )
        yield sessions_pb2.TurnEvent(finished=finished)

    def AbortTurn(self, request, context):
        self.requests.append(request)
        if self.suspended:
            self.suspended = ""
        else:
            self.aborted.set()
        return sessions_pb2.AbortTurnResponse(stopped=True, generated_tokens=2)

    def ExportSession(self, request, context):
        yield sessions_pb2.ExportSessionResponse(header=sessions_pb2.ArchiveHeader(session_id="s1"))
        yield sessions_pb2.ExportSessionResponse(chunk=self.archive)
        if self.cuts_archive:
            return
        digest = hashlib.sha256(self.archive).digest()
        trailer = sessions_pb2.ArchiveTrailer(sha256=digest, total_bytes=len(self.archive))
        yield sessions_pb2.ExportSessionResponse(trailer=trailer)

    def ImportSession(self, request_iterator, context):
        parts = list(request_iterator)
        self.requests.append(b"".join(part.chunk for part in parts))
        return sessions_pb2.ImportSessionResponse(
            session=types_pb2.Session(session_id="s9"), verdict=sessions_pb2.IMPORT_VERDICT_EXACT, tokens=7
        )

    def VerifyStore(self, request, context):
        self.requests.append(request)
        progress = admin_pb2.VerifyProgress(records_done=1, records_total=2)
        yield admin_pb2.VerifyStoreResponse(progress=progress)
        for finding in self.findings:
            yield admin_pb2.VerifyStoreResponse(finding=finding)
        yield admin_pb2.VerifyStoreResponse(summary=admin_pb2.VerifySummary(records=2, bytes=2**40))


@contextmanager
def serve(servicer: CannedServer) -> Iterator[str]:
    """The address of a running server."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    sessions_pb2_grpc.add_SessionsServicer_to_server(servicer, server)
    admin_pb2_grpc.add_AdminServicer_to_server(servicer, server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(None).wait()
