"""Python arguments to request messages, with a `request_id` wherever it makes a retry safe."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Literal, TypedDict, TypeVar

from google.protobuf import duration_pb2, timestamp_pb2

from sessiond.clients.messages import (
    Input,
    PolicyLike,
    ToolLike,
    to_duration,
    to_messages,
    to_policy,
    to_timestamp,
    to_token_ids,
    to_tool,
)
from sessiond.v1 import sessions_pb2, types_pb2

_T = TypeVar("_T")


class CreateOptions(TypedDict, total=False):
    """`ttl` is in seconds from last use; `expire_time` is a fixed time. At most one of the two."""

    system: str
    messages: Input
    token_ids: Iterable[int]
    tools: Sequence[ToolLike]
    model: str
    adapter: str
    policy: PolicyLike
    labels: Mapping[str, str]
    ttl: float | timedelta
    expire_time: datetime
    request_id: str


class ForkOptions(TypedDict, total=False):
    """`revision`: the new head, by default the current one. With `recompute` the model may change."""

    revision: str | types_pb2.Revision
    labels: Mapping[str, str]
    recompute: bool
    model: str
    adapter: str
    policy: PolicyLike
    ttl: float | timedelta
    expire_time: datetime
    request_id: str


class UpdateOptions(TypedDict, total=False):
    """What is given is set; None clears it."""

    labels: Mapping[str, str] | None
    policy: PolicyLike | None
    ttl: float | timedelta | None
    expire_time: datetime | None


class ImportOptions(TypedDict, total=False):
    labels: Mapping[str, str]
    allow_recompute: bool
    dry_run: bool
    ttl: float | timedelta
    expire_time: datetime
    request_id: str


class SamplingOptions(TypedDict, total=False):
    """As the fields of Sampling. Without a temperature, decoding is greedy."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    max_tokens: int
    logprobs: int


class GenerateOptions(SamplingOptions, total=False):
    """As the fields of GenerateRequest; `base_revision` may be the revision itself."""

    token_ids: Iterable[int]
    request_id: str
    base_revision: str | types_pb2.Revision
    mode: Literal["new_input", "continue", "append_only"]
    policy: PolicyLike
    context_overflow: Literal["refuse", "slide"]
    resume_after_tokens: int
    wait: bool
    supersede: bool
    abort_on_disconnect: bool
    priority: int
    retemplate: bool


class _Expiration(TypedDict):
    ttl: duration_pb2.Duration | None
    expire_time: timestamp_pb2.Timestamp | None


_MODES = {
    "new_input": sessions_pb2.GENERATE_MODE_NEW_INPUT,
    "continue": sessions_pb2.GENERATE_MODE_CONTINUE,
    "append_only": sessions_pb2.GENERATE_MODE_APPEND_ONLY,
}
_OVERFLOWS = {
    "refuse": sessions_pb2.CONTEXT_OVERFLOW_REFUSE,
    "slide": sessions_pb2.CONTEXT_OVERFLOW_SLIDE,
}


def make_request_id() -> str:
    return uuid.uuid4().hex


def create_session(options: CreateOptions) -> sessions_pb2.CreateSessionRequest:
    return sessions_pb2.CreateSessionRequest(
        request_id=options.get("request_id") or make_request_id(),
        system=options.get("system", ""),
        messages=to_messages(options.get("messages")),
        token_ids=to_token_ids(options.get("token_ids")),
        tools=[to_tool(tool) for tool in options.get("tools", ())],
        model=options.get("model", ""),
        adapter=options.get("adapter", ""),
        policy=to_policy(options.get("policy")),
        labels=options.get("labels"),
        **_expiration(options.get("ttl"), options.get("expire_time")),
    )


def fork_session(session_id: str, options: ForkOptions) -> sessions_pb2.ForkSessionRequest:
    return sessions_pb2.ForkSessionRequest(
        session_id=session_id,
        revision_id=revision_id(options.get("revision", "")),
        request_id=options.get("request_id") or make_request_id(),
        labels=options.get("labels"),
        recompute=options.get("recompute", False),
        model=options.get("model", ""),
        adapter=options.get("adapter", ""),
        policy=to_policy(options.get("policy")),
        **_expiration(options.get("ttl"), options.get("expire_time")),
    )


