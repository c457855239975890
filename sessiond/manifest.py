"""An archive's manifest: what it says of the session, and a reader that believes nothing of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct

from sessiond import wirein, wireout
from sessiond.errors import SessiondError
from sessiond.history import Ended, History, Kind, Told, too_many
from sessiond.modelidentity import identity_id
from sessiond.storage.archive import malformed
from sessiond.storage.envelope import canonical_json
from sessiond.types import FinishReason
from sessiond.v1 import archive_pb2 as pb
from sessiond.v1 import types_pb2 as types

MAX_PROFILES = 1024
MAX_TIME_US = wirein.MAX_TIME_US
_KINDS: dict[int, Kind] = {
    types.REVISION_KIND_ROOT: "root",
    types.REVISION_KIND_TURN: "turn",
    types.REVISION_KIND_APPEND: "append",
}
_ENDS: dict[int, Ended | None] = {
    pb.ANSWER_END_UNSPECIFIED: None,
    pb.ANSWER_END_STOP_TOKEN: "stop_token",
    pb.ANSWER_END_OPEN: "open",
}
_REASONS: dict[int, str] = {number: str(reason) for reason, number in wireout.FINISH.items()}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an archive says of its session."""

    created_by: str
    created_us: int
    session_id: str
    identity: dict[str, str]
    model: str
    adapter: str
    policy: tuple[str, dict[str, Any]]
    cell_tokens: int
    profiles: tuple[dict[str, str], ...]
    history: History


def encode_manifest(manifest: Manifest) -> bytes:
    name, knobs = manifest.policy
    proto = pb.ArchiveManifest(
        created_by=manifest.created_by,
        create_time=wireout.timestamp(manifest.created_us),
        session_id=manifest.session_id,
        identity=types.ModelIdentity(identity_id=identity_id(manifest.identity), fields=manifest.identity),
        model=manifest.model,
        adapter=manifest.adapter,
        policy=types.Policy(name=name, knobs=_struct(knobs)),
        cell_tokens=manifest.cell_tokens,
        profiles=[pb.ArchiveProfile(fields=fields) for fields in manifest.profiles],
        head=manifest.history.head,
    )
    for index, told in enumerate(manifest.history.revisions):
        proto.revisions.append(_revision(manifest.history, index, told))
    return proto.SerializeToString(deterministic=True)


def _revision(history: History, index: int, told: Told) -> pb.ArchiveRevision:
    return pb.ArchiveRevision(
        revision_id=told.name,
        parent=told.parent,
        kind=wireout.KINDS[told.kind],
        log_start=history.start(index),
        log_end=history.ends[index],
        n_prompt=told.n_prompt,
        token_ids=told.ids.astype("<u4").tobytes(),
        token_flags=told.flags.tobytes(),
        messages=[wireout.message(message) for message in told.asked],
        answers=[wireout.message(message) for message in told.said],
        ended=next(number for number, ended in _ENDS.items() if ended == told.ended),  # type: ignore[arg-type]
        finish_reason=wireout.FINISH[FinishReason(told.finish_reason)] if told.finish_reason else wireout.UNFINISHED,
        aborted=told.aborted,
        usage=types.Usage(
            prompt_tokens_new=told.usage.get("new", 0),
            prompt_tokens_reused=told.usage.get("reused", 0),
            generated_tokens=told.usage.get("generated", 0),
        ),
        computed_tokens=told.computed,
        tools_json=canonical_json(list(told.tools)).decode() if told.tools else "",
        create_time=wireout.timestamp(told.created_us),
        request_id=told.request_id,
    )


