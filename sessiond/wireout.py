"""What goes over the wire: domain values and errors to protobuf. No behaviour."""

from __future__ import annotations

import math

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

from sessiond.errors import SessiondError
from sessiond.restoring import Restoration
from sessiond.template import Message
from sessiond.turnevents import Accepted, Finished, Tokens, TurnEvent
from sessiond.types import FinishReason, Tier
from sessiond.v1 import sessions_pb2 as pb
from sessiond.v1 import types_pb2 as types
from sessiond.views import RevisionView, SessionView

FINISH = {
    FinishReason.STOP: types.FINISH_REASON_STOP,
    FinishReason.LENGTH: types.FINISH_REASON_LENGTH,
    FinishReason.CONTEXT_FULL: types.FINISH_REASON_CONTEXT_FULL,
    FinishReason.TOOL_CALL: types.FINISH_REASON_TOOL_CALL,
    FinishReason.ABORTED: types.FINISH_REASON_ABORTED,
}
UNFINISHED = types.FINISH_REASON_UNSPECIFIED
KINDS = {
    "root": types.REVISION_KIND_ROOT,
    "turn": types.REVISION_KIND_TURN,
    "append": types.REVISION_KIND_APPEND,
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
    "interrupted": pb.RECOMPUTE_CAUSE_INTERRUPTED_TURN,
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


def message(value: Message) -> types.Message:
    calls = [types.ToolCall(id=c.id, name=c.name, arguments_json=c.arguments_json) for c in value.tool_calls]
    content = [types.ContentPart(text=value.content)] if value.content else []
    return types.Message(
        role=value.role, content=content, tool_calls=calls, tool_call_id=value.tool_call_id, name=value.name
    )


def timestamp(us: int | None) -> Timestamp | None:
    return None if us is None else Timestamp(seconds=us // 1_000_000, nanos=us % 1_000_000 * 1000)


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
        tier=types.TIER_HOT if report.tier is Tier.DEVICE else types.TIER_COLD,
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
