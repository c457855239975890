"""protobuf <-> domain values. No behaviour: what a field means is said in proto/, what happens in sessions.py."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from blake3 import blake3
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

from sessiond.admission import APPEND_ONLY, CONTINUE, NEW_INPUT, TurnRequest
from sessiond.errors import BadMessage, BadRequest, NotImplementedYet, SessiondError
from sessiond.sampling import SamplingParams
from sessiond.template import Message, ToolCall
from sessiond.tiers import Restoration
from sessiond.turnevents import Accepted, Finished, Tokens, TurnEvent
from sessiond.types import FinishReason
from sessiond.v1 import sessions_pb2 as pb
from sessiond.v1 import types_pb2 as types
from sessiond.views import NewSession, RevisionView, SessionView

FINISH = {
    FinishReason.STOP: types.FINISH_REASON_STOP,
    FinishReason.LENGTH: types.FINISH_REASON_LENGTH,
    FinishReason.CONTEXT_FULL: types.FINISH_REASON_CONTEXT_FULL,
    FinishReason.TOOL_CALL: types.FINISH_REASON_TOOL_CALL,
    FinishReason.ABORTED: types.FINISH_REASON_ABORTED,
}
MAX_TTL_US = 100 * 366 * 86_400 * 1_000_000
MAX_TIME_US = 253_402_300_800 * 1_000_000
_LABEL_KEY = re.compile(r"[a-z][a-z0-9_-]{0,62}")
UNFINISHED = types.FINISH_REASON_UNSPECIFIED
KINDS = {
    "root": types.REVISION_KIND_ROOT,
    "turn": types.REVISION_KIND_TURN,
    "append": types.REVISION_KIND_APPEND,
}
MODES = {
    pb.GENERATE_MODE_UNSPECIFIED: NEW_INPUT,
    pb.GENERATE_MODE_NEW_INPUT: NEW_INPUT,
    pb.GENERATE_MODE_CONTINUE: CONTINUE,
    pb.GENERATE_MODE_APPEND_ONLY: APPEND_ONLY,
}
ATTACHMENTS = {
    "started": pb.ATTACHMENT_STARTED,
    "joined": pb.ATTACHMENT_JOINED,
    "resumed": pb.ATTACHMENT_RESUMED,
    "replayed": pb.ATTACHMENT_REPLAYED,
}
CAUSES = {
    "not_persisted": pb.RECOMPUTE_CAUSE_NOT_PERSISTED,
    "corrupt": pb.RECOMPUTE_CAUSE_CORRUPT,
}


def rpc_error(error: SessiondError) -> status_pb2.Status:
    """google.rpc.Status of an error: canonical code, ErrorInfo, and RetryInfo where a retry may help."""
    # Errors quote what they were given; trailers are small.
    status = status_pb2.Status(code=error.status.value, message=_clip(error.message, 1024))
    metadata = {key: _clip(value, 256) for key, value in error.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain="sessiond", metadata=metadata)
    status.details.add().Pack(info)
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        status.details.add().Pack(retry)
    return status


def _clip(text: str, n_bytes: int) -> str:
    raw = text.encode("utf-8", "replace")
    return text if len(raw) <= n_bytes else raw[:n_bytes].decode("utf-8", "ignore") + "…"


# Fields of a request that do not change what it does: two requests that differ only here are the same request.
_NOT_DIGESTED = ("request_id", "resume_after_tokens", "wait", "supersede", "abort_on_disconnect")


def digest(request: ProtoMessage) -> str:
    """Hex digest of what a request asks for."""
    copy = type(request)()
    copy.CopyFrom(request)
    for name in _NOT_DIGESTED:
        if name in copy.DESCRIPTOR.fields_by_name:
            copy.ClearField(name)
    return blake3(copy.SerializeToString(deterministic=True)).hexdigest(16)


def messages(protos: Iterable[types.Message]) -> tuple[Message, ...]:
    """Raises BadMessage or EmptyInput."""
    out = []
    for proto in protos:
        parts = [part.WhichOneof("part") for part in proto.content]
        if any(kind != "text" for kind in parts):
            raise BadMessage("a content part holds nothing; this version takes text parts")
        calls = tuple(ToolCall(c.name, c.arguments_json, c.id) for c in proto.tool_calls)
        text = "".join(part.text for part in proto.content)
        out.append(Message(proto.role, text, calls, proto.tool_call_id, proto.name))
    return tuple(out)


def message(value: Message) -> types.Message:
    calls = [types.ToolCall(id=c.id, name=c.name, arguments_json=c.arguments_json) for c in value.tool_calls]
    content = [types.ContentPart(text=value.content)] if value.content else []
    return types.Message(
        role=value.role, content=content, tool_calls=calls, tool_call_id=value.tool_call_id, name=value.name
    )


def sampling(proto: types.Sampling) -> SamplingParams:
    """Raises BadSampling."""
    given: dict[str, Any] = {}
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "seed",
        "max_tokens",
        "logprobs",
    ):
        if proto.HasField(name):
            given[name] = getattr(proto, name)
    return SamplingParams(
        **given,
        logit_bias=tuple(sorted(proto.logit_bias.items())),
        stop=tuple(proto.stop),
        stop_token_ids=tuple(proto.stop_token_ids),
    )


def policy(proto: types.Policy) -> tuple[str, dict[str, Any]]:
    return proto.name or "full", MessageToDict(proto.knobs)


def micros(proto: Timestamp | Duration) -> int:
    return int(proto.seconds) * 1_000_000 + proto.nanos // 1000


def timestamp(us: int | None) -> Timestamp | None:
    return None if us is None else Timestamp(seconds=us // 1_000_000, nanos=us % 1_000_000 * 1000)


def tool(proto: types.Tool) -> dict[str, Any]:
    """A tool as chat templates know it. Raises BadRequest."""
    try:
        parameters = json.loads(proto.parameters_json_schema or "{}")
    except ValueError as error:
        raise BadRequest(f"parameters of tool {proto.name!r} are not JSON: {error}", field="tools") from error
    if not proto.name or not isinstance(parameters, dict):
        raise BadRequest("a tool has a name, and parameters that are a JSON object", field="tools")
    function = {"name": proto.name, "description": proto.description, "parameters": parameters}
    return {"type": "function", "function": function}


def ttl_us(proto: Duration) -> int:
    """Raises BadRequest unless it is positive and at most 100 years."""
    value = micros(proto)
    if not 0 < value <= MAX_TTL_US or not 0 <= proto.nanos < 1_000_000_000:
        raise BadRequest("ttl must be positive and at most 100 years", field="ttl")
    return value


def expire_us(proto: Timestamp) -> int:
    """Raises BadRequest unless it lies ahead, before the year 10000."""
    value = micros(proto)
    if not time.time_ns() // 1000 < value < MAX_TIME_US or not 0 <= proto.nanos < 1_000_000_000:
        raise BadRequest("expire_time must lie ahead, before the year 10000", field="expire_time")
    return value


def expiration(request: Any) -> tuple[int | None, int | None]:
    """(ttl, expire_time) of a request's `expiration`, in microseconds. Raises BadRequest."""
    which = request.WhichOneof("expiration")
    if which == "ttl":
        return ttl_us(request.ttl), None
    return None, expire_us(request.expire_time) if which else None


