"""What came over the wire: protobuf requests to domain values.

No behaviour: what a field means is said in proto/, what happens in sessions.py and turn.py.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from blake3 import blake3
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.timestamp_pb2 import Timestamp

from sessiond.admission import APPEND_ONLY, CONTINUE, NEW_INPUT, TurnRequest
from sessiond.errors import BadMessage, BadRequest, InvalidConfig, NotImplementedYet
from sessiond.sampling import SamplingParams
from sessiond.template import Message, ToolCall
from sessiond.v1 import sessions_pb2 as pb
from sessiond.v1 import types_pb2 as types
from sessiond.views import Fork, ImportRequest, NewSession, Rollback

MAX_TTL_US = 100 * 366 * 86_400 * 1_000_000
MAX_TIME_US = 253_402_300_800 * 1_000_000
_LABEL_KEY = re.compile(r"[a-z][a-z0-9_-]{0,62}")
MODES = {
    pb.GENERATE_MODE_UNSPECIFIED: NEW_INPUT,
    pb.GENERATE_MODE_NEW_INPUT: NEW_INPUT,
    pb.GENERATE_MODE_CONTINUE: CONTINUE,
    pb.GENERATE_MODE_APPEND_ONLY: APPEND_ONLY,
}


# Fields of a request that do not change what it does: two requests that differ only here are the same request.
_NOT_DIGESTED = ("request_id", "resume_after_tokens", "wait", "supersede", "abort_on_disconnect", "priority")


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
    """Name and knobs. Raises InvalidConfig for a knob that JSON has no number for."""
    name = proto.name or "full"
    try:
        return name, MessageToDict(proto.knobs)
    except ValueError as error:
        told = f"policy {name!r}: knobs must be finite numbers"
        raise InvalidConfig(told, policy=name, knob=", ".join(sorted(proto.knobs)), range="finite numbers") from error


def micros(proto: Timestamp | Duration) -> int:
    return int(proto.seconds) * 1_000_000 + proto.nanos // 1000


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
    return NewSession(
        request_id=_request_id(request.request_id),
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


def fork(request: pb.ForkSessionRequest) -> Fork:
    """Raises BadRequest or UnknownPolicy."""
    ttl, expire = expiration(request)
    return Fork(
        session_id=request.session_id,
        revision_id=request.revision_id,
        request_id=_request_id(request.request_id),
        digest=digest(request),
        labels=labels(request.labels),
        recompute=request.recompute,
        model=request.model,
        adapter=request.adapter,
        policy=policy(request.policy) if request.HasField("policy") else None,
        ttl_us=ttl,
        expire_us=expire,
    )


def rollback(request: pb.RollbackSessionRequest) -> Rollback:
    """Raises BadRequest."""
    return Rollback(
        session_id=request.session_id,
        revision_id=request.revision_id,
        request_id=_request_id(request.request_id),
        digest=digest(request),
        etag=request.etag,
    )


def import_request(header: pb.ImportHeader) -> ImportRequest:
    """Raises BadRequest."""
    ttl, expire = expiration(header)
    return ImportRequest(
        request_id=_request_id(header.request_id),
        digest=digest(header),
        labels=labels(header.labels),
        allow_recompute=header.allow_recompute,
        dry_run=header.dry_run,
        ttl_us=ttl,
        expire_us=expire,
    )


def _request_id(given: str) -> str:
    if len(given.encode()) > 128:
        raise BadRequest("request_id is at most 128 bytes", field="request_id")
    return given


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
        priority=request.priority,
    )


_CLAUSE = re.compile(
    r'\s*(?:labels\.(?P<label>[^\s="]+)\s*=\s*"(?P<value>(?:[^"\\]|\\["\\])*)"'
    r"|(?P<field>state|tier)\s*=\s*(?P<word>[A-Z]+))\s*"
)
_WORDS = {"state": ("ACTIVE", "DELETED"), "tier": ("HOT", "WARM", "COLD")}


def parse_filter(text: str) -> tuple[dict[str, str], str | None, str | None]:
    """Labels, state and tier of `labels.KEY = "VALUE" AND state = ACTIVE AND tier = HOT`, absent ones None.

    State and tier come in lower case. Raises BadRequest.
    """
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
    state, tier = (found[name].lower() if name in found else None for name in ("state", "tier"))
    return wanted, state, tier