def update_session(session_id: str, etag: str, options: UpdateOptions) -> sessions_pb2.UpdateSessionRequest:
    """Raises ValueError if nothing is to change: an empty mask would mean something else."""
    if not options:
        raise ValueError("nothing to update")
    session = types_pb2.Session(
        session_id=session_id,
        etag=etag,
        labels=options.get("labels"),
        policy=to_policy(options.get("policy")),
        **_expiration(options.get("ttl"), options.get("expire_time")),
    )
    request = sessions_pb2.UpdateSessionRequest(session=session)
    request.update_mask.paths.extend(sorted(options))
    return request


def rollback_session(session_id: str, to: str | types_pb2.Revision, etag: str) -> sessions_pb2.RollbackSessionRequest:
    return sessions_pb2.RollbackSessionRequest(
        session_id=session_id, revision_id=revision_id(to), etag=etag, request_id=make_request_id()
    )


def import_header(options: ImportOptions) -> sessions_pb2.ImportHeader:
    return sessions_pb2.ImportHeader(
        request_id=options.get("request_id") or make_request_id(),
        labels=options.get("labels"),
        allow_recompute=options.get("allow_recompute", False),
        dry_run=options.get("dry_run", False),
        **_expiration(options.get("ttl"), options.get("expire_time")),
    )


def generate(session_id: str, messages: Input | None, options: GenerateOptions) -> sessions_pb2.GenerateRequest:
    """Raises ValueError for an unknown mode or overflow, or sampling options out of protobuf's own ranges."""
    request = sessions_pb2.GenerateRequest(
        session_id=session_id,
        request_id=options.get("request_id") or make_request_id(),
        base_revision_id=revision_id(options.get("base_revision", "")),
        messages=to_messages(messages),
        token_ids=to_token_ids(options.get("token_ids")),
        policy=to_policy(options.get("policy")),
        resume_after_tokens=options.get("resume_after_tokens", 0),
        wait=options.get("wait", False),
        supersede=options.get("supersede", False),
        abort_on_disconnect=options.get("abort_on_disconnect", False),
        priority=options.get("priority", 0),
        retemplate=options.get("retemplate", False),
    )
    if "mode" in options:
        request.mode = _choose(_MODES, options["mode"], "mode")
    if "context_overflow" in options:
        request.context_overflow = _choose(_OVERFLOWS, options["context_overflow"], "context_overflow")
    sampling = to_sampling(options)
    if sampling is not None:
        request.sampling.CopyFrom(sampling)
    return request


def to_sampling(options: SamplingOptions) -> types_pb2.Sampling | None:
    """The sampling part of `options`; None if there is none."""
    chosen = {name: value for name, value in options.items() if name in SamplingOptions.__annotations__}
    if not chosen:
        return None
    stop = options.get("stop", ())
    return types_pb2.Sampling(
        temperature=options.get("temperature"),
        top_p=options.get("top_p"),
        top_k=options.get("top_k"),
        min_p=options.get("min_p"),
        repetition_penalty=options.get("repetition_penalty"),
        seed=options.get("seed"),
        logit_bias=options.get("logit_bias"),
        stop=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=options.get("stop_token_ids"),
        max_tokens=options.get("max_tokens"),
        logprobs=options.get("logprobs"),
    )


def revision_id(revision: str | types_pb2.Revision) -> str:
    return revision if isinstance(revision, str) else revision.revision_id


def _expiration(ttl: float | timedelta | None, expire_time: datetime | None) -> _Expiration:
    if ttl is not None and expire_time is not None:
        raise ValueError("ttl and expire_time are two ways to say one thing: give one")
    return {"ttl": to_duration(ttl), "expire_time": to_timestamp(expire_time)}


def _choose(choices: Mapping[str, _T], name: str, what: str) -> _T:
    if name not in choices:
        raise ValueError(f"{what} must be one of {', '.join(choices)}, not {name!r}")
    return choices[name]