def labels(given: Mapping[str, str]) -> dict[str, str]:
    """Raises BadRequest for a key that is no label key, or a value of more than 256 characters."""
    for key, value in given.items():
        if not _LABEL_KEY.fullmatch(key) or len(value) > 256 or "\0" in value:
            raise BadRequest(
                f"label {key!r}: keys match {_LABEL_KEY.pattern}, values are at most 256 characters", field="labels"
            )
    return dict(given)


def new_session(request: pb.CreateSessionRequest) -> NewSession:
    """Raises BadMessage, BadRequest or EmptyInput."""
    given = messages(request.messages)
    if request.system:
        given = (Message("system", request.system), *given)
    ttl, expire = expiration(request)
    if len(request.request_id.encode()) > 128:
        raise BadRequest("request_id is at most 128 bytes", field="request_id")
    return NewSession(
        request_id=request.request_id,
        digest=digest(request),
        messages=given,
        token_ids=tuple(request.token_ids.ids) if request.HasField("token_ids") else None,
        tools=tuple(tool(t) for t in request.tools),
        model=request.model,
        adapter=request.adapter,
        policy=policy(request.policy),
        labels=labels(request.labels),
        ttl_us=ttl,
        expire_us=expire,
    )


def turn_request(request: pb.GenerateRequest) -> TurnRequest:
    """Raises BadMessage, BadSampling, BadRequest, EmptyInput or NotImplementedYet."""
    if request.mode not in MODES:
        raise BadRequest(f"unknown mode {request.mode}", field="mode")
    if request.context_overflow not in pb.ContextOverflow.values():
        raise BadRequest(f"unknown context_overflow {request.context_overflow}", field="context_overflow")
    if request.context_overflow == pb.CONTEXT_OVERFLOW_SLIDE:
        raise NotImplementedYet("context_overflow SLIDE is reserved", field="context_overflow")
    if request.retemplate:
        raise NotImplementedYet("retemplate is not served by this version", field="retemplate")
    return TurnRequest(
        session_id=request.session_id,
        request_id=request.request_id,
        digest=digest(request),
        base_revision=request.base_revision_id,
        mode=MODES[request.mode],
        messages=messages(request.messages),
        token_ids=tuple(request.token_ids.ids) if request.HasField("token_ids") else None,
        sampling=sampling(request.sampling),
        policy=policy(request.policy) if request.HasField("policy") else None,
        resume_after=request.resume_after_tokens,
        wait=request.wait,
        supersede=request.supersede,
        abort_on_disconnect=request.abort_on_disconnect,
    )