def decode_manifest(raw: bytes) -> Manifest:
    """Raises BadRequest for anything that no export writes."""
    try:
        proto = pb.ArchiveManifest.FromString(raw)
    except DecodeError as error:
        raise malformed("its manifest is not valid protobuf") from error
    fields = dict(proto.identity.fields)
    if not fields or identity_id(fields) != proto.identity.identity_id:
        raise malformed("the identity's id is not that of its fields")
    if not 1 <= proto.cell_tokens <= 1 << 16 or len(proto.profiles) > MAX_PROFILES:
        raise malformed(f"cells of {proto.cell_tokens} tokens, {len(proto.profiles)} profiles")
    return Manifest(
        created_by=proto.created_by,
        created_us=wirein.micros(proto.create_time),
        session_id=proto.session_id,
        identity=fields,
        model=proto.model,
        adapter=proto.adapter,
        policy=wirein.policy(proto.policy),
        cell_tokens=proto.cell_tokens,
        profiles=tuple(dict(profile.fields) for profile in proto.profiles),
        history=_history(proto),
    )


def _history(proto: pb.ArchiveManifest) -> History:
    if not len(proto.revisions) >= 1 or proto.head >= len(proto.revisions):
        raise malformed(f"head {proto.head} of {len(proto.revisions)} revisions")
    parents = [one.parent if one.HasField("parent") else None for one in proto.revisions]
    if any(parent is not None and parent >= index for index, parent in enumerate(parents)):
        raise malformed("a revision has no parent before it")
    if why := too_many(parents, proto.head):
        raise malformed(why)
    told: list[Told] = []
    ends: list[int] = []
    for index, revision in enumerate(proto.revisions):
        parent = revision.parent if revision.HasField("parent") else None
        if (parent is None) != (index == 0) or (parent is not None and parent >= index):
            raise malformed(f"revision {index} has no parent before it")
        start = 0 if parent is None else ends[parent]
        n = len(revision.token_flags)
        if (revision.log_start, revision.log_end, len(revision.token_ids)) != (start, start + n, 4 * n):
            raise malformed(f"revision {index} does not hold the tokens from {start} on that it claims")
        ends.append(start + n)
        try:
            told.append(_told(revision, parent, n, start + n))
        except (SessiondError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise malformed(f"revision {index}: {error}") from error
    return History(tuple(told), proto.head)


def _told(revision: pb.ArchiveRevision, parent: int | None, n: int, end: int) -> Told:
    """Raises ValueError, KeyError, TypeError or SessiondError for what no export writes."""
    flags = np.frombuffer(revision.token_flags, np.uint8)
    kind, ended = _KINDS[revision.kind], _ENDS[revision.ended]
    created_us = wirein.micros(revision.create_time)
    tools = json.loads(revision.tools_json) if revision.tools_json else []
    if flags.size and int(flags.max()) > 1:
        raise ValueError("unknown token flags")
    if (kind == "root") != (parent is None) or revision.n_prompt > n or revision.computed_tokens > end:
        raise ValueError("kind, n_prompt or computed_tokens do not fit")
    if (kind != "turn") != (ended is None) or len(revision.answers) > 1:
        raise ValueError("an answer where there is none")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools) or (tools and kind != "root"):
        raise ValueError("tools are objects, and the root's")
    if not 0 <= created_us < MAX_TIME_US or len(revision.request_id.encode()) > 128 or "\0" in revision.request_id:
        raise ValueError("create_time or request_id out of range")
    canonical_json(tools)  # no NaN: the log could not hold it
    usage = revision.usage
    return Told(
        name=revision.revision_id,
        parent=parent,
        kind=kind,
        ids=np.frombuffer(revision.token_ids, "<u4").astype(np.uint32),
        flags=flags,
        n_prompt=revision.n_prompt,
        asked=wirein.messages(revision.messages),
        said=wirein.messages(revision.answers),
        ended=ended,
        finish_reason=_REASONS[revision.finish_reason] if revision.finish_reason else None,
        aborted=revision.aborted,
        usage={
            "new": usage.prompt_tokens_new,
            "reused": usage.prompt_tokens_reused,
            "generated": usage.generated_tokens,
        }
        if revision.HasField("usage")
        else {},
        computed=revision.computed_tokens,
        created_us=created_us,
        request_id=revision.request_id,
        tools=tuple(tools),
    )


def _struct(knobs: dict[str, Any]) -> Struct:
    out = Struct()
    out.update(knobs)
    return out