def session(view: SessionView) -> types.Session:
    record = view.record
    proto = types.Session(
        session_id=record.session_id,
        tenant=record.tenant,
        head_revision_id=record.head_revision,
        root_revision_id=record.root_revision,
        model=record.model,
        adapter=record.adapter,
        policy=types.Policy(name=record.policy["name"]),
        labels=record.labels,
        state=types.SESSION_STATE_ACTIVE if record.deleted_us is None else types.SESSION_STATE_DELETED,
        tier=types.TIER_HOT if view.hot else types.TIER_COLD,
        create_time=timestamp(record.created_us),
        update_time=timestamp(record.updated_us),
        last_used_time=timestamp(record.last_used_us),
        expire_time=timestamp(record.expire_us),
        delete_time=timestamp(record.deleted_us),
        purge_time=timestamp(record.purge_us),
        etag=str(record.generation),
        token_count=view.token_count,
        exact_upto=view.exact_upto,
        persisted_upto=view.persisted_upto,
        bytes_hot=view.bytes_hot,
        running_request_id=view.running_request,
        suspended_request_id=view.suspended_request,
    )
    proto.policy.knobs.update(record.policy["knobs"])
    if record.ttl_us is not None:
        proto.ttl.CopyFrom(Duration(seconds=record.ttl_us // 1_000_000, nanos=record.ttl_us % 1_000_000 * 1000))
    return proto


def revision(view: RevisionView) -> types.Revision:
    record = view.record
    return types.Revision(
        revision_id=record.revision_id,
        session_id=record.session_id,
        parent_revision_id=record.parent or "",
        kind=KINDS[record.kind],
        messages=[message(m) for m in view.asked],
        answer=message(view.said[0]) if view.said else None,
        log_start=record.log_start,
        log_end=record.log_end,
        usage=usage(record.usage),
        finish_reason=FINISH[FinishReason(record.finish_reason)] if record.finish_reason else UNFINISHED,
        aborted=record.aborted,
        create_time=timestamp(record.created_us),
        exact_upto=view.exact_upto,
        request_id=record.request_id,
    )


def usage(value: dict[str, int]) -> types.Usage:
    return types.Usage(
        prompt_tokens_new=value.get("new", 0),
        prompt_tokens_reused=value.get("reused", 0),
        generated_tokens=value.get("generated", 0),
    )


def restored(report: Restoration) -> pb.Restored:
    return pb.Restored(
        tier=types.TIER_COLD,
        bytes_read=report.bytes_read,
        milliseconds=report.milliseconds,
        tokens_restored=report.tokens_restored,
        tokens_recomputed=sum(r.tokens for r in report.recomputed),
        reasons=[
            pb.RecomputeReason(reason=CAUSES[r.cause], tokens=r.tokens, detail=r.detail) for r in report.recomputed
        ],
    )


def turn_event(sequence: int, event: TurnEvent) -> pb.TurnEvent:
    if isinstance(event, Tokens):
        return pb.TurnEvent(sequence=sequence, token=_tokens(event))
    if isinstance(event, Accepted):
        accepted = pb.Accepted(
            revision_id=event.base_revision,
            turn_revision_id=event.turn_revision,
            prompt_tokens_new=event.new,
            prompt_tokens_reused=event.reused,
            template_drift=event.drift,
            attachment=ATTACHMENTS[event.attachment],
            log_start=event.log_start,
        )
        return pb.TurnEvent(sequence=sequence, accepted=accepted)
    if isinstance(event, Restoration):
        return pb.TurnEvent(sequence=sequence, restored=restored(event))
    return pb.TurnEvent(sequence=sequence, finished=_finished(event))


def _tokens(event: Tokens) -> pb.Tokens:
    out = pb.Tokens(
        first_token_index=event.first_index,
        text_offset=event.text_offset,
        token_ids=[s.token_id for s in event.sampled],
        text=event.text,
    )
    for sampled in event.sampled:
        if sampled.logprob is not None and not math.isnan(sampled.logprob):
            top = [pb.TopLogprob(token_id=t, logprob=p) for t, p in sampled.top]
            out.logprobs.append(pb.TokenLogprobs(token_id=sampled.token_id, logprob=sampled.logprob, top=top))
    return out


def _finished(event: Finished) -> pb.Finished:
    return pb.Finished(
        revision_id=event.revision,
        finish_reason=FINISH[event.reason] if event.reason else UNFINISHED,
        stop=event.stop,
        committed_tokens=event.committed,
        usage=usage(event.usage),
        time_to_first_token_ms=event.ttft_ms,
        tokens_per_second=event.tokens_per_second,
        memory_bytes_by_tier=event.memory,
        notices=event.notices,
        answer=message(Message("assistant", event.answer)) if event.usage.get("generated") else None,
    )


_CLAUSE = re.compile(
    r'\s*(?:labels\.(?P<label>[^\s="]+)\s*=\s*"(?P<value>(?:[^"\\]|\\["\\])*)"'
    r"|(?P<field>state|tier)\s*=\s*(?P<word>[A-Z]+))\s*"
)
_WORDS = {"state": ("ACTIVE", "DELETED"), "tier": ("HOT", "WARM", "COLD")}


def parse_filter(text: str) -> tuple[dict[str, str], str | None, bool | None]:
    """(labels, state, hot) of `labels.KEY = "VALUE" AND state = ACTIVE AND tier = HOT`. Raises BadRequest."""
    found: dict[str, str] = {}
    at = 0
    while text.strip():
        match = _CLAUSE.match(text, at)
        name = (match["field"] or f"labels.{match['label']}") if match else ""
        if not match or name in found or (match["field"] and match["word"] not in _WORDS[name]):
            raise BadRequest(f"filter is not understood at {text[at : at + 40]!r}", field="filter")
        found[name] = match["word"] or re.sub(r"\\(.)", r"\1", match["value"])
        at = match.end()
        if at == len(text):
            break
        if not text.startswith("AND", at):
            raise BadRequest(f"filter is not understood at {text[at : at + 40]!r}", field="filter")
        at += len("AND")
    wanted = {name.removeprefix("labels."): value for name, value in found.items() if name not in _WORDS}
    state = found["state"].lower() if "state" in found else None
    return wanted, state, found["tier"] == "HOT" if "tier" in found else None
